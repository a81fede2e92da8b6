"""What a budget of experts costs and saves: a pretrained mixture rerouted at one after the other.

    text, first half    calibrates the router at every budget
    text, second half   perplexity, floating-point operations, experts a token really has
    pairs with scores   embeddings against people, where there are pairs
    beginnings          embeddings against those of the untouched model, always

The untouched model is measured first, on the same text. Every budget is written to a file when it
is done, and a run that is called again goes on after the last. Shapes: `texts dim`, `pairs`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from moefold.embedding import EmbeddingConfig, embedder
from moefold.evaluate.language import (
    Pieces,
    passed,
    perplexity,
    perplexity_ratio,
    pieces_of,
)
from moefold.evaluate.retrieval import encode
from moefold.evaluate.similarity import agreement, cosines, pair_change, pair_quality
from moefold.evaluate.surroundings import surroundings, weights_sha256
from moefold.evaluate.sweep import SCHEMA, Measured, Sweep, SweepConfig, read_rows, write_rows
from moefold.rerouting import Rerouting, calibrate, find_blocks, reroute
from moefold.routers import RouterConfig, known_settings
from moefold.surgery import revert

Pair = tuple[str, str, float]
"""Two texts and how alike people find them."""

BUDGETS = ("budget", "k", "capacity_factor")
"""Settings that say how many experts a token has; a router has one of them, or none."""

_BEGINNING = 64
"""Tokens of a piece that is embedded."""

_TOKENS_OF_A_TEXT = 32
"""A guess, for progress only."""


@runtime_checkable
class Watch(Protocol):
    """Shows how far the work is, counted in tokens."""

    def expect(self, total: float) -> None:
        """There is so much work in all."""

    def step(self, what: str, total: float | None = None) -> None:
        """A step begins, of so much of it."""

    def advance(self, work: float) -> None:
        """So much is done since the last call."""


def sweep_budgets(
    model: Any,
    tokenizer: Any,
    config: SweepConfig,
    texts: Sequence[str],
    *,
    pairs: Sequence[Pair] = (),
    results: Path | None = None,
    watch: Watch | None = None,
) -> Sweep:
    """Measures an untouched mixture, and what it is at every budget.

    Args:
        model: a causal language model of transformers with mixtures; it is rerouted and reverted.
        tokenizer: its tokenizer.
        config: what is measured.
        texts: one for each document, or a single long one.
        pairs: texts with scores.
        results: a JSON file, written after every budget; what it holds is not measured again.
        watch: shows progress.

    Raises:
        ValueError: the model has no mixture, is rerouted already or has no head; too little text;
            a budget the router cannot have; the file is of another sweep.
    """
    budgets = sorted(set(config.budgets))
    _try_all(model, config, budgets)
    calibration, held_out = halves(texts, tokenizer, config)
    about = _about(model, config, texts, pairs)
    rows = {} if results is None else read_rows(results, about)
    missing = [budget for budget in budgets if budget not in rows]
    work = _Work(model, tokenizer, config, held_out, pairs, watch or _Unwatched())
    work.expect(1 + len(missing), len(missing) * calibration.tokens)
    rows[None] = work.untouched(rows.get(None))
    reason = None
    for budget in budgets:
        with _rerouted(model, config, budget) as done:
            reason = _no_perplexity(config.router, done)
            if budget in rows:
                continue
            work.watch.step(f"calibrating at {budget:g}", calibration.tokens)
            learn(model, config, calibration, done)
            work.watch.advance(calibration.tokens)
            rows[budget] = work.measure(budget, losses=reason is None)
        if results is not None:
            write_rows(results, about, rows, surroundings(_PACKAGES))
    return Sweep(
        original=rows[None],
        budgets=tuple(rows[budget] for budget in budgets),
        router=str(config.router),
        no_perplexity=reason,
    )


_PACKAGES = ("moefold", "torch", "transformers", "sentence-transformers")


def halves(texts: Sequence[str], tokenizer: Any, config: SweepConfig) -> tuple[Pieces, Pieces]:
    """The text to calibrate on and the text to measure on.

    Raises:
        ValueError: there is too little of it.
    """
    pieces = pieces_of(texts, tokenizer, length=config.length)
    first, second = pieces.halves()
    if not second.ids or len(second.ids) < 3:
        raise ValueError(
            f"the text has {pieces.tokens} tokens in {len(pieces.ids)} pieces, too few for two "
            f"halves with an interval; give more text, or shorter pieces than {config.length} "
            f"tokens (length)"
        )
    return first.up_to(config.tokens), second.up_to(config.tokens)


def reroute_at(model: Any, config: SweepConfig, budget: float, calibration: Pieces) -> Rerouting:
    """Reroutes at a budget for good, and calibrates: what was measured at it in the sweep."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        done = reroute(model, at_budget(model, config.router, budget), faithful=config.faithful)
        learn(model, config, calibration, done)
    return done


