"""USMoE: Do, Le and Tran, *Unified Sparse Mixture of Experts*, arXiv 2503.22996.

All (token, expert) pairs of a group compete at once for a total budget. The score mixes the tokens'
view (a softmax over the experts) with the experts' view, published twice: first as a softmax over
the tokens whose rows are then divided by their sum, later (and in the released code) as an
element-wise sigmoid, scaled so that a logit of 0 scores 1 / E.

Letters: n tokens of the group, E experts, c chosen pairs of the group.
"""

from fractions import Fraction
from math import floor

import torch
from torch import Tensor

from tests.transcriptions import (
    best_first,
    divide_by_sum_over_chosen,
    keep,
    softmax_over_experts,
    softmax_over_tokens,
)


def unified(
    logits: Tensor,
    *,
    budget: float,
    alpha: float = 0.5,
    expert_score: str = "sigmoid",
    combine: str = "unified",
) -> tuple[Tensor, set[tuple[int, int]], Tensor]:
    """Combine weights [n, E], the chosen (token, expert) pairs, and the scores that competed."""
    num_tokens, num_experts = logits.shape
    of_tokens = softmax_over_experts(logits)
    of_experts = expert_side_score(logits, expert_score)
    scores = torch.zeros_like(logits)
    for i in range(num_tokens):
        for k in range(num_experts):
            scores[i, k] = (1 - alpha) * of_tokens[i, k] + alpha * of_experts[i, k]

    # c = budget * n, halves rounded up, in exact arithmetic.
    num_pairs = floor(Fraction(budget) * num_tokens + Fraction(1, 2))
    num_pairs = max(0, min(num_pairs, num_tokens * num_experts))
    flat = [score for row in scores.tolist() for score in row]
    chosen = {(pair // num_experts, pair % num_experts) for pair in best_first(flat)[:num_pairs]}

    if combine == "unified":
        weights = keep(scores, chosen)
    elif combine == "softmax":
        weights = keep(of_tokens, chosen)
    elif combine == "renormalized":
        weights = divide_by_sum_over_chosen(scores, chosen)
    elif combine == "row-normalized":
        weights = keep(divide_rows_by_their_sum(scores), chosen)
    else:
        raise AssertionError(combine)
    return weights, chosen, scores.detach()


def expert_side_score(logits: Tensor, name: str) -> Tensor:
    """f_e of both versions, [n, E]."""
    if name == "token-softmax":
        return divide_rows_by_their_sum(softmax_over_tokens(logits))
    assert name == "sigmoid", name
    num_tokens, num_experts = logits.shape
    scores = torch.zeros_like(logits)
    for i in range(num_tokens):
        for k in range(num_experts):
            scores[i, k] = (2 / num_experts) / (1 + torch.exp(-logits[i, k]))
    return scores


def divide_rows_by_their_sum(matrix: Tensor) -> Tensor:
    """Every token's row divided by its sum over all experts."""
    divided = torch.zeros_like(matrix)
    for i in range(matrix.shape[0]):
        divided[i] = matrix[i] / matrix[i].sum()
    return divided
