"""The published routers, transcribed line by line: slow, obvious, and ignorant of moefold.

Every function here treats *one group* and sees real tokens only: whoever calls drops the padding
first. Selection is done in plain Python numbers with loops over tokens and experts; the weights are
torch scalars, so that they carry gradients. Nothing is imported from the library, which is the
point: a routing that agrees with these functions agrees with the published pseudo-code.

Letters: n tokens of the group, d features, E experts, p slots per expert, c rows per expert.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

# Two scores closer than this are one score: the largest rounding difference between two ways of
# computing a score in float64 is some 1e-15, and scores that differ on purpose differ by far more.
DIGITS_OF_A_SCORE = 12


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    """L = X W, one dot product per pair: x [n, d], weight [E, d] -> [n, E]."""
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    logits = x.new_zeros(num_tokens, num_experts)
    for i in range(num_tokens):
        for k in range(num_experts):
            logits[i, k] = (x[i] * weight[k]).sum()
    return logits


def softmax_over_experts(logits: Tensor) -> Tensor:
    """g[i, k] = exp(L[i, k]) / sum_j exp(L[i, j]): every token's row sums to one."""
    gates = torch.zeros_like(logits)
    for i in range(logits.shape[0]):
        powers = torch.exp(logits[i] - logits[i].max().detach())
        gates[i] = powers / powers.sum()
    return gates


def softmax_over_tokens(logits: Tensor) -> Tensor:
    """q[i, k] = exp(L[i, k]) / sum_j exp(L[j, k]): every expert's column sums to one."""
    shares = torch.zeros_like(logits)
    for k in range(logits.shape[1]):
        powers = torch.exp(logits[:, k] - logits[:, k].max().detach())
        shares[:, k] = powers / powers.sum()
    return shares


def best_first(values: Sequence[float]) -> list[int]:
    """Indices from the largest value to the smallest; of equal values the lowest index first."""
    return sorted(range(len(values)), key=lambda i: (-round(values[i], DIGITS_OF_A_SCORE), i))


def keep(weights: Tensor, chosen: set[tuple[int, int]]) -> Tensor:
    """The weights of the chosen (token, expert) pairs, exactly 0 everywhere else."""
    kept = torch.zeros_like(weights)
    for i, k in chosen:
        kept[i, k] = weights[i, k]
    return kept


def divide_by_sum_over_chosen(weights: Tensor, chosen: set[tuple[int, int]]) -> Tensor:
    """A token's weights divided by the sum over the experts that took it; all 0 if nobody did.

    Komatsuzaki et al. 2023, *Sparse Upcycling*, arXiv 2212.05055.
    """
    normalised = torch.zeros_like(weights)
    for i in range(weights.shape[0]):
        experts = [k for j, k in sorted(chosen) if j == i]
        if not experts:
            continue
        total = torch.stack([weights[i, k] for k in experts]).sum()
        for k in experts:
            normalised[i, k] = weights[i, k] / total
    return normalised


def rows_of_an_expert(
    num_tokens: int, num_experts: int, factor: float, k: int = 1, convention: str = "moefold"
) -> int:
    """Capacity c, in exact arithmetic; never more than there are tokens.

    moefold: ceil(C n k / E). V-MoE: that, rounded up to a multiple of four. Flaxformer: C n / E
    rounded to the nearest integer, at least four, without the k. Expert choice has k = 1.
    """
    exact = Fraction(factor) * num_tokens / num_experts
    if convention == "moefold":
        capacity = ceil(exact * k)
    elif convention == "vmoe":
        capacity = 4 * ceil(Fraction(ceil(exact * k), 4))
    elif convention == "flaxformer":
        capacity = max(round(exact), 4)
    else:
        raise AssertionError(convention)
    return min(capacity, num_tokens)
