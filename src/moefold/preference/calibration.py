"""Whether probabilities are frequencies: a temperature that makes them so, and a diagram of it.

Shapes: `pairs` of log-odds.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def fit_temperature(
    log_odds: Float[Tensor, " pairs"], weight: Float[Tensor, " pairs"] | None = None
) -> float:
    """The temperature T by which sigmoid(z / T) gives the held-out pairs the most probability.

    One number, which changes no order (Guo et al., *On Calibration of Modern Neural Networks*,
    2017). The loss is convex in 1/T, so its minimum is found by bisection of its slope.

    Args:
        log_odds: of known pairs, the better candidate first.
        weight: what each pair counts; those of none are as if they were not there.

    Raises:
        ValueError: there are no pairs, or all are in the right order, so that no finite temperature
            is best.
    """
    z = log_odds.detach().double()
    w = torch.ones_like(z) if weight is None else weight.double()
    z, w = z[w > 0], w[w > 0]
    if not len(z):
        raise ValueError("there are no pairs to calibrate by; give held-out groups with a choice")
    if bool((z >= 0).all()) or bool((z <= 0).all()):
        which = "right" if bool((z >= 0).all()) else "wrong"
        raise ValueError(
            f"all {len(z)} pairs are in the {which} order, so that no temperature is best; give "
            f"more groups that were not trained on"
        )

    def slope(log_scale: float) -> float:
        scale = torch.tensor(log_scale, dtype=torch.float64).exp()
        return float(-(w * z * (-scale * z).sigmoid()).sum())

    low, high = -30.0, 30.0  # of log 1/T
    if slope(low) >= 0:  # pairs are better told apart the other way round, or by nothing
        return float(torch.tensor(-low).exp())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(torch.tensor(-low, dtype=torch.float64).exp())


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reliability:
    """How often pairs told with a probability came out so.

    Attributes:
        probability: mean of each bin, for the candidate that is held to be better.
        frequency: how often it was.
        count: pairs in each bin.
        error: expected calibration error, mean |probability - frequency| over pairs.
        log_loss: mean -log of the probability of what came out, in nats.
    """

    probability: Float[Tensor, " bins"]
    frequency: Float[Tensor, " bins"]
    count: Int[Tensor, " bins"]
    error: float
    log_loss: float


def reliability(
    log_odds: Float[Tensor, " pairs"], *, temperature: float = 1.0, bins: int = 10
) -> Reliability:
    """The diagram of known pairs, in bins of equal width from 1/2 to 1.

    Each pair stands once, under the candidate that is held to be better.

    Args:
        log_odds: of known pairs, the better candidate first.
        temperature: log-odds are divided by it.
        bins: at most; empty ones are left out.

    Raises:
        ValueError: no pairs, no bins, or a temperature that is not positive.
    """
    if not len(log_odds) or bins < 1 or not temperature > 0:
        raise ValueError(
            f"{len(log_odds)} pairs, {bins} bins, temperature {temperature}: each must be positive"
        )
    z = log_odds.detach().double() / temperature
    told, right = z.abs().sigmoid(), (z > 0).double() + (z == 0).double() / 2
    place = ((told - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = place.bincount(minlength=bins)
    kept = count > 0
    sums = torch.zeros(2, bins, dtype=torch.float64, device=z.device)
    sums.index_add_(1, place, torch.stack([told, right]))
    probability, frequency = (sums / count.clamp_min(1))[:, kept]
    gap = (probability - frequency).abs() * count[kept]
    return Reliability(
        probability=probability,
        frequency=frequency,
        count=count[kept],
        error=float(gap.sum() / len(z)),
        log_loss=float(functional.softplus(-z).mean()),
    )
