"""Soft MoE: Puigcerver et al. 2024, *From Sparse to Soft Mixtures of Experts*, arXiv 2308.00951.

Algorithms 1 and 2. The length in the normalisation is sqrt(sum of squares + 1e-6), as in the
released code. Only the logits see normalised vectors; the slots average the tokens as they are.

Letters: n tokens of the group, d features, E experts, p slots per expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def normalise(vector: Tensor) -> Tensor:
    """v / |v|, safe at zero."""
    return vector * torch.rsqrt((vector * vector).sum() + 1e-6)


def soft_weights(x: Tensor, phi: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Dispatch weights D and combine weights C, both [n, E, p].

    D is a softmax over the tokens for each slot, C a softmax over all the slots for each token.
    """
    num_tokens, (_, num_experts, num_slots) = x.shape[0], phi.shape
    logits = x.new_zeros(num_tokens, num_experts, num_slots)
    for i in range(num_tokens):
        token = normalise(x[i])
        for k in range(num_experts):
            for slot in range(num_slots):
                logits[i, k, slot] = (token * (scale * normalise(phi[:, k, slot]))).sum()

    dispatch = torch.zeros_like(logits)
    for k in range(num_experts):
        for slot in range(num_slots):
            powers = torch.exp(logits[:, k, slot])
            dispatch[:, k, slot] = powers / powers.sum()

    combine = torch.zeros_like(logits)
    for i in range(num_tokens):
        powers = torch.exp(logits[i])
        combine[i] = powers / powers.sum()
    return dispatch, combine


def soft_layer(
    x: Tensor, dispatch: Tensor, combine: Tensor, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Y = C f(D^T X), [n, d]: every slot is a mean of tokens, every output a mean of slots."""
    num_tokens, num_experts, num_slots = dispatch.shape
    y = [x.new_zeros(x.shape[1]) for _ in range(num_tokens)]
    for k in range(num_experts):
        for slot in range(num_slots):
            mixed = x.new_zeros(x.shape[1])
            for i in range(num_tokens):
                mixed = mixed + dispatch[i, k, slot] * x[i]
            processed = expert(k, mixed)
            for i in range(num_tokens):
                y[i] = y[i] + combine[i, k, slot] * processed
    return torch.stack(y)
