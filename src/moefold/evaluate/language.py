"""A language model on held-out text: what it loses at every token, what it costs, whom it asks.

    texts -> pieces of at most `length` tokens -> batches of one length -> one pass each

Pieces of one length are passed together, so that nothing is padded: what is counted is what real
tokens cost. The first token of a piece is not predicted. Perplexity is exp of the mean loss of a
token, with an interval over documents, which are drawn again whole.

Shapes: `pieces` are counts of pieces, `documents` of documents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moefold.evaluate.intervals import Interval, bootstrap
from moefold.modes import evaluating
from moefold.ops.flops import flop_counter
from moefold.record import AbstractRouted, record_routing
from moefold.routing import SparseRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Text as a model takes it.

    Attributes:
        ids: token ids of every piece, two or more.
        document: number of the document each piece is from, ascending.
    """

    ids: tuple[tuple[int, ...], ...]
    document: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(map(len, self.ids))

    def halves(self) -> tuple["Pieces", "Pieces"]:
        """The documents up to the middle of the text, and the others."""
        seen, middle = 0, len(self.ids)
        for place in range(1, len(self.ids)):
            seen += len(self.ids[place - 1])
            if self.document[place] != self.document[place - 1] and 2 * seen >= self.tokens:
                middle = place
                break
        return self._part(0, middle), self._part(middle, len(self.ids))

    def up_to(self, tokens: int) -> "Pieces":
        """The first pieces, of so many tokens together at most; one at least."""
        ends = np.cumsum([len(piece) for piece in self.ids])
        return self._part(0, max(1, int((ends <= tokens).sum())))

    def batches(self, size: int) -> Iterator[list[int]]:
        """Places of pieces of one length, at most `size` of them; longest first."""
        lengths = sorted({len(piece) for piece in self.ids}, reverse=True)
        for length in lengths:
            places = [place for place, piece in enumerate(self.ids) if len(piece) == length]
            for start in range(0, len(places), size):
                yield places[start : start + size]

    def tensor(self, places: Sequence[int], device: torch.device) -> Int[Tensor, "pieces tokens"]:
        """Pieces of one length as a model takes them."""
        return torch.tensor([self.ids[place] for place in places], device=device)

    def _part(self, start: int, end: int) -> "Pieces":
        return Pieces(ids=self.ids[start:end], document=self.document[start:end])


def pieces_of(texts: Sequence[str], tokenizer: Any, *, length: int) -> Pieces:
    """Cuts texts into pieces.

    Args:
        texts: one for each document; of a single one every piece counts as a document.
        tokenizer: one of transformers.
        length: most tokens of a piece.

    Raises:
        ValueError: no text has two tokens, of which the first could predict the second.
    """
    if length < 2:
        raise ValueError(f"length is {length}; a piece needs at least 2 tokens")
    ids, document = [], []
    for number, text in enumerate(texts):
        whole = list(tokenizer(text, verbose=False)["input_ids"]) if text.strip() else []
        for start in range(0, len(whole), length):
            piece = tuple(whole[start : start + length])
            if len(piece) >= 2:
                document.append(number if len(texts) > 1 else len(ids))
                ids.append(piece)
    if not ids:
        raise ValueError(
            f"{len(texts)} texts hold no two tokens; give text of the kind the model will see, a "
            f"few thousand tokens"
        )
    return Pieces(ids=tuple(ids), document=tuple(document))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Passed:
    """What a model made of text.

    Attributes:
        losses: summed over the tokens of each document, in nats; None if not asked for.
        predicted: how many tokens of each document were predicted.
        flops_per_token: floating-point operations, counted.
        experts_per_token: on average over tokens and mixtures; None for a model that does not say.
    """

    losses: Float[np.ndarray, " documents"] | None
    predicted: Int[np.ndarray, " documents"]
    flops_per_token: float
    experts_per_token: float | None


@torch.no_grad()
def passed(
    model: nn.Module,
    pieces: Pieces,
    *,
    batch_size: int = 8,
    losses: bool = True,
    advance: Callable[[int], None] | None = None,
) -> Passed:
    """Runs a model over text, once.

    Args:
        model: a causal language model of transformers.
        pieces: the text.
        batch_size: pieces in a batch.
        losses: whether they are wanted; of a model that sees later tokens they mean nothing.
        advance: called with the number of tokens done since its last call.
    """
    mixtures = [m for m in model.modules() if isinstance(m, AbstractRouted)]
    device = next(model.parameters()).device
    numbers = {number: place for place, number in enumerate(dict.fromkeys(pieces.document))}
    lost, predicted = np.zeros(len(numbers)), np.zeros(len(numbers), dtype=int)
    flops = rows = 0
    with evaluating(model):
        for places in pieces.batches(batch_size):
            ids = pieces.tensor(places, device)
            recording = record_routing(model) if mixtures else nullcontext({})
            with recording as record, flop_counter() as counter:
                logits = model(input_ids=ids, use_cache=False).logits
            flops += counter.get_total_flops()
            rows += sum(_rows(routing) for made in record.values() for routing in made)
            lines = [numbers[pieces.document[place]] for place in places]
            np.add.at(predicted, lines, ids.shape[1] - 1)
            if losses:
                np.add.at(lost, lines, _losses(logits, ids))
            if advance is not None:
                advance(ids.numel())
    return Passed(
        losses=lost if losses else None,
        predicted=predicted,
        flops_per_token=flops / pieces.tokens,
        experts_per_token=rows / len(mixtures) / pieces.tokens if mixtures else None,
    )


def perplexity(
    losses: Float[np.ndarray, " documents"],
    predicted: Int[np.ndarray, " documents"],
    *,
    resamples: int = 1000,
) -> Interval:
    """exp of the mean loss of a token, with an interval over documents."""

    def of(which: Int[np.ndarray, " items"]) -> float:
        return float(np.exp(losses[which].sum() / predicted[which].sum()))

    return bootstrap(of, len(losses), resamples=resamples)


def perplexity_ratio(
    losses: Float[np.ndarray, " documents"],
    others: Float[np.ndarray, " documents"],
    predicted: Int[np.ndarray, " documents"],
    *,
    resamples: int = 1000,
) -> Interval:
    """One perplexity over another on the same text, the same documents drawn for both."""

    def of(which: Int[np.ndarray, " items"]) -> float:
        return float(np.exp((losses[which] - others[which]).sum() / predicted[which].sum()))

    return bootstrap(of, len(losses), resamples=resamples)


def _losses(
    logits: Float[Tensor, "batch tokens words"], ids: Int[Tensor, "batch tokens"]
) -> Float[np.ndarray, " pieces"]:
    """Of each piece, a sequence at a time: its logits in float32 may be large."""
    sums = [
        nn.functional.cross_entropy(one[:-1].float(), row[1:], reduction="sum")
        for one, row in zip(logits, ids, strict=True)
    ]
    return torch.stack(sums).double().cpu().numpy()


def _rows(routing: Any) -> int:
    return int(routing.rows_per_expert.sum()) if isinstance(routing, SparseRouting) else 0


__all__ = ["Passed", "Pieces", "passed", "perplexity", "perplexity_ratio", "pieces_of"]
