"""Which tokens of a batch are real, as the attention mask of a layer says it.

The mask is read inside the forward pass of the layer it was given to, so it is the right one under
gradient checkpointing too, whatever ran between a forward pass and its backward.

Shapes: `batch tokens dim` hidden states; an attention mask is None, `[batch, keys]` (flash) or
`[batch, heads or 1, queries or 1, keys]` (eager: added to the scores, sdpa: True where attended).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def real_tokens(
    attention_mask: object,
    hidden: Float[Tensor, "batch tokens dim"],
    cache: Any = None,
    layer_index: int = 0,
) -> Bool[Tensor, "batch tokens"] | None:
    """Which tokens are real, as an attention mask says it.

    A token is real if it may attend to itself: in a bidirectional mask its column is attended or
    not as a whole, in a causal one the diagonal is what padding takes away.

    Args:
        attention_mask: what the layer was given, see above.
        hidden: the tokens, which are the mask's last queries.
        cache: keys and values of earlier tokens, as transformers keeps them, before these tokens
            are added; where it has more room than tokens, it says which key is a token's own.
        layer_index: of the layer, in the cache.

    Returns:
        True for real tokens; None if the mask is None, that is, all are.

    Raises:
        ValueError: a mask of another form (flex attention's blocks).
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        shape = getattr(attention_mask, "shape", None)
        raise ValueError(
            f"cannot tell the real tokens from an attention mask of type "
            f"{type(attention_mask).__name__} and shape {shape}; load the model with "
            f"attn_implementation 'sdpa', 'eager' or 'flash_attention_2'"
        )
    batch, tokens = hidden.shape[:2]
    if attention_mask.ndim == 2:
        own = attention_mask[:, -tokens:]
    elif attention_mask.shape[2] == 1 and tokens > 1:
        own = attention_mask[:, 0, 0, -tokens:]
    else:
        own = _own_keys(attention_mask[:, 0], cache, layer_index)
    return _attended(own).expand(batch, tokens)


def is_packed(
    attention_mask: object, position_ids: object, real: Bool[Tensor, "batch tokens"] | None
) -> Bool[Tensor, ""] | None:
    """Whether a row holds several sequences that do not see each other.

    A mask says so where a real token may not attend to the real one before it, in either
    direction of attention. Where there is none, positions say so, as they do to transformers: a
    token begins another sequence if its position does not follow that of the one before.

    Args:
        attention_mask: what the layer was given.
        position_ids: positions `[batch, tokens]`, if it was given any.
        real: what `real_tokens` says of the mask.

    Returns:
        None where nothing can say so: no mask and no positions, a cache, a single token.
    """
    if isinstance(attention_mask, Tensor):
        if attention_mask.ndim != 4 or real is None:
            return None
        queries, keys = attention_mask.shape[2:]
        if queries != keys or queries == 1:
            return None
        sees = _attended(attention_mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1))
        return (real[:, 1:] & real[:, :-1] & ~sees).any()
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and position_ids.shape[1] > 1:
        return position_ids.diff(dim=1).ne(1).any()
    return None


def _attended(mask: Tensor) -> Tensor:
    """What a mask of any dtype attends to."""
    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return mask.ne(0)


def cache_index(layer: nn.Module) -> int:
    """The index of a layer in the cache, as its attention knows it; 0 where there is none."""
    found: Any = next((m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")), 0)
    return found


def _own_keys(mask: Tensor, cache: Any, layer_index: int) -> Tensor:
    """What a mask `[batch, queries, keys]` says of every query and its own key."""
    queries, keys = mask.shape[1:]
    if cache is None or keys == queries:
        return mask.diagonal(offset=keys - queries, dim1=-2, dim2=-1)
    before = cache.get_seq_length(layer_index)
    first = cache.get_mask_sizes(queries, layer_index)[1]
    own = torch.arange(queries, device=mask.device) + (before - first)
    return mask.gather(2, own.expand(mask.shape[0], -1).unsqueeze(2)).squeeze(2)
