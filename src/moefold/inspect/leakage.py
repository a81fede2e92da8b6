"""Does the future, another sequence or padding change a token?

A model runs twice on inputs that differ only in what a token must not depend on, and both the
choices of its routers and its outputs are compared at the tokens that stayed. Expert choice over a
sequence is caught so; attention that hides later tokens adds nothing to what is found.

    later      tokens after the first half of each sequence are other tokens
    others     all sequences but the first are other sequences
    padding    every sequence is padded further
    decoding   tokens come one by one, as in generation, instead of all at once

Shapes: `batch tokens` ids; routings are compared as `batch tokens experts`.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from moefold.modes import evaluating
from moefold.record import AbstractRouted, record_routing
from moefold.routing import SparseRouting

FURTHER = 3
"""Tokens of padding that are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What one kind of change did to tokens that it must not reach.

    Attributes:
        tokens: number of tokens that were compared.
        rerouted: how many of them have another set of experts at some site.
        output: largest change of an output, as a share of the largest output.
    """

    tokens: int
    rerouted: int
    output: float

    def found(self, tolerance: float) -> bool:
        """Whether there is a leak: another choice, or more than rounding in the output."""
        return self.rerouted > 0 or self.output > tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Leakage:
    """What leaks; `str(leakage)` is lines to read.

    Attributes:
        later: from later tokens of the same sequence.
        others: from other sequences of the batch.
        padding: from padding.
        decoding: between a full pass and token by token, with a cache if the routers can choose
            with one; None for a model that does not generate.
        tolerance: what counts as rounding in the output.
    """

    later: Leak
    others: Leak
    padding: Leak
    decoding: Leak | None
    tolerance: float

    @property
    def leaks(self) -> dict[str, Leak]:
        """What was measured, by its name."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: leak for name, leak in found.items() if isinstance(leak, Leak)}

    @property
    def clean(self) -> bool:
        """Whether nothing leaks."""
        return not any(leak.found(self.tolerance) for leak in self.leaks.values())

    def __str__(self) -> str:
        """The findings as lines of text."""
        lines = []
        for kind, leak in self.leaks.items():
            verdict = "LEAKS" if leak.found(self.tolerance) else "clean"
            lines.append(
                f"  {_WORDS[kind]:<22} {verdict}: {leak.rerouted} of {leak.tokens} tokens go to "
                f"other experts, outputs change by {leak.output:.1e}"
            )
        return "\n".join(lines)


_WORDS = {
    "later": "later tokens",
    "others": "other sequences",
    "padding": "padding",
    "decoding": "token by token",
}


