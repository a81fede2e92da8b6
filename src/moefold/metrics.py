"""What a routing looks like: statistics that say whether experts are used, and how.

Shapes: a routing in, a float, ` experts` or `experts experts` out. Padding counts in none of them.
Soft routings have a load (how much of the tokens' mass returns from each expert) but no choice:
nothing is dropped, nobody is uncovered.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.routing import Routing, SoftRouting, SparseRouting


@torch.no_grad()
def load(routing: Routing) -> Float[Tensor, " experts"]:
    """Share of the work of each expert; sums to 1 (all zero without rows).

    Sparse: share of rows. Soft: share of the combine weight of all real tokens.
    """
    if isinstance(routing, SoftRouting):
        counts = routing.combine_weight.sum((0, 1, 3))
    else:
        counts = routing.rows_per_expert.to(routing.weight_of_row.dtype)
    return counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)


def max_violation(routing: Routing) -> float:
    """MaxVio: the largest load over the mean load, minus 1; 0 at balance.

    Source: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for MoE*, 2024, equation 4.
    """
    share = load(routing)
    return float(share.max() * len(share) - 1) if share.sum() > 0 else 0.0


def dead_experts(routing: Routing) -> int:
    """Number of experts without any work."""
    return int((load(routing) == 0).sum())


@torch.no_grad()
def entropy(routing: Routing) -> float:
    """Mean entropy of the softmax over experts, relative to log E: 1 undecided, 0 certain."""
    if routing.logits is None or routing.num_experts == 1:
        return 0.0
    logits = _logits_of_real(routing)
    if len(logits) == 0:
        return 0.0
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean()) / math.log(logits.shape[-1])


@torch.no_grad()
def margin(routing: Routing) -> float:
    """Mean distance between the best and the second-best score of a token (winner and rival)."""
    if not isinstance(routing, SparseRouting) or routing.scores is None or routing.num_experts < 2:
        return 0.0
    scores = routing.scores[_real(routing)]
    if len(scores) == 0:
        return 0.0
    first, second = scores.topk(2, -1).values.unbind(-1)
    return float((first - second).mean())


@torch.no_grad()
def experts_per_token(routing: Routing) -> float:
    """Mean number of rows of a real token (of slots it mixes, if soft)."""
    real = int(_real(routing).sum())
    if isinstance(routing, SoftRouting):
        return float(routing.num_experts * routing.slots)
    return int(routing.rows_per_expert.sum()) / max(real, 1)


@torch.no_grad()
def uncovered(routing: Routing) -> float:
    """Share of real tokens without any row."""
    if isinstance(routing, SoftRouting):
        return 0.0
    real = _real(routing)
    return int((real & ~routing.chosen.any(-1)).sum()) / max(int(real.sum()), 1)


@torch.no_grad()
def dropped(routing: Routing) -> float:
    """Share of the pairs asked for that found no room."""
    if isinstance(routing, SoftRouting) or routing.wanted is None:
        return 0.0
    asked = int(routing.wanted.sum())
    return int((routing.wanted & ~routing.chosen).sum()) / asked if asked else 0.0


@torch.no_grad()
def routed_mass(routing: Routing) -> float:
    """Mean sum of a real token's combine weights; 1 if a mean of experts comes back whole."""
    real = max(int(_real(routing).sum()), 1)
    if isinstance(routing, SoftRouting):
        return float(routing.combine_weight.sum() / real)
    return float(routing.weight_of_row.sum() / real)


@torch.no_grad()
def coactivation(routing: Routing) -> Float[Tensor, "experts experts"]:
    """Of the tokens of expert i (row), the share that expert j (column) has too; 1 on the diagonal.

    Rows of experts without tokens are zero.
    """
    if isinstance(routing, SoftRouting):
        return torch.ones(routing.num_experts, routing.num_experts)
    chosen = routing.chosen.flatten(0, 1).float()
    together = chosen.t() @ chosen
    return together / together.diagonal().unsqueeze(1).clamp_min(1)


SCALARS = {
    "max_violation": max_violation,
    "dead_experts": dead_experts,
    "entropy": entropy,
    "margin": margin,
    "experts_per_token": experts_per_token,
    "uncovered": uncovered,
    "dropped": dropped,
    "routed_mass": routed_mass,
}


def metrics(routing: Routing) -> dict[str, float]:
    """Every scalar metric of a routing, by name."""
    return {name: float(metric(routing)) for name, metric in SCALARS.items()}


def _real(routing: Routing) -> Bool[Tensor, "batch tokens"]:
    if routing.mask is not None:
        return routing.mask
    shape = routing.grouping.batch, routing.grouping.tokens
    return torch.ones(shape, dtype=torch.bool, device=routing.rows_per_expert.device)


def _logits_of_real(routing: Routing) -> Tensor:
    assert routing.logits is not None, "callers check it"
    if isinstance(routing, SoftRouting):
        # How decided a token is between experts: the mass of an expert is that of its slots.
        of_expert = routing.grouping.merge(routing.logits.logsumexp(-1))
        return of_expert[_real(routing)]
    return routing.logits[_real(routing)]
