"""Teaching predictors from text which pairs the group chooses, the model itself standing still.

The group's own choice is in force while a batch passes, as it is in training; every predictor then
takes a step on what it saw and what was chosen. The last quarter of the text is for telling how
well they do, and for their levels: a batch is judged before a predictor learns from it.

Source: Raposo et al., *Mixture-of-Depths*, 2024, section 3.5. Shapes: batches of `batch tokens`.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefold.losses import membership
from moefold.modes import competing
from moefold.record import record_routing
from moefold.rerouting.layer import block_of
from moefold.routers.sparse import AbstractRecipeRouter
from moefold.routing import SparseRouting

LEARNING_RATE = 1e-2
"""Of Adam, at first; it falls to a tenth over the batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt.

    Attributes:
        thresholds: by block; the mean where every expert has one. Empty for predictors.
        accuracy: share of pairs on which a predictor and the group agreed, over the last quarter of
            the text, which it had not seen; by block. Empty for thresholds.
        experts_per_token: by block, on average over the text: under the thresholds as they were
            when each batch came; of the predictions, over the last quarter.
        tokens: number of real tokens.
    """

    thresholds: Mapping[str, float]
    accuracy: Mapping[str, float]
    experts_per_token: Mapping[str, float]
    tokens: int

    def __str__(self) -> str:
        """A line for each block."""
        longest = max(map(len, self.experts_per_token))
        return "\n".join(
            f"  {name:<{longest}}  {self._of(name)}, {rows:.2f} experts per token"
            for name, rows in self.experts_per_token.items()
        )

    def _of(self, name: str) -> str:
        if name in self.thresholds:
            return f"threshold {self.thresholds[name]:.4f}"
        return f"predictor right in {100 * self.accuracy[name]:.1f} % of pairs"


def train_predictors(
    model: nn.Module,
    routers: Mapping[str, AbstractRecipeRouter],
    batches: Iterable[Mapping[str, Any]],
) -> Calibration:
    """One step of Adam on each batch.

    Args:
        model: in evaluation mode.
        routers: those with a predictor, by site.
        batches: arguments of the model's forward.
    """
    batches = list(batches)
    heads = {site: router.predictor for site, router in routers.items() if router.predictor}
    optimizer = torch.optim.Adam(
        [p for head in heads.values() for p in head.parameters()], lr=LEARNING_RATE
    )
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, max(len(batches), 1))
    tally = {site: _Tally() for site in heads}
    for number, batch in enumerate(batches):
        losses = []
        for site, routing in _watched(model, heads, batch):
            real = real_tokens_in(routing)
            tally[site].tokens += real
            if real:
                losses.append(membership(routing))
                if number >= len(batches) * 3 // 4:
                    tally[site].judge(routing, real, routers[site])
        if losses:
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            optimizer.step()
            falling.step()
    optimizer.zero_grad(set_to_none=True)
    return Calibration(
        thresholds={},
        accuracy={block_of(site): one.right / max(one.pairs, 1) for site, one in tally.items()},
        experts_per_token={
            block_of(site): one.rows / max(one.judged, 1) for site, one in tally.items()
        },
        tokens=max((one.tokens for one in tally.values()), default=0),
    )


@dataclass(slots=True)
class _Tally:
    """How a predictor did."""

    tokens: int = 0
    judged: int = 0
    pairs: int = 0
    rows: int = 0
    right: int = 0

    def judge(self, routing: SparseRouting, real: int, router: AbstractRecipeRouter) -> None:
        """Counts what the predictor would do, then lets its level follow the choice."""
        assert routing.predicted is not None
        assert router.state is not None
        average_level(router, routing, real, self.judged)
        guess = routing.predicted > router.state
        if routing.mask is not None:
            guess &= routing.mask.unsqueeze(-1)
        self.judged += real
        self.pairs += real * routing.num_experts
        self.rows += int(guess.sum())
        self.right += real * routing.num_experts - int((guess != routing.chosen).sum())


def average_level(
    router: AbstractRecipeRouter, routing: SparseRouting, tokens: int, before: int
) -> None:
    """Averages a router's level with that of one routing, by numbers of tokens."""
    assert router.state is not None
    old = router.state.clone()
    router.update([routing], at_once=True)
    router.state.copy_((old * before + router.state * tokens) / (before + tokens))


def _watched(
    model: nn.Module, heads: Mapping[str, nn.Module], batch: Mapping[str, Any]
) -> Iterator[tuple[str, SparseRouting]]:
    """The routings of one pass, with what the predictors say of them on graphs of their own."""
    with torch.no_grad(), competing(model), record_routing(model) as record, _heard(heads) as seen:
        run_without_cache(model, batch)
    for site, head in heads.items():
        for routing, given in zip(record[site], seen[site], strict=True):
            assert isinstance(routing, SparseRouting)
            with torch.enable_grad():
                yield site, replace(routing, predicted=head(*given).float())


@contextmanager
def _heard(heads: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, ...]]]]:
    """What each predictor is given while the context is open."""
    seen: dict[str, list[tuple[Tensor, ...]]] = {site: [] for site in heads}

    def listen(site: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[site].append(given)

    with ExitStack() as stack:
        for site, head in heads.items():
            stack.callback(head.register_forward_pre_hook(partial(listen, site)).remove)
        yield seen


def run_without_cache(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One pass over whole texts."""
    takes = inspect.signature(model.forward).parameters
    model(**batch, **({"use_cache": False} if "use_cache" in takes else {}))


def real_tokens_in(routing: SparseRouting) -> int:
    """Number of tokens that are no padding."""
    return routing.num_tokens if routing.mask is None else int(routing.mask.sum())