def learn(model: Any, config: SweepConfig, calibration: Pieces, done: Rerouting) -> None:
    """Calibrates what was rerouted, if it has anything to learn."""
    if done.to_learn is None:
        return
    device = next(model.parameters()).device
    # A predictor takes a step of its optimiser for each batch, and wants many of them.
    size = 1 if "predictor" in done.to_learn else config.batch_size
    calibrate(
        model,
        [{"input_ids": calibration.tensor(p, device)} for p in calibration.batches(size)],
    )


def at_budget(model: Any, router: RouterConfig, budget: float) -> RouterConfig | str:
    """The router with so many experts per token; the model's own choice where it is the same.

    Raises:
        ValueError: the router has no budget, or only whole ones.
    """
    known = known_settings(router.name) or ()
    if "budget" in known:
        return _set(router, budget=budget)
    if "k" in known:
        if budget != int(budget):
            raise ValueError(
                f"router {router.name!r} gives every token a whole number of experts, not "
                f"{budget}; take unified or threshold, which have a budget"
            )
        blocks = find_blocks(model)
        if router == RouterConfig("token-choice") and blocks and budget == blocks[0].k:
            return "token-choice"
        return _set(router, k=int(budget))
    if "capacity_factor" in known:
        return _set(router, capacity_factor=budget)
    raise ValueError(
        f"router {router.name!r} has no budget; take unified, threshold, expert-choice or "
        f"token-choice"
    )


