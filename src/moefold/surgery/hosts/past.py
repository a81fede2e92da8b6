"""What a router remembers of earlier tokens, kept with the keys and values of its layer.

Generation does things to a cache: beams change places, rejected tokens are cut off, sequences are
repeated or dropped. What the router remembers must follow, and so it lives in the cache, in the
part that belongs to the router's layer, whose class becomes one that does all of this to it too.

Shapes: `batch earlier experts` scores, -inf for padding.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefold.routers.base import AbstractRouter

_SCORES = "_moefold_scores"
"""Attribute of a layer's cache: scores of earlier tokens, by the name of the router."""


class CachedPast:
    """Earlier tokens of one router, see `moefold.routers.inference.Past`."""

    def __init__(self, cache: Any, index: int, earlier: int, name: str) -> None:
        self._cache = cache
        self._index = index
        self._earlier = earlier
        self._name = name

    def scores(self) -> Tensor | None:
        """What competed for each earlier token, -inf for padding; None if there is none.

        Raises:
            ValueError: the cache holds tokens that this router has not seen.
        """
        if self._earlier == 0:
            return None
        found = self._kept().get(self._name)
        if found is None or found.shape[1] != self._earlier:
            seen = 0 if found is None else found.shape[1]
            raise ValueError(
                f"{self._name}: the cache holds {self._earlier} tokens, of which this router has "
                f"seen {seen}; begin with an empty cache after the model's routers were changed"
            )
        return found

    def add(self, scores: Tensor) -> None:
        """Append those of the tokens that have come now."""
        before = self.scores()
        kept = self._kept()
        kept[self._name] = scores if before is None else torch.cat([before, scores], 1)

    def _kept(self) -> dict[str, Tensor]:
        layer = _own_part(self._cache).layers[self._index]
        if _SCORES not in layer.__dict__:
            layer.__class__ = remembering(type(layer))
            layer.__dict__[_SCORES] = {}
        return layer.__dict__[_SCORES]


def past_of(router: AbstractRouter | None, cache: Any, index: int, name: str) -> CachedPast | None:
    """What a router remembers; to be asked for before the layer adds its tokens to the cache.

    Args:
        router: the router, None for one of another kind.
        cache: keys and values of earlier tokens, as transformers keeps them, or None.
        index: of the layer, in the cache.
        name: the router's place in the model.

    Returns:
        None without a cache, and for a router that need not remember.

    Raises:
        ValueError: there are earlier tokens, which would have to choose again.
    """
    if router is None or cache is None or router.reach_now == "token":
        return None
    earlier = cache.get_seq_length(index)
    if isinstance(earlier, Tensor) and torch.compiler.is_compiling():
        raise ValueError(
            f"{name}: a router that looks at the {router.reach_now} cannot be compiled together "
            f"with a cache of fixed size; generate with the default cache, or uncompiled"
        )
    earlier = int(earlier)
    if router.remembers and router.reach_now == "past":
        return CachedPast(cache, index, earlier, name)
    if earlier and router.group != "position":
        raise ValueError(
            f"{name}: tokens are added to a cache of {earlier}, and the router looks at the "
            f"{router.reach_now}: earlier tokens would have to choose again. Generate with "
            f"use_cache=False, or give it a rule that looks at no later token: "
            f"{causal_ways(router)}"
        )
    return None


def causal_ways(router: AbstractRouter) -> str:
    """What to do instead, in words."""
    if router.reach != router.reach_in_training:
        return "call model.eval(), which lets its inference rule choose"
    return "inference='threshold', 'prefix', 'predictor' or 'token-choice', or another router"


@functools.cache
def remembering(base: type) -> type:
    """The class of a layer's cache that does to the scores what is done to keys and values."""

    def also(name: str, change: Callable[..., Tensor]) -> Any:
        own = getattr(base, name)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            own(self, *args, **kwargs)
            kept = self.__dict__[_SCORES]
            for router in kept:
                kept[router] = change(self, kept[router], *args, **kwargs)

        return method

    changes: dict[str, Callable[..., Tensor]] = {
        "reorder_cache": lambda _, scores, beam_idx: scores.index_select(
            0, beam_idx.to(scores.device)
        ),
        "crop": lambda layer, scores, *_, **__: scores[:, : int(layer.get_seq_length())],
        "batch_repeat_interleave": lambda _, scores, repeats: scores.repeat_interleave(repeats, 0),
        "batch_select_indices": lambda _, scores, indices: scores[indices],
        "reset": lambda _, scores: scores[:, :0],
    }
    methods = {name: also(name, change) for name, change in changes.items() if hasattr(base, name)}
    # Some caches enter themselves in a table by this name when a class is made of them.
    return type(base)(f"{base.__name__}WithScores", (base,), {"_layer_type": None, **methods})


def _own_part(cache: Any) -> Any:
    """The part of an encoder-decoder's cache that the decoder's own tokens are in."""
    return getattr(cache, "self_attention_cache", cache)
