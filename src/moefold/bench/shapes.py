"""The layers that are timed: a table of shapes, and what belongs to each.

The dense MLP that a mixture is compared with has the same *active* width: as many hidden numbers
for each token as the experts it goes to have together.

    active width = rows / tokens * width
    rows         = k * tokens             token choice
                   capacity_factor * tokens    expert choice
                   experts * slots * sequences soft
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["token-choice", "expert-choice", "soft"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One layer.

    Attributes:
        name: what tables call it.
        tokens: tokens of one pass, over all sequences.
        sequences: how many sequences they come in; tokens of one compete or mix with each other.
        dim: width of a token.
        width: hidden width of one expert.
        experts: how many.
        router: who chooses.
        k: experts of a token, where tokens choose.
        capacity_factor: rows for each token on average, where experts choose.
        slots: rows of an expert in each sequence, for a soft mixture.
        gated: SwiGLU experts instead of plain ones.
        device: where the shape is at home.
    """

    name: str
    tokens: int = 2048
    sequences: int = 1
    dim: int = 512
    width: int = 1024
    experts: int = 8
    router: Kind = "token-choice"
    k: int = 2
    capacity_factor: float = 1.0
    slots: int = 1
    gated: bool = True
    device: Device = "cpu"

    def __post_init__(self) -> None:
        for name in ("tokens", "sequences", "dim", "width", "experts", "k", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"shape {self.name!r}: {name}={getattr(self, name)} is not possible; "
                    f"it must be at least 1"
                )
        if self.capacity_factor <= 0:
            raise ValueError(
                f"shape {self.name!r}: capacity_factor={self.capacity_factor} gives no rows; "
                f"it must be above 0"
            )
        if self.tokens % self.sequences:
            raise ValueError(
                f"shape {self.name!r}: {self.tokens} tokens do not make {self.sequences} sequences "
                f"of one length; choose a multiple"
            )
        if self.router == "token-choice" and self.k > self.experts:
            raise ValueError(
                f"shape {self.name!r}: k={self.k} experts of a token, but there are "
                f"{self.experts}; choose k up to that"
            )

    @property
    def rows(self) -> int:
        """Rows of all experts together."""
        if self.router == "token-choice":
            return self.k * self.tokens
        if self.router == "expert-choice":
            return round(self.capacity_factor * self.tokens)
        return self.experts * self.slots * self.sequences

    @property
    def active_width(self) -> int:
        """Hidden width of the dense MLP with as much arithmetic."""
        return max(1, round(self.rows * self.width / self.tokens))

    @property
    def settings(self) -> dict[str, Any]:
        """Of its router."""
        if self.router == "token-choice":
            return {"k": self.k, "renormalize": True}
        if self.router == "expert-choice":
            return {"capacity_factor": self.capacity_factor}
        return {"slots": self.slots}

    @property
    def flops(self) -> int:
        """Of the experts' products in a forward pass; a backward pass has twice as many."""
        return 2 * self.rows * self.dim * self.width * (3 if self.gated else 2)

    @property
    def text(self) -> str:
        """In words, for tables."""
        choice = {
            "token-choice": f"top-{self.k}",
            "expert-choice": f"expert choice, C={self.capacity_factor:g}",
            "soft": f"soft, {self.slots} slots each",
        }[self.router]
        tokens = f"{self.tokens}"
        if self.sequences > 1:
            tokens = f"{self.sequences} x {self.tokens // self.sequences}"
        kind = "gated" if self.gated else "plain"
        return (
            f"{self.experts} {kind} experts of {self.dim} x {self.width}, {choice}, {tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it, with what follows from it."""
        return {**asdict(self), "rows": self.rows, "active_width": self.active_width}


def from_dict(data: Mapping[str, Any]) -> Shape:
    """The inverse of `Shape.to_dict`."""
    given = {name: value for name, value in data.items() if name in Shape.__dataclass_fields__}
    return Shape(**given)


def _sonic(model: str, tokens: int, dim: int, *finest: int) -> list[Shape]:
    """The three settings of a model in SonicMoE's figure 14, from fine to coarse experts."""
    width, experts, k = finest
    return [
        Shape(
            name=f"{model}-{width << i}",
            tokens=tokens,
            dim=dim,
            width=width << i,
            experts=experts >> i,
            k=k >> i,
            device="cuda",
        )
        for i in range(3)
    ]


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="8x2"),
        Shape(name="64x8", width=256, experts=64, k=8),
        Shape(
            name="vit-b", dim=768, width=3072, experts=32, router="expert-choice", k=1, gated=False
        ),
        Shape(
            name="soft",
            sequences=8,
            dim=768,
            width=3072,
            experts=32,
            router="soft",
            k=1,
            slots=8,
            gated=False,
        ),
        # arXiv:2512.14080, figure 14. The chart does not repeat tokens and dim for 120B; they are
        # taken to be those of 30B.
        *_sonic("7b", 24576, 1536, 256, 128, 8),
        *_sonic("30b", 32768, 4096, 256, 256, 16),
        *_sonic("120b", 32768, 4096, 512, 256, 16),
    )
}
"""Every named shape."""


def shapes_of(device: str) -> list[Shape]:
    """Those at home on a kind of device."""
    return [shape for shape in SHAPES.values() if shape.device == device]


__all__ = ["SHAPES", "Shape", "from_dict", "shapes_of"]
