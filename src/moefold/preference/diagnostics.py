"""How well a comparator chooses as the expert did, and how sound its preferences are.

Shapes: `groups`, `candidates`, `pairs`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.preference.comparators import AbstractComparator
from moefold.preference.groups import Groups
from moefold.preference.pairs import every_two
from moefold.preference.ragged import highest, rows_as_array, select, total


def agreement(values: Float[Tensor, " candidates"], groups: Groups) -> Float[Tensor, " groups"]:
    """Of each group, the chance that the choice is the expert's.

    Where several candidates have the highest value one of them is drawn: with two of them the
    expert's, that is 1/2. Its mean is agreement@1.

    Args:
        values: scores, or points of a tournament.
        groups: with a choice, ranks or utilities; of several best ones each will do.
    """
    group = groups.group_of_candidate
    top = values == highest(values, group, len(groups))[group]
    hit = total((top & groups.best).double(), group, len(groups))
    return hit / total(top.double(), group, len(groups))


def regret(values: Float[Tensor, " candidates"], groups: Groups) -> Float[Tensor, " groups"]:
    """Of each group, what the choice loses against the best, in units of the utilities.

    Raises:
        ValueError: the groups have no utilities.
    """
    if groups.utilities is None:
        raise ValueError("the groups have no utilities; regret is measured in them")
    group = groups.group_of_candidate
    top = values == highest(values, group, len(groups))[group]
    utility = groups.utilities.double()
    got = total(utility * top, group, len(groups)) / total(top.double(), group, len(groups))
    return highest(utility, group, len(groups)) - got


@torch.no_grad()
def antisymmetry_error(comparator: AbstractComparator, groups: Groups) -> dict[str, float]:
    """How far swapping two candidates is from changing the sign of their log-odds.

    Returns:
        `largest` |z(a, b) + z(b, a)|, and `contradictions`, the share of pairs for which both
        orders prefer the same position.

    Raises:
        ValueError: no group has two candidates.
    """
    if not bool((groups.lengths > 1).any()):
        raise ValueError(f"none of {len(groups)} groups has two candidates that could be swapped")
    one, other = every_two(groups)
    half = one < other
    a, b = select(groups.candidates, one[half]), select(groups.candidates, other[half])
    context = groups.context_rows(one[half])
    there, back = comparator(a, b, context), comparator(b, a, context)
    return {
        "largest": float((there + back).abs().max()),
        "contradictions": float((there * back > 0).double().mean()),
    }


def by_category(values: Float[Tensor, " groups"], groups: Groups) -> dict[str, dict[str, float]]:
    """Mean, standard error and number of each category's groups, the largest category first.

    Args:
        values: such as `agreement`.
        groups: with categories.

    Raises:
        ValueError: the groups have no categories.
    """
    if groups.category is None:
        raise ValueError("the groups have no categories; give category")
    size = Counter(groups.category)
    names = sorted(size, key=lambda name: (-size[name], name))
    place = {name: n for n, name in enumerate(names)}
    own = torch.tensor([place[name] for name in groups.category])
    found = {}
    for name in names:
        part = values.cpu()[own == place[name]].double()
        spread = float(part.std() / len(part) ** 0.5) if len(part) > 1 else float("nan")
        found[name] = {"mean": float(part.mean()), "standard_error": spread, "groups": len(part)}
    return found


def seen_before(groups: Groups, known: Groups) -> Bool[Tensor, " groups"]:
    """Which groups have, in any order, the candidates (and the context) of one that is known.

    Splitting by match still leaves openings that many matches share; what is learnt by heart there
    says nothing of judgement.
    """
    told = set(_fingerprints(known))
    return torch.tensor([one in told for one in _fingerprints(groups)], dtype=torch.bool)


def _fingerprints(groups: Groups) -> Sequence[Any]:
    contents = _hashed(groups.candidates)
    context = [None] * len(groups) if groups.context is None else _hashed(groups.context)
    ends = groups.lengths.cumsum(0).tolist()
    starts = groups.starts.tolist()
    return [
        (shared, frozenset(contents[start:end]))
        for shared, start, end in zip(context, starts, ends, strict=True)
    ]


def _hashed(items: Tensor | list[str]) -> list[Any]:
    if isinstance(items, list):
        return items
    return [row.tobytes() for row in rows_as_array(items)]
