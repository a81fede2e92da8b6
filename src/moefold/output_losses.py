"""Auxiliary losses of what experts computed: functions of a routing and its rows, each a scalar.

They keep experts from becoming copies of each other, which no loss of a routing can see. A layer
adds them by name like any other loss (`MoEConfig(losses={"cka": 0.1})`). A record holds routings
and no rows, so `record.loss` cannot compute them: they only ride.

Shapes: `rows dim`, the experts' results in the order of the routing's rows. Padding has no row. A
soft routing has no two results of one token: its losses are 0. Spare rows, losers of a competition
and rows that were turned away count nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.registry import Registry
from moefold.routing import Routing, SparseRouting

OutputLoss = Callable[[Routing, Float[Tensor, "rows dim"]], Float[Tensor, ""]]

output_losses: Registry[OutputLoss] = Registry("output loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """Mean cosine of the results that one token gets from two of its experts, over all such pairs.

    It takes time linear in the rows: of unit vectors with sum S, the products of all pairs add up
    to `|S|^2 - number of vectors`.

    Source: Nguyen et al., *CompeteSMoE*, 2025 (diversity loss). The released code divides by `k^2`
    instead of the `k (k - 1)` pairs, and so by 4 instead of 2 where k is 2.

    Attributes:
        only_competing: count in passes in which experts competed, as published, and be 0 otherwise.
    """

    only_competing: bool = False

    def __call__(self, routing: Routing, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
        """The loss of one routing and its results."""
        if not isinstance(routing, SparseRouting):
            return rows.new_zeros(())
        if self.only_competing and routing.student is None:
            return rows.new_zeros(())
        counted = counted_rows(routing)
        unit = torch.nn.functional.normalize(_exact(rows), dim=-1) * counted.unsqueeze(1)
        tokens = routing.num_tokens
        total = unit.new_zeros(tokens, unit.shape[1]).index_add(0, routing.token_of_row, unit)
        number = unit.new_zeros(tokens).index_add(0, routing.token_of_row, counted.to(unit.dtype))
        pairs = (number * (number - 1)).sum()
        products = total.square().sum() - unit.square().sum()
        return (products / pairs.clamp_min(1)).to(_exact(rows).dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTokensCKA:
    """How alike the two experts that share most tokens treat these: CKA, if above a threshold.

    CKA (Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019) compares
    not two results but two geometries: which tokens come out near each other. It is 1 if one
    expert's results are the other's rotated, moved or scaled, and near 0 if they have nothing in
    common.

        K_ij = exp(-|x_i - x_j|^2 / (2 s^2)),  CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),
        HSIC(K, L) = sum of the products of K and L, both centred in rows and columns

    Source: Do et al., *SimSMoE*, 2024 (arXiv 2406.15883), where `sigma` is 0.8 or 0.9 and the
    threshold 0.3 to 0.7. There a learnt projection to about `num_experts` features comes first and
    `s` is `sigma` itself. Here the results are compared as they are, and `s` is `sigma` times the
    median distance, as Kornblith et al. have it: in the hundreds of features of a result all
    distances are far above 0.8, both kernels are then the identity, and CKA is 1 without gradient.

    Attributes:
        threshold: below it experts count as different, and the loss is 0.
        sigma: width of the kernel.
        width: what `sigma` is a multiple of: the `median` distance of two results of the same
            expert, or 1 (`absolute`).
        most_tokens: compare on so many shared tokens at most, spread evenly over the batch.
    """

    threshold: float = 0.5
    sigma: float = 0.8
    width: Literal["median", "absolute"] = "median"
    most_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; CKA lies between 0 and 1.")
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma is {self.sigma!r}; it must be a positive finite number.")
        if self.width not in ("median", "absolute"):
            raise ValueError(f"width is {self.width!r}; allowed: 'median', 'absolute'.")
        if self.most_tokens < 2:
            raise ValueError(f"most_tokens is {self.most_tokens!r}; CKA compares 2 tokens or more.")

    def __call__(self, routing: Routing, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
        """The loss of one routing and its results."""
        if not isinstance(routing, SparseRouting) or not rows.shape[0] or routing.num_experts < 2:
            return rows.new_zeros(())
        one, other, shared = self.most_alike(routing)
        token, real = _spread_over(shared, self.most_tokens)
        row_of = routing.by_pair(_numbers(routing).to(torch.float64)).long().flatten(0, 1)
        with torch.autocast(rows.device.type, enabled=False):
            left, right = (
                _exact(rows).index_select(0, row_of[token].index_select(1, expert).squeeze(1))
                for expert in (one.reshape(1), other.reshape(1))
            )
            value = cka(left, right, real, self.sigma, self.width)
        return torch.where(value > self.threshold, value, torch.zeros_like(value))

    def most_alike(
        self, routing: SparseRouting
    ) -> tuple[Int[Tensor, ""], Int[Tensor, ""], Bool[Tensor, " tokens"]]:
        """The two experts with most tokens in common, and these tokens; the first pair on a tie."""
        counted = counted_rows(routing).to(routing.weight_of_row.dtype)
        chosen = routing.by_pair(counted).detach().flatten(0, 1)
        together = (chosen.t() @ chosen).triu(1)
        pair = together.flatten().argmax()
        one = pair // routing.num_experts
        # Without any pair argmax is (0, 0): an expert shares nothing with itself.
        other = pair % routing.num_experts
        apart = one != other
        both = chosen.index_select(1, torch.stack([one, other])) > 0
        return one, other, both.all(1) & apart


def cka(
    left: Float[Tensor, "tokens dim"],
    right: Float[Tensor, "tokens dim"],
    real: Bool[Tensor, " tokens"],
    sigma: float,
    width: Literal["median", "absolute"] = "median",
) -> Float[Tensor, ""]:
    """Centred kernel alignment of two sets of results for the same tokens, see `SharedTokensCKA`.

    0 where either set has no geometry: fewer than two tokens, or one result for all of them.

    Args:
        left: what one expert made of each token.
        right: what the other made of it.
        real: which tokens count.
        sigma: width of the kernel.
        width: what `sigma` is a multiple of.
    """
    first, second = (_centred_kernel(x, real, sigma, width) for x in (left, right))
    own = first.square().sum() * second.square().sum()
    there = own > torch.finfo(own.dtype).tiny
    # Not a square root of 0, whose gradient is infinite.
    return torch.where(
        there, (first * second).sum() / torch.where(there, own, 1.0).sqrt(), torch.zeros_like(own)
    )


def _centred_kernel(
    x: Tensor, real: Tensor, sigma: float, width: str
) -> Float[Tensor, "tokens tokens"]:
    """`H K H` for the tokens that count, and zero elsewhere."""
    weight = real.to(x.dtype)
    count = weight.sum().clamp_min(1)
    # Distances do not care where zero is; from the mean their rounding is smallest.
    x = (x - (x * weight.unsqueeze(1)).sum(0) / count) * weight.unsqueeze(1)
    square = x.square().sum(1)
    distance = (square.unsqueeze(1) + square - 2 * x @ x.t()).clamp_min(0)
    scale = x.new_ones(()) if width == "absolute" else _median(distance, real, square.sum() / count)
    kernel = (-distance / (2 * sigma**2 * scale)).exp()
    pair = weight.unsqueeze(1) * weight
    kernel = kernel * pair
    mean = kernel.sum(1) / count
    centred = kernel - mean.unsqueeze(1) - mean + mean.sum() / count
    return centred * pair


def _median(distance: Tensor, real: Tensor, spread: Tensor) -> Float[Tensor, ""]:
    """Median squared distance of two different tokens; never less than rounding makes of zero."""
    pair = real.unsqueeze(1) & real & ~torch.eye(len(real), dtype=torch.bool, device=real.device)
    median = distance.masked_fill(~pair, torch.nan).nanmedian()
    least = (1e-6 * spread.detach()).clamp_min(1e-30)
    return torch.where(median > least, median, least)  # also where it is NaN: nobody to measure


def counted_rows(routing: SparseRouting) -> Bool[Tensor, " rows"]:
    """The rows that came back: not spare, and of a winner where experts competed."""
    real = routing.expert_of_row < routing.num_experts
    if routing.student is None or routing.wanted is None:
        return real
    return real & (routing.by_row(routing.wanted.to(routing.weight_of_row.dtype)) > 0)


def _numbers(routing: SparseRouting) -> Int[Tensor, " rows"]:
    return torch.arange(routing.token_of_row.shape[0], device=routing.token_of_row.device)


def _spread_over(
    shared: Bool[Tensor, " tokens"], most: int
) -> tuple[Int[Tensor, " some"], Bool[Tensor, " some"]]:
    """Up to `most` of the shared tokens, evenly spread, and which places are taken."""
    size = min(most, shared.shape[0])
    order = (~shared).to(torch.uint8).argsort(stable=True)
    count = shared.sum()
    place = torch.arange(size, device=shared.device)
    rank = torch.where(count > size, place * count // max(size, 1), place)
    return order[rank], place < count


def _exact(rows: Tensor) -> Tensor:
    """Half precision to float32: a cosine near 1 and a distance near 0 are what counts here."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


output_losses.register(
    "diversity", Diversity(), summary="Mean cosine of the results of one token's experts."
)
output_losses.register(
    "competing-diversity",
    Diversity(only_competing=True),
    summary="CompeteSMoE: the same of the winners, where experts competed.",
)
output_losses.register(
    "cka",
    SharedTokensCKA(),
    summary="SimSMoE: kernel alignment of the two experts that share most tokens, if above 0.5.",
)
