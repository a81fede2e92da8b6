"""Learning from text what an inference rule must know, without training the model.

A threshold router takes every pair whose score is above one level per block (or per expert of a
block). Where the level is what the group's own choice would leave of ordinary text, tokens get as
many experts on average, and which ones does not depend on their neighbours: the same in a full pass
and with a cache. A predictor learns by gradient which pairs the group's own choice takes.

Sources: the inference rule of Yuan et al., *Expert Race*, 2025; Raposo et al., *Mixture-of-Depths*,
2024. Shapes: batches of `batch tokens`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from moefold.modes import evaluating
from moefold.record import AbstractRouted, record_routing
from moefold.rerouting.layer import block_of
from moefold.rerouting.predictors import (
    Calibration,
    average_level,
    real_tokens_in,
    run_without_cache,
    train_predictors,
)
from moefold.routers.adapt import RunningThreshold
from moefold.routers.inference import Threshold
from moefold.routers.sparse import AbstractRecipeRouter
from moefold.routing import SparseRouting


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Calibration:
    """Learns the thresholds or the predictors of every block from text, in one pass.

    Each batch's own threshold is averaged with those before it, by numbers of tokens, and is in
    force from the next batch on, so that later blocks see what earlier ones make of theirs. A
    predictor takes a step of Adam on each batch, while the group's own choice is in force.

    Args:
        model: one that was rerouted or upcycled with `threshold`, or with a router whose inference
            rule is `threshold` or `predictor`.
        batches: arguments of its forward, as a tokenizer returns them; a few thousand tokens for a
            threshold, in a hundred batches or more for a predictor.

    Raises:
        ValueError: no block has anything to learn, or there is no text.
    """
    routers = _learning(model)
    with evaluating(model):
        if any(router.predictor is not None for router in routers.values()):
            learnt = train_predictors(model, routers, batches)
        else:
            learnt = _thresholds(model, routers, batches)
    if not learnt.tokens:
        raise ValueError(
            "there are 0 real tokens to calibrate on; give text, a few thousand tokens of the kind "
            "the model will see"
        )
    return learnt


def _learning(model: nn.Module) -> dict[str, AbstractRecipeRouter]:
    """Routers that learn without training, by site.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for name, module in model.named_modules():
        router = module.own_router if isinstance(module, AbstractRouted) else None
        if isinstance(router, AbstractRecipeRouter) and _learns(router):
            found[name] = router
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to calibrate: no threshold and no predictor; call "
            f"moefold.reroute(model, moefold.routers.config('unified', budget=..., "
            f"inference='threshold')) first"
        )
    return found


def _learns(router: AbstractRecipeRouter) -> bool:
    recipe = router.recipe
    has_level = isinstance(recipe.adapt, RunningThreshold) or isinstance(
        recipe.inference, Threshold
    )
    return has_level or router.predictor is not None


@torch.no_grad()
def _thresholds(
    model: nn.Module,
    routers: Mapping[str, AbstractRecipeRouter],
    batches: Iterable[Mapping[str, Any]],
) -> Calibration:
    counted = dict.fromkeys(routers, 0)
    rows = dict.fromkeys(routers, 0)
    for batch in batches:
        with record_routing(model) as record:
            run_without_cache(model, batch)
        for site, router in routers.items():
            for routing in record[site]:
                assert isinstance(routing, SparseRouting)
                tokens = real_tokens_in(routing)
                if tokens:
                    average_level(router, routing, tokens, counted[site])
                counted[site] += tokens
                rows[site] += int(routing.rows_per_expert.sum())
    states = {site: router.state for site, router in routers.items()}
    return Calibration(
        thresholds={block_of(s): float(t.mean()) for s, t in states.items() if t is not None},
        accuracy={},
        experts_per_token={block_of(s): rows[s] / max(counted[s], 1) for s in routers},
        tokens=max(counted.values()),
    )
