"""Which layers' experts compete in which training step (CompeteSMoE), drawn before training.

    schedule = CompetitionSchedule(model, steps=1000, warmup=0.05, most=2)
    for batch in batches:
        loss(model(batch)).backward()
        optimizer.step()
        schedule.step()

All forward passes of one step, repeated and accumulated ones too, then agree, and so do the
processes of a distributed run, whose schedules are drawn from the same seed.

Shapes: `table [sites, steps]`.
"""

from typing import Any, final

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moefold.record import AbstractRouted
from moefold.routers.base import check_at_least_zero, check_positive
from moefold.routers.sparse import AbstractRecipeRouter


@final
class CompetitionSchedule:
    """Decides, step by step, in which layers experts compete.

    Each layer draws each step after the warm-up with its router's `rate`. A draw that falls on a
    step in which `most` other layers compete already moves to the nearest earlier step with room,
    or, if there is none, to the nearest later one.

    Source: Nguyen et al., *CompeteSMoE*, 2025, released code (`max_compete_in_iter`).

    Attributes:
        table: who competes when.
        sites: the layers, in the order of the table.
        now: the step that the model is set to; `steps` once training is over.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        warmup: float = 0.05,
        most: int | None = 2,
        seed: int = 0,
    ) -> None:
        """Draw the table and set the model to its first step.

        Args:
            model: has layers whose router is `compete`.
            steps: optimiser steps of the whole training.
            warmup: share of them at the beginning in which nobody competes.
            most: layers that compete in the same step; None for any number.
            seed: of the draws.

        Raises:
            ValueError: no such layer; a value out of range.
        """
        check_positive("steps", steps)
        check_at_least_zero("warmup", warmup)
        if warmup >= 1:
            raise ValueError(f"warmup is {warmup!r}; it is a share of the steps, below 1.")
        if most is not None:
            check_positive("most", most)
        self._routers = _competing(model)
        if not self._routers:
            raise ValueError(
                f"{type(model).__name__} has no layer in which experts could compete; make it with "
                "router='compete' (moefold.routers.config('compete', k=2, rate=0.07))."
            )
        self.sites = tuple(self._routers)
        rates = [_rate(router) for router in self._routers.values()]
        self.table = _drawn(rates, steps, int(warmup * steps), most, seed)
        self.now = 0
        self._set()

    def step(self) -> None:
        """Set the model to the next step; after the last one nobody competes.

        Raises:
            ValueError: the schedule has come to its end.
        """
        steps = self.table.shape[1]
        if self.now >= steps:
            raise ValueError(
                f"the schedule was drawn for {steps} steps, and they are over; make it with the "
                "number of steps of the whole training."
            )
        self.now += 1
        self._set()

    def close(self) -> None:
        """Let every router draw by itself again."""
        for router in self._routers.values():
            router.experts_compete = None

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, to go on from."""
        return {"now": self.now, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is that of a schedule for other layers or another length.
        """
        if state["table"].shape != self.table.shape:
            raise ValueError(
                f"the state is of a schedule for [sites, steps] = {tuple(state['table'].shape)}, "
                f"this one is for {tuple(self.table.shape)}; make it for the same model and length."
            )
        self.table, self.now = state["table"].cpu(), state["now"]
        self._set()

    def _set(self) -> None:
        over = self.now >= self.table.shape[1]
        for row, router in enumerate(self._routers.values()):
            router.experts_compete = False if over else bool(self.table[row, self.now])


def _competing(model: nn.Module) -> dict[str, AbstractRecipeRouter]:
    found = {}
    for site, layer in model.named_modules():
        router = layer.own_router if isinstance(layer, AbstractRouted) else None
        if isinstance(router, AbstractRecipeRouter) and router.recipe.competition is not None:
            found[site] = router
    return found


def _rate(router: AbstractRecipeRouter) -> float:
    assert router.recipe.competition is not None, "the caller looked for it"
    return router.recipe.competition.rate


def _drawn(
    rates: list[float], steps: int, warm: int, most: int | None, seed: int
) -> Bool[Tensor, "sites steps"]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(len(rates), steps, dtype=torch.bool)
    room = torch.full((steps,), len(rates) if most is None else most)  # left in every step
    room[:warm] = 0
    for own, rate in zip(table, rates, strict=True):
        wishes = torch.rand(steps, generator=generator) < rate
        wishes[:warm] = False
        for wish in wishes.nonzero().flatten().tolist():
            free = bool(room[wish] > 0) and not bool(own[wish])
            place = wish if free else _nearest((room > 0) & ~own, wish)
            if place is not None:
                own[place] = True
                room[place] -= 1
    return table


def _nearest(free: Bool[Tensor, " steps"], wish: int) -> int | None:
    """The nearest free step before the wish, else after it."""
    earlier, later = free[:wish].nonzero(), free[wish + 1 :].nonzero()
    if len(earlier):
        return int(earlier[-1])
    return wish + 1 + int(later[0]) if len(later) else None
