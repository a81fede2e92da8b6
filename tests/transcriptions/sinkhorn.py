"""Sinkhorn token choice and Sinkhorn expert choice: routers 2 and 4 of arXiv 2401.15969.

The scores are the entropic transport plan between n tokens of mass 1 and E experts of mass n / E,
min_P <P, -L> + eps <P, log P>. Written here in Sinkhorn's own form, u <- a / (K v) with
K = exp(L / eps) (Cuturi 2013, algorithm 1), where a library would work with logarithms. The plan
only selects; the combine weights are the softmax of the logits.

Letters: n tokens of the group, E experts, K choices per token, c rows per expert.
"""

from math import exp

import torch
from torch import Tensor

from tests.transcriptions import keep, softmax_over_experts
from tests.transcriptions.expert_choice import best_of_each_column
from tests.transcriptions.token_choice import fill_buffers


def sinkhorn_plan(
    logits: list[list[float]], *, iterations: int, epsilon: float
) -> list[list[float]]:
    """Rounds of column update, then row update: rows end exact, columns end approximate."""
    tokens = range(len(logits))
    experts = range(len(logits[0]) if logits else 0)
    kernel = [[exp(entry / epsilon) for entry in row] for row in logits]
    u = [1.0 for _ in tokens]
    v = [1.0 for _ in experts]
    for _ in range(iterations):
        for k in experts:
            mass_of_expert = len(tokens) / len(experts)
            v[k] = mass_of_expert / sum(kernel[i][k] * u[i] for i in tokens)
        for i in tokens:
            mass_of_token = 1.0
            u[i] = mass_of_token / sum(kernel[i][k] * v[k] for k in experts)
    return [[u[i] * kernel[i][k] * v[k] for k in experts] for i in tokens]


def sinkhorn_token_choice(
    logits: Tensor,
    *,
    k: int,
    capacity: int | None = None,
    batch_prioritised: bool = False,
    iterations: int = 20,
    epsilon: float = 1.0,
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the plan [n, E]."""
    plan = sinkhorn_plan(logits.tolist(), iterations=iterations, epsilon=epsilon)
    chosen = fill_buffers(plan, k=k, capacity=capacity, batch_prioritised=batch_prioritised)
    return keep(softmax_over_experts(logits), chosen), chosen, as_matrix(plan, logits)


def sinkhorn_expert_choice(
    logits: Tensor, *, capacity: int, iterations: int = 20, epsilon: float = 1.0
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the plan [n, E]."""
    plan = sinkhorn_plan(logits.tolist(), iterations=iterations, epsilon=epsilon)
    chosen = best_of_each_column(plan, capacity)
    return keep(softmax_over_experts(logits), chosen), chosen, as_matrix(plan, logits)


def as_matrix(plan: list[list[float]], like: Tensor) -> Tensor:
    """The plan as a tensor; the shape is given because a group may have no token."""
    return torch.tensor(plan, dtype=like.dtype).reshape(like.shape)
