"""Rerouting itself: another router in a pretrained mixture, without training, and back again.

    print(moefold.reroute(model, moefold.routers.config("unified", budget=8)))
    moefold.revert(model)

Do et al., *Unified Sparse Mixture of Experts*, 2025, use it without training; what they call
unified competitive learning is the router `unified`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from moefold import routers
from moefold.rerouting.blocks import Block, find_blocks
from moefold.rerouting.layer import BLOCKS, FAITHFUL, REROUTER, Rerouter, rerouted_layer
from moefold.routers import RouterConfig
from moefold.routers.adapt import RunningThreshold
from moefold.routers.base import AbstractRouter
from moefold.routers.inference import RULES
from moefold.routers.sparse import LogitRouter, SparseRouter
from moefold.surgery.hosts import Changes
from moefold.surgery.hosts.masks import cache_index
from moefold.surgery.upcycle import CHANGES

OWN = "token-choice"
"""The name of the model's own choice where it is given without settings."""

REROUTING = "_moefold_rerouting"
"""Attribute of a rerouted model: its `Rerouting`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerouting:
    """What was done; `str(rerouting)` is lines to read.

    Attributes:
        model: class of the model.
        router: the router in words.
        blocks: names of the blocks.
        num_experts: experts in each block.
        k: experts the model's own router gives a token.
        causal: whether the model hides later tokens.
        sees_later: whether the router looks at them all the same.
        reach: how far the router looks.
        to_learn: what the router must learn before it is used, in words; None for nothing.
        config: the router as data; None for the model's own choice.
        faithful: whether padding competes.
    """

    model: str
    router: str
    blocks: tuple[str, ...]
    num_experts: int
    k: int
    causal: bool
    sees_later: bool
    reach: str
    to_learn: str | None
    config: RouterConfig | None = None
    faithful: bool = False

    def __str__(self) -> str:
        """The rerouting as lines of text."""
        lines = [
            f"{self.model}: {len(self.blocks)} mixtures of {self.num_experts} experts (top "
            f"{self.k}) now use {self.router}",
            f"  {'blocks':<22} {self.blocks[0]} ... {self.blocks[-1]}",
            f"  {'router looks at':<22} the {self.reach}",
        ]
        if self.causal and self.sees_later:
            lines.append(
                f"  {'causality':<22} a later token can change an earlier one: good for "
                f"embeddings of whole texts, wrong for perplexity, refused for generation with a "
                f"cache. A rule that looks at no later token: inference={_either(RULES)}"
            )
        elif self.causal:
            lines.append(f"  {'causality':<22} no later token changes an earlier one")
        if self.to_learn is not None:
            lines.append(
                f"  {'to learn':<22} {self.to_learn}: moefold.calibrate(model, text), one pass"
            )
        return "\n".join(lines)


def reroute(model: nn.Module, router: RouterConfig | str, *, faithful: bool = False) -> Rerouting:
    """Puts another router into every mixture of a pretrained model, in place.

    The gate's weights and the experts are the model's own, shared and not copied; shared experts
    stay outside of the competition. `moefold.revert(model)` undoes it.

    Args:
        model: a mixture of experts of transformers 5 (OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE,
            DeepSeek-V2 and V3, GPT-OSS, GraniteMoE, PhiMoE, or one whose blocks are written alike).
        router: a sparse router, by name or with settings; "token-choice" without settings is the
            model's own choice.
        faithful: as the released code of USMoE does it: padding competes, and adds to the budget.

    Raises:
        ValueError: the model is dense (`moefold.upcycle` is for those), rerouted or upcycled
            already, or the router cannot route logits of its own.
    """
    if CHANGES in model.__dict__:
        raise ValueError(
            f"{type(model).__name__} was already changed by moefold; call moefold.revert(model)"
        )
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no mixture of experts to reroute (a gate beside stacked "
            f"experts, as transformers 5 writes them); it is dense: moefold.upcycle makes experts"
        )
    own = router == OWN
    config = RouterConfig(router) if isinstance(router, str) else router
    made = [None if own else logit_router(config, block) for block in blocks]
    changes = Changes()
    try:
        for block, one in zip(blocks, made, strict=True):
            _install(block, Rerouter(one, block.name), faithful, changes)
    except BaseException:
        changes.undo()
        raise
    first = made[0]
    causal = any(block.causal for block in blocks)
    rerouting = Rerouting(
        model=type(model).__name__,
        router=f"the model's own top {blocks[0].k}" if own else str(config),
        blocks=tuple(block.name for block in blocks),
        num_experts=blocks[0].num_experts,
        k=blocks[0].k,
        causal=causal,
        sees_later=first is not None and not first.is_causal,
        reach="token" if first is None else first.reach,
        to_learn=None if first is None else _to_learn(first),
        config=None if own else config,
        faithful=faithful,
    )
    changes.set_attribute(model, REROUTING, rerouting)
    model.__dict__[CHANGES] = changes
    return rerouting


def rerouting_of(model: nn.Module) -> Rerouting | None:
    """What `reroute` did to the model; None for one that is not rerouted."""
    return model.__dict__.get(REROUTING)


def logit_router(config: RouterConfig, block: Block) -> LogitRouter:
    """The router of a config for logits that a pretrained gate computes.

    Raises:
        ValueError: the router is no recipe on logits, or does not fit the number of experts.
    """
    with torch.device("meta"):
        try:
            built = config.build(block.dim, block.num_experts)
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from None
    if not _takes_logits(built):
        raise ValueError(
            f"router {config.name!r} cannot take the logits of a pretrained gate: it has weights "
            f"or a state of its own to learn; choose one of {', '.join(recipes(block.num_experts))}"
        )
    assert isinstance(built, SparseRouter)
    return LogitRouter(block.num_experts, built.recipe, hidden_dim=block.dim)


def _takes_logits(router: nn.Module) -> bool:
    """Whether it needs nothing but logits; a threshold is learnt from text, without training."""
    if not isinstance(router, SparseRouter):
        return False
    recipe = router.recipe
    logits_only = recipe.cosine is None and recipe.competition is None
    return logits_only and isinstance(recipe.adapt, RunningThreshold | None)


def _to_learn(router: LogitRouter) -> str | None:
    if router.predictor is not None:
        return "a predictor in every block"
    return None if router.state is None else "a threshold in every block"


def _either(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}"


def recipes(num_experts: int) -> tuple[str, ...]:
    """Names of the routers that can take the logits of a pretrained gate."""
    return tuple(name for name, built in _all_routers(num_experts).items() if _takes_logits(built))


def _all_routers(num_experts: int) -> dict[str, AbstractRouter]:
    found = {}
    with torch.device("meta"):
        for name in routers.names():
            try:
                found[name] = RouterConfig(name).build(8, num_experts)
            except (ValueError, ImportError):  # one that needs settings, or a library
                continue
    return found


def _install(block: Block, rerouter: Rerouter, faithful: bool, changes: Changes) -> None:
    layer = block.layer
    rerouter.train(block.block.training)
    changes.replace_children(block.block, **{REROUTER: rerouter})
    before = layer.__dict__.get(BLOCKS, {})
    changes.set_attribute(layer, BLOCKS, {**before, block.path: block.gate})
    if before:
        return
    changes.set_attribute(layer, FAITHFUL, faithful)
    changes.set_attribute(layer, "_moefold_layer_index", cache_index(layer))
    changes.become(layer, rerouted_layer(type(layer)))
