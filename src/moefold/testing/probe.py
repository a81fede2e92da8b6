"""What the router checks share: batches, a toy layer around a router, and pictures of a routing.

Shapes: `batch tokens dim` tokens; a portrait is `batch tokens maps experts slots`, where maps are
dispatch and combine, and a sparse routing has one slot.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import jaxtyping
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.record import AbstractRouted
from moefold.routers import AbstractRouter
from moefold.routing import Group, Grouping, Routing, SoftRouting, SparseRouting
from moefold.testing.contract import from_seed

# In float64 the checks compare numbers of order 1 that come of a few hundred operations: rounding
# is below 1e-12, and what a mistake changes is above 1e-4.
CLOSE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What a router is given: good input, and bad input too, so that shapes are not annotated."""

    x: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None

    def with_others(self, where: Bool[Tensor, "batch tokens"], scale: float = 1.0) -> "Batch":
        """The same batch with other tokens in some places."""
        fresh = torch.randn_like(self.x) * scale
        ids = None if self.ids is None else torch.where(where, self.ids + 7, self.ids)
        return replace(self, x=torch.where(where.unsqueeze(-1), fresh, self.x), ids=ids)

    def regrouped(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor `[batch, tokens, ...]` passed through `move`."""
        return replace(
            self,
            x=move(self.x),
            mask=None if self.mask is None else move(self.mask),
            ids=None if self.ids is None else move(self.ids),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCase:
    """A router to be checked, and the sizes to check it at.

    Attributes:
        make: builds a new one for `dim` and `num_experts`.
        dim: width of a token; odd and unlike `num_experts`, so that dims cannot be mixed up.
        num_experts: number of experts.
        group: which tokens compete.
        ids: whether the router is given token ids.
        compile: whether to run the check that compiles.
        device: where to run.
    """

    make: Callable[[int, int], AbstractRouter]
    dim: int
    num_experts: int
    group: Group = "sequence"
    ids: bool = False
    compile: bool = False
    device: str = "cpu"

    def router(
        self, *, training: bool = False, dtype: torch.dtype = torch.float64
    ) -> AbstractRouter:
        """A new router, the same on every call; one that adapts has adapted once."""
        with from_seed(0), torch.no_grad():
            router = self.make(self.dim, self.num_experts).to(self.device, dtype)
            router.update([route(router.train(), self.batch(2, 6, dtype=dtype))])
        return router.train(training)

    def batch(
        self, batch: int, tokens: int, *, seed: int = 1, dtype: torch.dtype = torch.float64
    ) -> Batch:
        """Random tokens; as many more as make the router's groups come out even."""
        if isinstance(self.group, int):
            tokens = -(-tokens // self.group) * self.group
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, tokens, self.dim, generator=generator, dtype=torch.float64)
        ids = None
        if self.ids:
            ids = torch.randint(1000, (batch, tokens), generator=generator).to(self.device)
        return Batch(x=x.to(self.device, dtype), ids=ids)

    def batches(self) -> Iterator[Batch]:
        """A few batches of odd and even sizes, some with padding at the end or in between."""
        yield self.batch(3, 7)
        padded = self.batch(3, 8, seed=2)
        yield replace(padded, mask=ragged(padded.x, (1.0, 0.6, 0.0)))
        holes = self.batch(2, 9, seed=3)
        yield replace(holes, mask=torch.rand(holes.x.shape[:2], device=self.device) < 0.6)


def ragged(x: Tensor, shares: tuple[float, ...]) -> Bool[Tensor, "batch tokens"]:
    """A mask with the first tokens of every sequence: so many of them as its share says."""
    lengths = torch.tensor([math.ceil(share * x.shape[1]) for share in shares], device=x.device)
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)


def route(router: AbstractRouter, batch: Batch, *, seed: int = 0) -> Routing:
    """Route a batch, from a fixed random state: noise is the same in every call."""
    given = (batch.x, batch.mask) if batch.ids is None else (batch.x, batch.mask, batch.ids)
    with from_seed(seed):
        return router(*given)


def toy_experts(routing: Routing, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Compute rows with experts that differ from each other, one matrix each."""
    shape = routing.num_experts, rows.shape[1], rows.shape[1]
    # Numbers without a pattern but for their formula: a graph cannot hold a random generator.
    numbers = torch.arange(math.prod(shape), dtype=torch.float64, device=rows.device)
    matrices = torch.cos(numbers.square() + 1.0).reshape(shape).to(rows)
    # A spare row belongs to no expert; any will do, because its weight is zero.
    of_row = matrices[routing.expert_of_row.clamp_max(routing.num_experts - 1)]
    return torch.tanh(torch.einsum("rd,rdf->rf", rows, of_row))


def output(routing: Routing, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
    """What a layer with toy experts returns for this routing, `[batch, tokens, dim]`."""
    rows = toy_experts(routing, routing.dispatch(x))
    return routing.settled(rows).combine(rows)


@final
class ToyLayer(AbstractRouted):
    """A layer whose routings can be recorded, with toy experts."""

    def forward(self, batch: Batch, x: Tensor) -> Tensor:
        """Route `x` in place of the tokens of the batch, without touching the random state."""
        given = (x, batch.mask) if batch.ids is None else (x, batch.mask, batch.ids)
        routing = self.router(*given)
        rows = toy_experts(routing, routing.dispatch(x))
        routing = routing.settled(rows)
        self.hand_over(routing)
        return routing.combine(rows)


def portrait(routing: Routing) -> Float[Tensor, "batch tokens maps experts slots"]:
    """Both maps of a routing, seen from its tokens."""
    if isinstance(routing, SoftRouting):
        maps = torch.stack([routing.dispatch_weight, routing.combine_weight], 2)
        return routing.grouping.merge(maps)
    return torch.stack([routing.chosen.to(routing.weights), routing.weights], 2).unsqueeze(-1)


def combine_weight(routing: Routing) -> Tensor:
    """The combine weights as the routing holds them."""
    return routing.weight_of_row if isinstance(routing, SparseRouting) else routing.combine_weight


def assert_close(got: Tensor, want: Tensor, what: str, tolerance: float = CLOSE) -> None:
    """Raise with a sentence that says what differs, where, and by how much."""
    assert got.shape == want.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)}"
    gap = (got - want).abs()
    limit = tolerance * (1 + want.abs())
    # Written so that NaN, which compares false with everything, is too far.
    far = ~(gap <= limit)
    if far.any():
        where = tuple(far.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(far.sum())} of {far.numel()} numbers differ, first at {where}: "
            f"{got[where].item():.6g} instead of {want[where].item():.6g} (tolerance "
            f"{tolerance:.1g})"
        )


def same_routing(got: Routing, want: Routing, what: str, tolerance: float = CLOSE) -> None:
    """Raise unless two routings choose the same pairs with the same weights."""
    assert_close(portrait(got), portrait(want), what, tolerance)


def group_of_token(grouping: Grouping, device: str) -> Int[Tensor, "batch tokens"]:
    """Number of the group that every token is in."""
    number = torch.arange(grouping.groups, device=device).unsqueeze(1)
    return grouping.merge(number.expand(grouping.groups, grouping.members))


@contextmanager
def untyped() -> Iterator[None]:
    """Switch jaxtyping's checks off: where they are on, they see bad input before the router."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
