"""How a cost grows: the exponent of a power law through measured points.

    cost = c * x^a,  hence  log cost = log c + a log x,  fitted by least squares

The interval of `a` is Student's, from how far the points are off the line. A cost that is no power
of x (a constant part, say) shows as a wide one; what it says of a machine is what the points say.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from any table; past them, as good
# as the normal one.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
_NORMAL = 1.960


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw:
    """A fitted exponent.

    Attributes:
        exponent: `a`.
        low: lower end of its 95 % interval; None with two points, which leave nothing over.
        high: upper end.
        factor: `c`.
    """

    exponent: float
    low: float | None
    high: float | None
    factor: float

    def at(self, x: float) -> float:
        """The cost that the law gives."""
        return self.factor * x**self.exponent

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)


def fit_power(x: Sequence[float], cost: Sequence[float]) -> PowerLaw:
    """Fit a power law.

    Args:
        x: at least two different numbers above 0.
        cost: as many, above 0.

    Raises:
        ValueError: that is not so.
    """
    if len(x) != len(cost) or len(set(x)) < 2:
        raise ValueError(
            f"a power law needs two different x or more and a cost of each, not {len(set(x))} "
            f"and {len(cost)}"
        )
    if min(*x, *cost) <= 0:
        raise ValueError(f"a power law has no value {min(*x, *cost)}; leave it out")
    u, v = [math.log(one) for one in x], [math.log(one) for one in cost]
    mean_u, mean_v = math.fsum(u) / len(u), math.fsum(v) / len(v)
    spread = math.fsum((one - mean_u) ** 2 for one in u)
    exponent = math.fsum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    start = mean_v - exponent * mean_u
    over = len(u) - 2
    low = high = None
    if over:
        rest = math.fsum((b - start - exponent * a) ** 2 for a, b in zip(u, v, strict=True))
        student = _STUDENT[over - 1] if over <= len(_STUDENT) else _NORMAL
        half = student * math.sqrt(rest / over / spread)
        low, high = exponent - half, exponent + half
    return PowerLaw(exponent=exponent, low=low, high=high, factor=math.exp(start))


__all__ = ["PowerLaw", "fit_power"]
