"""Softmax token choice with buffers: V-MoE, Riquelme et al. 2021, arXiv 2106.05974.

Algorithm 1 (first choices before second choices, tokens in order) and algorithm 2 (batch
prioritised routing: tokens by descending top-1 gate); also router 1 of Liu et al. 2024, *Routers
in Vision Mixture of Experts*, arXiv 2401.15969.

Letters: n tokens of the group, E experts, K choices per token, c rows per expert.
"""

from torch import Tensor

from tests.transcriptions import (
    best_first,
    divide_by_sum_over_chosen,
    keep,
    softmax_over_experts,
)


def token_choice(
    logits: Tensor,
    *,
    k: int,
    capacity: int | None = None,
    batch_prioritised: bool = False,
    renormalize: bool = False,
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the scores that competed."""
    gates = softmax_over_experts(logits)
    chosen = fill_buffers(
        gates.tolist(), k=k, capacity=capacity, batch_prioritised=batch_prioritised
    )
    if renormalize:
        return divide_by_sum_over_chosen(gates, chosen), chosen, gates.detach()
    return keep(gates, chosen), chosen, gates.detach()


def fill_buffers(
    scores: list[list[float]], *, k: int, capacity: int | None, batch_prioritised: bool
) -> set[tuple[int, int]]:
    """Hand out buffer positions, all first choices before all second choices.

    The position of an assignment is the number of earlier assignments to the same expert, kept or
    not; it is kept if that number is below the capacity.
    """
    choices = [best_first(row)[:k] for row in scores]
    queue = list(range(len(scores)))
    if batch_prioritised:
        queue = best_first([max(row) for row in scores])
    assigned = [0] * len(scores[0]) if scores else []
    kept = set()
    for rank in range(k):
        for i in queue:
            expert = choices[i][rank]
            position = assigned[expert]
            assigned[expert] += 1
            if capacity is None or position < capacity:
                kept.add((i, expert))
    return kept
