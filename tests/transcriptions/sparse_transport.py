"""Sparsity-constrained expert choice: router 5 of arXiv 2401.15969, solver of arXiv 2209.15466.

Liu, Puigcerver and Blondel 2023, *Sparsity-Constrained Optimal Transport*: quadratically
regularised transport whose columns have at most k non-zeros. Its semi-dual, one variable per token,

    F(alpha) = sum_j b_j m_j(alpha + S[:, j]) - <alpha, a>
    m_j(x)   = max over p in the simplex with at most k non-zeros of <p, x> - gamma b_j / 2 |p|^2

is minimised by Adam from alpha = 0, with the constants of optax. The plan only selects; the combine
weights are the softmax of the logits.

Letters: n tokens of the group, E experts, c rows per expert (the k of the constraint).
"""

from math import sqrt

from torch import Tensor

from tests.transcriptions import best_first, keep, softmax_over_experts
from tests.transcriptions.sinkhorn import as_matrix

BETA_1, BETA_2, ADAM_EPSILON = 0.9, 0.999, 1e-8


def project_onto_sparse_simplex(x: list[float], k: int) -> list[float]:
    """The closest point of the unit simplex with at most k non-zeros.

    Kyrillidis et al. 2013, arXiv 1206.1529: keep the k largest entries, project those onto the
    simplex (Duchi et al. 2008, figure 1), leave zero elsewhere.
    """
    kept = best_first(x)[:k]
    total, threshold = 0.0, 0.0
    for rank, index in enumerate(kept, start=1):
        total += x[index]
        if 1 + rank * x[index] > total:
            threshold = (total - 1) / rank
    projected = [0.0] * len(x)
    for index in kept:
        projected[index] = max(x[index] - threshold, 0.0)
    return projected


def sparse_plan(
    similarity: list[list[float]], *, k: int, iterations: int, learning_rate: float, gamma: float
) -> list[list[float]]:
    """The plan after so many steps of Adam on the semi-dual: [n, E], columns sum to n / E."""
    tokens = range(len(similarity))
    experts = range(len(similarity[0]) if similarity else 0)
    a = [1.0 for _ in tokens]
    b = [len(tokens) / len(experts) for _ in experts]

    def columns_at(alpha: list[float]) -> list[list[float]]:
        return [
            project_onto_sparse_simplex(
                [(alpha[i] + similarity[i][j]) / (gamma * b[j]) for i in tokens], k
            )
            for j in experts
        ]

    alpha = [0.0 for _ in tokens]
    first_moment = [0.0 for _ in tokens]
    second_moment = [0.0 for _ in tokens]
    for step in range(1, iterations + 1):
        columns = columns_at(alpha)
        for i in tokens:
            gradient = sum(b[j] * columns[j][i] for j in experts) - a[i]
            first_moment[i] = BETA_1 * first_moment[i] + (1 - BETA_1) * gradient
            second_moment[i] = BETA_2 * second_moment[i] + (1 - BETA_2) * gradient**2
            first = first_moment[i] / (1 - BETA_1**step)
            second = second_moment[i] / (1 - BETA_2**step)
            alpha[i] -= learning_rate * first / (sqrt(second) + ADAM_EPSILON)

    columns = columns_at(alpha)
    return [[b[j] * columns[j][i] for j in experts] for i in tokens]


def sparse_transport_expert_choice(
    logits: Tensor,
    *,
    capacity: int,
    iterations: int = 20,
    learning_rate: float = 1e-2,
    gamma: float = 1.0,
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the plan [n, E]."""
    gates = softmax_over_experts(logits)
    plan = sparse_plan(
        gates.tolist(),
        k=capacity,
        iterations=iterations,
        learning_rate=learning_rate,
        gamma=gamma,
    )
    chosen = set()
    for i, row in enumerate(plan):
        for k, mass in enumerate(row):
            if mass > 0:
                chosen.add((i, k))
    return keep(gates, chosen), chosen, as_matrix(plan, logits)
