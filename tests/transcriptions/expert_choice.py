"""Softmax expert choice: Zhou et al. 2022, arXiv 2202.09368; router 3 of arXiv 2401.15969.

S = softmax(X W) over the *experts*; then every expert takes the c tokens with the largest entries
of its column of S, and S itself is the combine weight.

Letters: n tokens of the group, E experts, c rows per expert.
"""

from torch import Tensor

from tests.transcriptions import (
    best_first,
    divide_by_sum_over_chosen,
    keep,
    softmax_over_experts,
)


def expert_choice(
    logits: Tensor, *, capacity: int, renormalize: bool = False
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the scores that competed."""
    gates = softmax_over_experts(logits)
    chosen = best_of_each_column(gates.tolist(), capacity)
    if renormalize:
        return divide_by_sum_over_chosen(gates, chosen), chosen, gates.detach()
    return keep(gates, chosen), chosen, gates.detach()


def best_of_each_column(scores: list[list[float]], capacity: int) -> set[tuple[int, int]]:
    """Every expert takes its `capacity` best tokens; of equal tokens the first."""
    chosen = set()
    for k in range(len(scores[0]) if scores else 0):
        column = [row[k] for row in scores]
        for i in best_first(column)[:capacity]:
            chosen.add((i, k))
    return chosen
