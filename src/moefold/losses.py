"""Auxiliary losses: functions of a routing, each a scalar.

Shapes: `batch tokens experts`; competition for `importance` and `load` is within a group, as
`[groups, members, experts]`. Padding counts in none of them. A routing without logits or without
choice (hash, random, soft) has nothing to balance: its losses are 0.

To combine: sum over sites (V-MoE). `ops.ride` lets a loss ride on the layer's output, so that an
ordinary training loop needs no change; it then counts once for each forward pass, whereas
`record.loss` takes the mean over passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.ops.select import rank
from moefold.registry import Registry
from moefold.routing import Routing, SparseRouting

Loss = Callable[[Routing], Float[Tensor, ""]]

losses: Registry[Loss] = Registry("loss")


@losses.register("balance", summary="Switch/GShard: share of rows x mean probability.")
def balance(routing: Routing) -> Float[Tensor, ""]:
    """`E * sum_e f_e P_e` over all real tokens of the batch; 1 at perfect balance, for any k.

    `f_e` is the share of all pairs asked for (before capacity) that ask for expert e, `P_e` the
    mean softmax probability of e.

    Source: Fedus et al., *Switch Transformers*, 2022, equation 4, with counts divided by k as in
    Megatron-LM (flaxformer does not divide: its value at balance is k).
    """
    if not has_choice(routing):
        return zero(routing)
    if routing.wanted is None:
        counts = routing.rows_per_expert  # every pair asked for has a row
    else:
        counts = (routing.wanted & _real(routing).unsqueeze(-1)).sum((0, 1))
    probability = _logits(routing).softmax(-1).flatten(0, 1).unsqueeze(0)
    real = None if routing.mask is None else routing.mask.flatten().unsqueeze(0)
    return _agreement(probability, counts.unsqueeze(0), real)


@losses.register("sequence-balance", summary="DeepSeek: the balance loss within each sequence.")
def sequence_balance(routing: Routing) -> Float[Tensor, ""]:
    """The balance loss of every sequence by itself, averaged; 1 at perfect balance.

    Probabilities are the scores that competed, divided by their sum over experts, as DeepSeek-V3
    does with its sigmoids. What is counted are the best scores of a token, as many as it asked for:
    a bias that only chooses is left out.

    Source: DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024, equations 17-20.
    """
    if not has_choice(routing) or routing.scores is None:
        return zero(routing)
    scores = routing.scores
    total = scores.sum(-1, keepdim=True)
    probability = scores / torch.where(total > 0, total, torch.ones_like(total))
    best = rank(scores) < _asked(routing).sum(-1, keepdim=True)
    if routing.mask is not None:
        best = best & routing.mask.unsqueeze(-1)
    return _agreement(probability, best.sum(1), routing.mask)


@losses.register(
    "importance", summary="V-MoE: squared variation of the experts' total probability."
)
def importance(routing: Routing) -> Float[Tensor, ""]:
    """`(std / mean)^2` over experts of the summed softmax of the clean logits; 0 at balance.

    Source: Riquelme et al., *Scaling Vision with Sparse Mixture of Experts*, 2021, appendix A
    (population standard deviation, per group, averaged over groups).
    """
    if not has_choice(routing):
        return zero(routing)
    real = routing.grouping.split(_real(routing))
    probability = routing.grouping.split(_logits(routing)).softmax(-1)
    return _mean_of_groups(_variation((probability * real.unsqueeze(-1)).sum(1)), real)


@losses.register("load", summary="V-MoE: squared variation of the experts' smoothed load.")
def load(routing: Routing) -> Float[Tensor, ""]:
    """`(std / mean)^2` over experts of the probability to be chosen under fresh noise.

    With `tau` the k-th largest noisy logit of a token and `sigma` the noise's standard deviation,
    expert e is chosen with probability `1 - Phi((tau - logit_e) / sigma)`.

    Source: Riquelme et al., 2021, appendix A.

    Raises:
        ValueError: the routing was made without noise, for which this loss is not defined.
    """
    if not has_choice(routing):
        return zero(routing)
    if routing.noisy_logits is None:
        raise ValueError(
            "the load loss is defined for noisy routing only, but noise_std was 0 in this pass; "
            "train with noise_std=1.0, or use 'balance' or 'importance'."
        )
    noisy, clean = routing.noisy_logits, _logits(routing)
    k = _asked(routing).sum(-1, keepdim=True).clamp_min(1)
    tau = noisy.sort(dim=-1, descending=True).values.gather(-1, k - 1)
    chance = 1 - torch.special.ndtr((tau - clean) / routing.noise_std)
    real = routing.grouping.split(_real(routing))
    mass = (routing.grouping.split(chance) * real.unsqueeze(-1)).sum(1)
    return _mean_of_groups(_variation(mass), real)


@losses.register("z", summary="ST-MoE: mean squared logsumexp of the logits, keeps them small.")
def z(routing: Routing) -> Float[Tensor, ""]:
    """Mean over real tokens of `logsumexp(logits)^2`.

    Source: Zoph et al., *ST-MoE*, 2022, equation 5.
    """
    if not has_choice(routing):
        return zero(routing)
    real = _real(routing)
    return (_logits(routing).logsumexp(-1).square() * real).sum() / real.sum().clamp_min(1)


@losses.register(
    "similarity", summary="Expert Race: pairs of experts that fire together and alike."
)
def similarity(routing: Routing) -> Float[Tensor, ""]:
    """Weighted sum of `P^T P`, the weights being how often two experts are chosen together.

    With P the softmax of the logits and M the chosen pairs over all real tokens, `P' = P^T P` and
    `M' = M^T M`; the loss is `sum(W * P') / E`, where W is M' scaled to a mean of 1 on the diagonal
    and off it. It grows with the number of tokens; the authors' coefficient is small accordingly.

    Source: Yuan et al., *Expert Race*, 2025, equations 9-11, as restated by a re-implementation.
    """
    if not has_choice(routing):
        return zero(routing)
    experts = routing.num_experts
    real = _real(routing).flatten().unsqueeze(-1)
    probability = _logits(routing).softmax(-1).flatten(0, 1) * real
    chosen = routing.chosen.flatten(0, 1).to(probability.dtype)
    together = chosen.t() @ chosen
    own = torch.eye(experts, device=together.device, dtype=torch.bool)
    on, off = together * own, together * ~own
    weight = on * experts / _at_least_tiny(on.sum())
    weight = weight + off * (experts**2 - experts) / _at_least_tiny(off.sum())
    return (weight * (probability.t() @ probability)).sum() / experts


@losses.register("l1", summary="ReMoE: load-weighted L1 of the scores.")
def l1(routing: Routing) -> Float[Tensor, ""]:
    """`strength * sum_e f_e * mean_t score_te`; `f_e = E * (share of real tokens that take e)`.

    The router's strength already contains the paper's `1 / k`; it is 1 where a router states none.

    Source: Wang et al., *ReMoE*, 2024, equations 8-9.
    """
    if not has_choice(routing) or routing.scores is None:
        return zero(routing)
    real = _real(routing)
    tokens = real.sum().clamp_min(1)
    share = (_asked(routing) & real.unsqueeze(-1)).sum((0, 1)).to(routing.scores.dtype) / tokens
    mean = (routing.scores * real.unsqueeze(-1)).sum((0, 1)) / tokens
    loss = routing.num_experts * (share * mean).sum()
    return loss if routing.l1_strength is None else loss * routing.l1_strength


@losses.register(
    "membership", summary="Mixture-of-Depths: a predictor learns which pairs the group chooses."
)
def membership(routing: Routing) -> Float[Tensor, ""]:
    """Mean over real pairs of the binary cross-entropy of the predictor with what was chosen.

    It has a gradient for the predictor only; 0 where a router has none.

    Source: Raposo et al., *Mixture-of-Depths*, 2024, section 3.5.
    """
    if not has_choice(routing) or routing.predicted is None:
        return zero(routing)
    real = _real(routing).unsqueeze(-1).expand_as(routing.predicted)
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        routing.predicted, routing.chosen.to(routing.predicted.dtype), reduction="none"
    )
    return (each * real).sum() / real.sum().clamp_min(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foresight:
    """Squared distance of the gate's softmax from that of the affinities it learns to foresee.

    Mean over real tokens and experts; plus, times `theta`, the same over the winners only. The
    affinities are the target: they get no gradient. 0 in passes in which no experts competed.

    Source: Nguyen et al., *CompeteSMoE*, 2025; `theta` is `router_theta` of the released code, 0.1
    there by default and 0.2 in its language models.

    Attributes:
        theta: how much the winners count besides.
    """

    theta: float = 0.0

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss of one routing."""
        if not has_choice(routing) or routing.student is None or routing.decide is not None:
            return zero(routing)
        target = _logits(routing).softmax(-1).detach()
        square = (routing.student.softmax(-1) - target).square()
        real = _real(routing).unsqueeze(-1).expand_as(square)
        loss = _mean_where(square, real)
        return loss + self.theta * _mean_where(square, _asked(routing) & real)