def default_budgets(router: RouterConfig, k: int) -> tuple[float, ...]:
    """Some budgets up to what the model has: from half of it, one expert at least.

    Args:
        router: five steps for one with a budget, and whole numbers for one without.
        k: experts the model's own router gives a token.
    """
    if "budget" in (known_settings(router.name) or ()):
        return tuple(sorted({max(1.0, k * share) for share in (0.5, 0.625, 0.75, 0.875, 1.0)}))
    return tuple(float(budget) for budget in range(max(1, k // 2), k + 1))


@final
class _Work:
    """Measures a model as it is now, and compares it with what it was untouched."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SweepConfig,
        held_out: Pieces,
        pairs: Sequence[Pair],
        watch: Watch,
    ) -> None:
        self.model = model
        self.config = config
        self.held_out = held_out
        self.scores = np.array([score for _, _, score in pairs], dtype=float)
        self.watch = watch
        self.encoder = embedder(model, tokenizer, EmbeddingConfig())
        beginnings = _beginnings(held_out, tokenizer, config.texts)
        self.texts = list(dict.fromkeys([*beginnings, *(t for a, b, _ in pairs for t in (a, b))]))
        place = {text: number for number, text in enumerate(self.texts)}
        self.beginnings = [place[text] for text in beginnings]
        self.first = [place[a] for a, _, _ in pairs]
        self.second = [place[b] for _, b, _ in pairs]
        self.embedding = len(self.texts) * _TOKENS_OF_A_TEXT

    def expect(self, measured: int, others: int) -> None:
        """Says how much there is to do."""
        self.watch.expect(measured * (self.held_out.tokens + self.embedding) + others)

    def untouched(self, known: Measured | None) -> Measured:
        """What the untouched model is; its vectors are made again where the rest is known."""
        if known is None:
            known = self._measure(None, "measuring it untouched", losses=True)
        else:
            self.watch.step("embedding with it untouched", self.embedding)
            self.vectors = self._vectors()
            self.watch.advance(self.held_out.tokens)
        self.original = known
        return known

    def measure(self, budget: float, *, losses: bool) -> Measured:
        """What the rerouted model is."""
        return self._measure(budget, f"measuring at {budget:g}", losses=losses)

    def _measure(self, budget: float | None, what: str, *, losses: bool) -> Measured:
        self.watch.step(what, self.held_out.tokens + self.embedding)
        made = passed(
            self.model,
            self.held_out,
            batch_size=self.config.batch_size,
            losses=losses,
            advance=self.watch.advance,
        )
        vectors = self._vectors()
        draws = self.config.resamples
        found = cosines(vectors[self.first], vectors[self.second])
        old = None if budget is None else self.original
        if old is None:
            self.vectors = vectors
        return Measured(
            budget=budget,
            experts_per_token=made.experts_per_token or self._own_experts(),
            flops_per_token=made.flops_per_token,
            perplexity=None
            if made.losses is None
            else perplexity(made.losses, made.predicted, resamples=draws),
            perplexity_ratio=None
            if made.losses is None or old is None
            else perplexity_ratio(
                made.losses, np.array(old.losses), made.predicted, resamples=draws
            ),
            quality=pair_quality(found, self.scores, resamples=draws) if self.first else None,
            quality_change=None
            if old is None or not self.first
            else pair_change(found, np.array(old.cosines), self.scores, resamples=draws),
            agreement=None if old is None else self._agreement(vectors),
            losses=None if made.losses is None else tuple(made.losses.tolist()),
            cosines=tuple(found.tolist()) if self.first else None,
        )

    def _agreement(self, vectors: Float[np.ndarray, "texts dim"]) -> Any:
        if len(self.beginnings) < 3:
            return None
        mine, theirs = vectors[self.beginnings], self.vectors[self.beginnings]
        return agreement(mine, theirs, resamples=self.config.resamples)

    def _vectors(self) -> Float[np.ndarray, "texts dim"]:
        made = encode(
            self.encoder,
            self.texts,
            batch_size=self.config.batch_size,
            advance=lambda texts: self.watch.advance(texts * _TOKENS_OF_A_TEXT),
        )
        return made.double().numpy()

    def _own_experts(self) -> float:
        """Of a model that is not rerouted, which says nothing."""
        return float(np.mean([block.k for block in find_blocks(self.model)]))


class _Unwatched:
    def expect(self, total: float) -> None: ...
    def step(self, what: str, total: float | None = None) -> None: ...
    def advance(self, work: float) -> None: ...


@contextmanager
def _rerouted(model: Any, config: SweepConfig, budget: float) -> Iterator[Rerouting]:
    with torch.random.fork_rng(devices=[]):  # of a predictor's first weights
        torch.manual_seed(0)
        done = reroute(model, at_budget(model, config.router, budget), faithful=config.faithful)
        try:
            yield done
        finally:
            revert(model)


def _try_all(model: Any, config: SweepConfig, budgets: Sequence[float]) -> None:
    """Reroutes at every budget and back: what cannot be is refused before hours are spent."""
    for budget in budgets:
        with _rerouted(model, config, budget):
            pass
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"a {type(model).__name__} predicts no tokens, and has no perplexity; open it with its "
            f"head, as in AutoModelForCausalLM.from_pretrained(folder)"
        )


def _no_perplexity(router: RouterConfig, done: Rerouting) -> str | None:
    if not (done.causal and done.sees_later):
        return None
    return (
        f"{router} looks at later tokens, so that a perplexity would be that of a model which "
        f"knows what comes; a rule that does not: threshold, prefix or token-choice"
    )


def _beginnings(pieces: Pieces, tokenizer: Any, count: int) -> list[str]:
    """Of pieces evenly over the text, those that differ."""
    places = np.unique(np.linspace(0, len(pieces.ids) - 1, count).astype(int))
    texts = (
        tokenizer.decode(list(pieces.ids[place][:_BEGINNING]), skip_special_tokens=True).strip()
        for place in places
    )
    return list(dict.fromkeys(text for text in texts if text))


def _about(
    model: Any, config: SweepConfig, texts: Sequence[str], pairs: Sequence[Pair]
) -> Mapping[str, Any]:
    """What a file of results must say to be of this sweep."""
    settings = {name: getattr(config, name) for name in _SETTINGS}
    return {
        "schema": SCHEMA,
        "moefold": version("moefold"),
        "model": type(model).__name__,
        "weights": weights_sha256(model),
        "router": config.router.to_dict(),
        **settings,
        "text": _sha256(texts),
        "pairs": _sha256(pairs),
    }


_SETTINGS = ("faithful", "length", "tokens", "texts", "batch_size", "resamples")


def _sha256(what: Any) -> str:
    return hashlib.sha256(json.dumps(list(what)).encode()).hexdigest()


def _set(router: RouterConfig, **changes: Any) -> RouterConfig:
    return RouterConfig(router.name, {**router.settings, **changes})


__all__ = [
    "BUDGETS",
    "Pair",
    "Watch",
    "at_budget",
    "default_budgets",
    "halves",
    "learn",
    "reroute_at",
    "sweep_budgets",
]
