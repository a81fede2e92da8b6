"""Thresholds learnt from text in one pass: a budget kept by a router that looks at one token.

A threshold router takes every pair whose score is above one number per block. Where that number is
what the budget would leave of ordinary text, tokens get that many experts on average, and which
ones does not depend on their neighbours: the same in a full pass and with a cache.

Source: the inference rule of Yuan et al., *Expert Race*, 2025. Shapes: batches of `batch tokens`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moefold.modes import evaluating
from moefold.record import record_routing
from moefold.rerouting.layer import Rerouter
from moefold.routers.adapt import RunningThreshold
from moefold.routers.sparse import LogitRouter
from moefold.routing import SparseRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt.

    Attributes:
        thresholds: by block.
        experts_per_token: by block, on average over the text, under the thresholds as they were
            when each batch came.
        tokens: number of real tokens.
    """

    thresholds: Mapping[str, float]
    experts_per_token: Mapping[str, float]
    tokens: int

    def __str__(self) -> str:
        """A line for each block."""
        longest = max(map(len, self.thresholds))
        return "\n".join(
            f"  {name:<{longest}}  threshold {threshold:.4f}, "
            f"{self.experts_per_token[name]:.2f} experts per token"
            for name, threshold in self.thresholds.items()
        )


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Calibration:
    """Learns the threshold of every block from text, in one pass.

    Each batch's own threshold is averaged with those before it, by numbers of tokens, and is in
    force from the next batch on, so that later blocks see what earlier ones make of theirs.

    Args:
        model: one that was rerouted with `threshold`.
        batches: arguments of its forward, as a tokenizer returns them; a few thousand tokens.

    Raises:
        ValueError: no block has a threshold, or there is no text.
    """
    routers = _thresholds(model)
    counted = dict.fromkeys(routers, 0)
    rows = dict.fromkeys(routers, 0)
    with evaluating(model):
        for batch in batches:
            with record_routing(model) as record:
                model(**batch, use_cache=False)
            for site, router in routers.items():
                for routing in record[site]:
                    assert isinstance(routing, SparseRouting)
                    tokens = _real(routing)
                    if tokens:
                        _learn(router, routing, tokens, counted[site])
                    counted[site] += tokens
                    rows[site] += int(routing.rows_per_expert.sum())
    if not any(counted.values()):
        raise ValueError(
            "there are 0 real tokens to calibrate on; give text, a few thousand tokens of the kind "
            "the model will see"
        )
    names = {site: site.rpartition(".")[0] for site in routers}
    return Calibration(
        thresholds={names[s]: float(r.state) for s, r in routers.items() if r.state is not None},
        experts_per_token={names[s]: rows[s] / counted[s] for s in routers},
        tokens=max(counted.values()),
    )


def _thresholds(model: nn.Module) -> dict[str, LogitRouter]:
    found = {}
    for name, module in model.named_modules():
        router = module.router if isinstance(module, Rerouter) else None
        if isinstance(router, LogitRouter) and isinstance(router.recipe.adapt, RunningThreshold):
            found[name] = router
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no threshold to calibrate; call "
            f"moefold.reroute(model, moefold.routers.config('threshold', budget=...)) first"
        )
    return found


def _learn(router: LogitRouter, routing: SparseRouting, tokens: int, before: int) -> None:
    assert isinstance(router.recipe.adapt, RunningThreshold)
    assert router.state is not None
    at_once = dataclasses.replace(router.recipe.adapt, momentum=0.0)
    new = at_once.update(router.state, [routing])
    router.state.copy_((router.state * before + new * tokens) / (before + tokens))


def _real(routing: SparseRouting) -> int:
    return routing.num_tokens if routing.mask is None else int(routing.mask.sum())