losses.register(
    "competition", Foresight(), summary="CompeteSMoE: a gate learns to foresee whose result wins."
)
losses.register(
    "competition-hybrid",
    Foresight(theta=0.1),
    summary="CompeteSMoE: the same, with the winners counted once more.",
)


def has_choice(routing: Routing) -> TypeGuard[SparseRouting]:
    """Whether there is anything to balance: a sparse routing made from logits."""
    return isinstance(routing, SparseRouting) and routing.logits is not None


def zero(routing: Routing) -> Float[Tensor, ""]:
    """A loss of nothing."""
    if isinstance(routing, SparseRouting):
        return routing.weight_of_row.new_zeros(())
    made_of = routing.combine_weight if routing.logits is None else routing.logits
    return made_of.new_zeros(())


def _logits(routing: SparseRouting) -> Tensor:
    assert routing.logits is not None, "callers check has_choice"
    return routing.logits


def _real(routing: SparseRouting) -> Bool[Tensor, "batch tokens"]:
    if routing.mask is not None:
        return routing.mask
    return _logits(routing).new_ones(_logits(routing).shape[:2], dtype=torch.bool)


def _asked(routing: SparseRouting) -> Bool[Tensor, "batch tokens experts"]:
    return routing.chosen if routing.wanted is None else routing.wanted


