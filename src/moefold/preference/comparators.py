"""Comparators: of two candidates, the log-odds that the first is preferred.

    consistent      f(a) - f(b)         an order; n evaluations for n candidates
    antisymmetric   G(a, b) - G(b, a)   P(a > b) + P(b > a) = 1; cycles are possible
    free            G(a, b)             nothing holds; the baseline

Tesauro's network of 1988 has two halves of the same weights and opposite sign: the first kind. The
third is the same network with nothing tied. Around any module, of which only the shapes matter:
f takes candidates and G pairs of them, with the context after them if there is one.

Shapes: `pairs *features` of candidates and contexts, or texts; `pairs` of log-odds.

Source: Tesauro, *Connectionist Learning of Expert Preferences by Comparison Training*, 1988.
"""

import abc
from typing import Any, ClassVar, final

from jaxtyping import Float
from torch import Tensor, nn

from moefold.preference.groups import Groups
from moefold.preference.pairs import Pairs
from moefold.preference.ragged import select

Candidates = Tensor | list[str]


class AbstractComparator(nn.Module, abc.ABC):
    """Compares candidates.

    Attributes:
        consistent: whether all comparisons come from one number for each candidate.
        antisymmetric: whether swapping two candidates changes the sign, exactly.
    """

    consistent: ClassVar[bool] = False
    antisymmetric: ClassVar[bool] = False

    @abc.abstractmethod
    def forward(self, a: Any, b: Any, context: Any = None) -> Float[Tensor, " pairs"]:
        """Log-odds that a is preferred to b.

        Args:
            a: candidates, a tensor `[pairs, *features]` or texts.
            b: as many.
            context: what the two of each pair share, a row for each pair.
        """


@final
class ConsistentComparator(AbstractComparator):
    """f(a) - f(b): never a cycle, and the best of n takes n evaluations.

    f is known up to a constant: a bias of its output gets no gradient from comparisons.

    Args:
        scorer: f, from `[candidates, *features]` or texts (and context) to a number for each.
    """

    consistent = True
    antisymmetric = True

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def scores(self, candidates: Any, context: Any = None) -> Float[Tensor, " candidates"]:
        """The number of each candidate.

        Raises:
            ValueError: the scorer returns something else.
        """
        return _numbers(self.scorer, len(candidates), candidates, context=context)

    def forward(self, a: Any, b: Any, context: Any = None) -> Float[Tensor, " pairs"]:
        """Log-odds that a is preferred to b."""
        return self.scores(a, context) - self.scores(b, context)


@final
class AntisymmetricComparator(AbstractComparator):
    """G(a, b) - G(b, a): swapping the two changes the sign, whatever G is.

    A network with mirrored pairs of hidden units is of this form. Preferences may go in a circle,
    which some do: rock, paper, scissors.

    Args:
        net: G, from two tensors `[pairs, *features]` or lists of texts (and context) to a number
            for each pair.
    """

    antisymmetric = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Any, b: Any, context: Any = None) -> Float[Tensor, " pairs"]:
        """Log-odds that a is preferred to b."""
        count = len(a)
        there = _numbers(self.net, count, a, b, context=context)
        return there - _numbers(self.net, count, b, a, context=context)


@final
class FreeComparator(AbstractComparator):
    """G(a, b), of which nothing is guaranteed: the baseline.

    Args:
        net: as for `AntisymmetricComparator`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Any, b: Any, context: Any = None) -> Float[Tensor, " pairs"]:
        """Log-odds that a is preferred to b."""
        return _numbers(self.net, len(a), a, b, context=context)


@final
class KnownScorer(nn.Module):
    """A scorer whose answers are there already: to ask for them again takes no evaluation.

    Args:
        scores: of the candidates that will be asked for, in their order.
    """

    def __init__(self, scores: Float[Tensor, " candidates"]) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, *_: Any) -> Float[Tensor, " candidates"]:
        """The same scores, whatever is given."""
        return self.scores


def group_scores(comparator: AbstractComparator, groups: Groups) -> Float[Tensor, " candidates"]:
    """The number of every candidate of these groups.

    Raises:
        ValueError: the comparator has none.
    """
    if not isinstance(comparator, ConsistentComparator):
        raise ValueError(
            f"{type(comparator).__name__} gives no candidate a number of its own; use a "
            f"ConsistentComparator, or compare pairs (the loss 'pair-logistic', tournament)"
        )
    context = groups.context
    if context is not None:
        context = select(context, groups.group_of_candidate)
    return comparator.scores(groups.candidates, context)


def log_odds(
    comparator: AbstractComparator, groups: Groups, pairs: Pairs
) -> Float[Tensor, " pairs"]:
    """Log-odds that the winner of each pair is preferred; a scorer sees every candidate once."""
    if isinstance(comparator, ConsistentComparator):
        scores = group_scores(comparator, groups)
        return scores[pairs.winner] - scores[pairs.loser]
    return comparator(
        select(groups.candidates, pairs.winner),
        select(groups.candidates, pairs.loser),
        groups.context_rows(pairs.winner),
    )


def _numbers(net: nn.Module, count: int, *given: Any, context: Any) -> Tensor:
    found = net(*given) if context is None else net(*given, context)
    if isinstance(found, Tensor) and found.shape == (count, 1):
        found = found.squeeze(1)
    if not isinstance(found, Tensor) or found.shape != (count,):
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{type(net).__name__} returned {what} for {count} candidates or pairs; it must return "
            f"a number for each, [{count}] or [{count}, 1]"
        )
    return found