@torch.no_grad()
def leakage(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> Leakage:
    """Measures whether the future, another sequence or padding changes a token.

    Args:
        model: a model that takes `input_ids` and `attention_mask`; its first output with a vector
            for each token is compared. One whose attention looks at later tokens shows them in its
            outputs whatever its routers do.
        inputs: `input_ids [batch, tokens]`, `attention_mask` if there is padding, on the right.
        tolerance: what counts as rounding in the output, as a share of the largest; 1e-12 for
            float64 and 100 roundings of the dtype otherwise.
        seed: of the tokens that are put in.

    Raises:
        ValueError: no ids, fewer than two sequences or tokens, or padding on the left.
    """
    ids, mask = _checked(inputs)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(int(ids.max()) + 1, ids.shape, generator=generator).to(ids)
    other = torch.where(other == ids, (other + 1) % (int(ids.max()) + 1), other)
    half = (mask.sum(1, keepdim=True) + 1) // 2
    place = torch.arange(ids.shape[1], device=ids.device)
    early = mask & (place < half)
    first = mask & (torch.arange(ids.shape[0], device=ids.device) == 0).unsqueeze(1)
    padded = functional.pad(ids, (0, FURTHER), value=int(ids[0, 0]))
    before = _run(model, ids, mask)
    compared = {
        "later": (_run(model, torch.where(early, ids, other), mask), early),
        "others": (_run(model, torch.where(first, ids, other), mask), first),
        "padding": (_run(model, padded, functional.pad(mask, (0, FURTHER))), mask),
    }
    found = {kind: _compare(before, after, kept) for kind, (after, kept) in compared.items()}
    alone = _token_by_token(model, ids, mask)
    decoding = None if alone is None else _compare(before, alone, mask)
    dtype = before[0].dtype
    rounding = 1e-12 if dtype == torch.float64 else 100 * torch.finfo(dtype).eps
    return Leakage(
        **found, decoding=decoding, tolerance=rounding if tolerance is None else tolerance
    )


Run = tuple[Tensor, list[Tensor]]
"""An output with a vector for each token, and what each site chose."""


def _run(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "..."], **more: Any
) -> Run:
    with evaluating(model), _recording(model) as record:
        made = model(input_ids=ids, attention_mask=mask.long(), **more)
    values = made.values() if isinstance(made, Mapping) else made
    tensors = [made] if isinstance(made, Tensor) else [v for v in values if isinstance(v, Tensor)]
    output = next((t for t in tensors if t.ndim == 3 and t.shape[:2] == ids.shape), None)
    if output is None:
        raise ValueError(
            f"{type(model).__name__} returns no vector for each token; pass the model without its "
            f"pooling head"
        )
    routings = [] if record is None else [r for site in record.values() for r in site]
    return output, [r.chosen for r in routings if isinstance(r, SparseRouting)]


def _token_by_token(model: nn.Module, ids: Tensor, mask: Tensor) -> Run | None:
    """The last token of every prefix; None for a model that does not generate."""
    takes = inspect.signature(model.forward).parameters
    if not {"past_key_values", "use_cache"} <= set(takes):
        return None
    with evaluating(model):
        cache = getattr(
            model(input_ids=ids[:, :1], attention_mask=mask[:, :1].long(), use_cache=True),
            "past_key_values",
            None,
        )
        if cache is None:
            return None
        choose_with_cache = all(
            router is None or router.is_causal_now
            for router in (m.own_router for m in model.modules() if isinstance(m, AbstractRouted))
        )
    cache.reset()
    steps = []
    for end in range(1, ids.shape[1] + 1):
        first = end - 1 if choose_with_cache else 0
        more = {"past_key_values": cache, "use_cache": True} if choose_with_cache else {}
        output, chosen = _run(model, ids[:, first:end], mask[:, :end], **more)
        steps.append((output[:, -1:], [matrix[:, -1:] for matrix in chosen]))
    outputs, chosen = zip(*steps, strict=True)
    return torch.cat(outputs, 1), [torch.cat(site, 1) for site in zip(*chosen, strict=True)]


def _recording(model: nn.Module) -> Any:
    mixed = any(isinstance(module, AbstractRouted) for module in model.modules())
    return record_routing(model) if mixed else nullcontext()


def _compare(before: Run, after: Run, kept: Bool[Tensor, "batch tokens"]) -> Leak:
    tokens = kept.shape[1]
    changed = torch.zeros_like(kept)
    for one, another in zip(before[1], after[1], strict=True):
        changed |= (one != another[:, :tokens]).any(-1)
    difference = (before[0] - after[0][:, :tokens])[kept].abs().max()
    return Leak(
        tokens=int(kept.sum()),
        rerouted=int((changed & kept).sum()),
        output=float(difference / before[0][kept].abs().max().clamp_min(1e-30)),
    )


def _checked(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or min(ids.shape) < 2:
        raise ValueError(
            f"inputs hold input_ids of shape {getattr(ids, 'shape', None)}; give at least two "
            f"sequences of at least two tokens, as a tokenizer returns them"
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if bool((mask[:, :1] < mask[:, 1:]).any()) or not bool(mask[:, 0].all()):
        raise ValueError(
            "the sequences are padded on the left; pad them on the right "
            "(tokenizer.padding_side = 'right')"
        )
    return ids, mask


__all__ = ["Leak", "Leakage", "leakage"]
