"""Which tokens compete: `[batch, tokens]` cut into `[groups, members]` and put together again."""

import pytest
import torch

from moefold.routing import Group, Grouping
from tests.routers.common import untyped

# Two sequences of four tokens, numbered as flat tokens:
#
#     sequence 0:  0 1 2 3
#     sequence 1:  4 5 6 7
FLAT = torch.arange(8).reshape(2, 4)

KINDS: list[Group] = ["sequence", "batch", "position", 1, 2, 3, 6, 12]


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("sequence", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("batch", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("position", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (2, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
    ],
    ids=str,
)
def test_split_by_hand(group, expected):
    grouping = Grouping(group, 2, 4)
    assert grouping.split(FLAT).tolist() == expected
    assert (grouping.groups, grouping.members) == (len(expected), len(expected[0]))


def test_a_number_of_tokens_may_span_sequences():
    # Three sequences of two tokens in groups of three: the second sequence is cut in two.
    flat = torch.arange(6).reshape(3, 2)
    assert Grouping(3, 3, 2).split(flat).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("group", KINDS, ids=str)
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)], ids=["", "dim", "experts slots"])
def test_merge_is_the_inverse_of_split(group, rest):
    grouping = Grouping(group, 3, 4)
    tensor = torch.randn(3, 4, *rest)
    split = grouping.split(tensor)
    assert split.shape[:2] == (grouping.groups, grouping.members)
    assert torch.equal(grouping.merge(split), tensor)


@pytest.mark.parametrize("group", ["sequence", "batch", "position", 4], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (4, 0), (0, 0)])
def test_nothing_splits_and_merges(group, batch, tokens):
    grouping = Grouping(group, batch, tokens)
    tensor = torch.randn(batch, tokens, 3)
    split = grouping.split(tensor)
    assert split.shape == (grouping.groups, grouping.members, 3)
    assert grouping.merge(split).shape == tensor.shape


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"group size 3 does not divide the 8 tokens .*2 .* x 4"):
        Grouping(3, 2, 4)


@pytest.mark.parametrize("group", [0, -2, True, 2.0, "document"], ids=repr)
def test_an_unknown_group_is_refused(group):
    with untyped(), pytest.raises(ValueError, match=rf"group is {group!r}; it must be 'sequence'"):
        Grouping(group, 2, 4)
