"""Who chooses a play: PubEval, a net, gnubg's nets, or chance.

A player is asked about many decisions at once, because a match runs thousands of games side by
side. The plays of all decisions lie one after the other and `lengths` says how many belong to each;
the answer counts within the decision.

Shapes: `n` decisions with `m` plays in all; `2 25` men by side and point, [opponent, mover].
"""

from collections.abc import Callable
from typing import Protocol, final

import numpy as np
from jaxtyping import Float, Int, Int8

from moefold_backgammon.gnubg_nn_expert import best_final, import_gnubg_nn
from moefold_backgammon.pubeval import pubeval_scores

Scorer = Callable[[Int8[np.ndarray, "m 2 25"]], Float[np.ndarray, " m"]]
"""Values positions after a play, [opponent, mover], for the mover: the higher the better."""


class Player(Protocol):
    """Whoever can choose a play.

    Attributes:
        name: what it is called in results; another name for another strength.
    """

    name: str

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
        /,
    ) -> Int[np.ndarray, " n"]:
        """The place of the play it takes among the plays of each decision.

        Args:
            before: the positions, [opponent, mover].
            dice: what was rolled.
            finals: the positions after each play, [opponent, mover].
            lengths: how many plays each decision has, at least one.
        """
        ...


@final
class PubEvalPlayer:
    """Tesauro's public benchmark player: a linear function of the position after the play."""

    name = "pubeval"

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """The play with the highest score; the position before decides which weights count."""
        return best_of_each(pubeval_scores(before, finals, lengths), lengths)


@final
class NetPlayer:
    """A net, or anything else that values positions.

    Args:
        scorer: values positions after a play, as many as it is given at a time.
        name: what it is called in results.
        at_once: most positions to value at a time, which bounds the memory.
    """

    def __init__(self, scorer: Scorer, *, name: str = "net", at_once: int = 65536) -> None:
        self.name = name
        self._scorer = scorer
        self._at_once = at_once

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """The play with the highest value, the first of equals.

        Raises:
            ValueError: a value is not a number, or there are more or fewer values than positions.
        """
        return best_of_each(self.scores(finals), lengths)

    def scores(self, finals: Int8[np.ndarray, "m 2 25"]) -> Float[np.ndarray, " m"]:
        """The value of each position.

        Raises:
            ValueError: a value is not a number, or there are more or fewer values than positions.
        """
        parts = [
            np.asarray(self._scorer(finals[at : at + self._at_once]))
            for at in range(0, len(finals), self._at_once)
        ]
        values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        if values.shape != (len(finals),):
            raise ValueError(
                f"{self.name} gave values of shape {values.shape} to {len(finals)} positions; it "
                f"must give one number for each"
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.name} gave {int((~np.isfinite(values)).sum())} of {len(values)} positions "
                f"a value that is no finite number"
            )
        return values


@final
class GnubgNNPlayer:
    """gnubg's nets, in process (needs the package gnubg-nn).

    Args:
        plies: how deep it looks: 0, 1 or 2.

    Raises:
        RuntimeError: gnubg-nn is not installed.
    """

    def __init__(self, *, plies: int = 0) -> None:
        import_gnubg_nn()
        self.name = f"gnubg-nn-{plies}-ply"
        self._plies = plies

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """The play that gnubg's nets value highest.

        Raises:
            RuntimeError: they play what is not among the plays.
        """
        choices = np.flatnonzero(lengths > 1)
        best = np.array(
            [
                best_final(board, (first, second), plies=self._plies)
                for board, (first, second) in zip(
                    before[choices], dice[choices].tolist(), strict=True
                )
            ],
            dtype=np.int8,
        ).reshape(-1, 2, 25)
        wanted = np.zeros_like(before)
        wanted[choices] = best
        same = (finals == np.repeat(wanted, lengths, axis=0)).all(axis=(1, 2))
        missing = choices[np.add.reduceat(same, _starts(lengths))[choices] != 1]
        if len(missing):
            at = int(missing[0])
            raise RuntimeError(
                f"with {dice[at].tolist()} on {before[at].tolist()}, {self.name} plays to "
                f"{wanted[at].tolist()}, which is not one of {lengths[at]} plays"
            )
        return best_of_each(same.astype(np.int8), lengths)


@final
class RandomPlayer:
    """Any legal play, each as likely as the other.

    Args:
        seed: of the draws.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._draw = np.random.default_rng(seed)

    def choose(
        self,
        before: Int8[np.ndarray, "n 2 25"],
        dice: Int8[np.ndarray, "n 2"],
        finals: Int8[np.ndarray, "m 2 25"],
        lengths: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " n"]:
        """A play drawn at random."""
        return self._draw.integers(0, lengths)


def best_of_each(
    scores: Float[np.ndarray, " m"] | Int8[np.ndarray, " m"], lengths: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The place of the highest score within each decision, the first of equals.

    Args:
        scores: of all plays.
        lengths: plays of each decision, at least one.
    """
    starts = _starts(lengths)
    if not len(starts):
        return np.zeros(0, np.int64)
    highest = scores == np.repeat(np.maximum.reduceat(scores, starts), lengths)
    places = np.where(highest, np.arange(len(scores)), len(scores))
    return np.minimum.reduceat(places, starts) - starts


def _starts(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return (np.cumsum(lengths) - lengths).astype(np.int64)


__all__ = [
    "GnubgNNPlayer",
    "NetPlayer",
    "Player",
    "PubEvalPlayer",
    "RandomPlayer",
    "Scorer",
    "best_of_each",
]