def _agreement(
    probability: Float[Tensor, "sets tokens experts"],
    asked: Int[Tensor, "sets experts"],
    real: Bool[Tensor, "sets tokens"] | None,
) -> Float[Tensor, ""]:
    """`E * sum_e f_e P_e` within each set of tokens, averaged over the sets that have any."""
    sets, tokens, experts = probability.shape
    counts = asked.to(probability.dtype)
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    if real is None:  # fewer steps: around a few tokens each costs more than what it computes
        return (share * probability.sum(1)).sum() * (experts / max(tokens * sets, 1))
    counted = real.sum(1, keepdim=True).clamp_min(1)
    mean = (probability * real.unsqueeze(-1)).sum(1) / counted
    return _mean_of_groups(experts * (share * mean).sum(-1), real)


def _variation(mass: Float[Tensor, "groups experts"]) -> Float[Tensor, " groups"]:
    mean = mass.mean(-1)
    spread = (mass - mean.unsqueeze(-1)).square().mean(-1)
    return spread / _at_least_tiny(mean.square())


def _mean_where(value: Tensor, counted: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    return (value * counted).sum() / counted.sum().clamp_min(1)


def _mean_of_groups(
    value: Float[Tensor, " groups"], real: Bool[Tensor, "groups members"]
) -> Float[Tensor, ""]:
    counted = real.any(1)
    return (value * counted).sum() / counted.sum().clamp_min(1)


def _at_least_tiny(tensor: Tensor) -> Tensor:
    return tensor.clamp_min(torch.finfo(tensor.dtype).tiny)
