"""Groups: what is refused, with its values; parts, splits, and equal candidates made one."""

from typing import Any

import numpy as np
import pytest
import torch

from moefold.preference import UNRANKED, Groups, collapsed
from tests.preference.common import random_groups

NAN = float("nan")
TWO = [[[0.0], [1.0]], [[2.0], [3.0], [4.0]]]


def test_arrays_become_groups():
    groups: Any = Groups.of([np.array(TWO[0]), TWO[1]], chosen=[1, np.array([False, False, True])])
    assert groups.candidates.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert groups.lengths.tolist() == [2, 3]
    assert groups.chosen.tolist() == [1, 2]
    assert groups.starts.tolist() == [0, 2]
    assert groups.group_of_candidate.tolist() == [0, 0, 1, 1, 1]
    assert groups.best.tolist() == [False, True, False, False, True]


def test_texts_with_a_context():
    groups: Any = Groups.of(
        [["a", "b"], ["c", "d", "e"]], chosen=[0, 1], context=["which?", "what?"]
    )
    assert groups.candidates == ["a", "b", "c", "d", "e"]
    assert groups.context_rows(torch.tensor([1, 2, 4])) == ["which?", "what?", "what?"]
    part = groups.take([1])
    assert (part.candidates, part.context, part.chosen.tolist()) == (
        ["c", "d", "e"],
        ["what?"],
        [1],
    )


def test_rankings_with_ties_and_without_some():
    groups: Any = Groups.of(TWO, rankings=[[1, 0], [2, [0, 1]]])
    assert groups.ranks.tolist() == [1, 0, 1, 1, 0]
    groups = Groups.of(TWO, rankings=[[1], [0, 2]])
    assert groups.ranks.tolist() == [UNRANKED, 0, 0, UNRANKED, 1]


def test_the_best_by_utility_may_be_several():
    groups: Any = Groups.of(TWO, utilities=[[0.5, -1.0], [2.0, 1.0, 2.0]])
    assert groups.best.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("groups", "parts", "message"),
    [
        ([TWO[0], [[1.0]]], {"chosen": [0, 0]}, "group 1 has 1 candidates; a choice needs two"),
        ([TWO[0], []], {"chosen": [0, 0]}, "group 1 has 0 candidates"),
        (TWO, {"chosen": [0, 3]}, "group 1 chooses candidate 3 of 3; they are counted from 0"),
        (TWO, {"chosen": [-1, 0]}, "group 0 chooses candidate -1 of 2"),
        (TWO, {"chosen": [0, None]}, "group 1 chooses None; it must be the number"),
        (TWO, {"chosen": [[True, True], 0]}, r"group 0 chooses candidates \[0, 1\]; exactly one"),
        (TWO, {"chosen": [[False, False], 0]}, "group 0 chooses none of its candidates"),
        (TWO, {"chosen": [[True], 0]}, "group 0 has a mask of 1 for 2 candidates"),
        (TWO, {"chosen": [0]}, "chosen has 1 entries for 2 groups"),
        (
            TWO,
            {"rankings": [[0, 1, 0], [0]]},
            "group 0 ranks candidate 0 twice, as 0 and 2: a cycle",
        ),
        (TWO, {"rankings": [[0], [5]]}, "group 1 ranks candidate 5 of 3"),
        (TWO, {"rankings": [[], [0]]}, "group 0 ranks none of its candidates"),
        (TWO, {"utilities": [[1.0], [0, 0, 0]]}, "group 0 has 1 utilities for 2 candidates"),
        (
            TWO,
            {"utilities": [[1, NAN], [0, 0, 0]]},
            "group 0 has utilities that are NaN or infinite",
        ),
        (TWO, {"chosen": [0, 0], "weights": [1, -2]}, r"group 1 has weight -2\.0; it must be zero"),
        ([[[0.0], [NAN]], TWO[1]], {"chosen": [0, 0]}, "group 0 has features that are NaN"),
        (TWO, {"chosen": [0, 0], "context": [[0.0], [NAN]]}, "group 1 has context that are NaN"),
        (
            [TWO[0], [[1.0, 2.0]] * 2],
            {},
            r"group 1 has features of shape \(2,\) and group 0 of shape \(1,\); all must",
        ),
        ([["a", 1.0]], {}, "group 0 mixes texts with something else"),
        (
            [["a", "b"], TWO[0]],
            {},
            r"group 1 has features of shape \(1,\) and group 0 that are texts",
        ),
        (["ab", TWO[0]], {}, "group 0 is one text, 'ab'; it must be a list of texts"),
        (TWO, {"rankings": [[[], 0], [0]]}, "group 0 has no candidate at place 0; leave empty"),
        (TWO, {"rankings": [[0.5], [0]]}, r"group 0 ranks 0\.5; it must be the number of a cand"),
        (TWO, {"rankings": ["a", [0]]}, "group 0 ranks 'a'; it must be the number"),
        (TWO, {"utilities": ["ab", [0, 0, 0]]}, "group 0 has utilities that are no numbers"),
        (TWO, {"chosen": [0, 0], "weights": [None, 1]}, "group 0 has weight None; it must be zero"),
        (
            TWO,
            {"context": [[1.0], [1.0, 2.0]]},
            r"group 1 has context of shape \(2,\) and group 0 of shape \(1,\)",
        ),
        (
            TWO,
            {"context": ["a", [1.0]]},
            r"group 1 has context of shape \(1,\) and group 0 that are texts",
        ),
        (TWO, {"context": [object(), [1.0]]}, "group 0 has a context that is no array and no text"),
        (TWO, {"forced": "skip"}, "forced is 'skip'; allowed: 'error', 'drop'"),
    ],
)
def test_refusals(groups, parts, message):
    with pytest.raises(ValueError, match=message):
        Groups.of(groups, **parts)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"group 0 chooses candidate 9 of 2.*group 1 chooses cand"):
        Groups.of(TWO, chosen=[9, 9])
    many = [TWO[0]] * 9
    with pytest.raises(ValueError, match=r"group 4 chooses candidate 2 of 2.*and 4 more faults"):
        Groups.of(many, chosen=[2] * 9)
    both = r"group 0 chooses candidate 9 of 2.*group 1 has weight -1.*group 0 has features that are"
    with pytest.raises(ValueError, match=both):  # whatever they are of
        Groups.of([[[0.0], [NAN]], TWO[1]], chosen=[9, 0], weights=[1, -1])
    wrong: Any = Groups(
        candidates=torch.zeros(18, 1), lengths=torch.full((9,), 2), chosen=torch.full((9,), 2)
    )
    with pytest.raises(ValueError, match=r"group 4 chooses candidate 2 of 2.*in 4 more groups"):
        wrong.check()


def test_forced_choices_can_be_left_out():
    groups: Any = Groups.of(
        [TWO[0], [[9.0]], TWO[1]], chosen=[1, 0, 2], split=["a", "b", "c"], forced="drop"
    )
    assert groups.lengths.tolist() == [2, 3]
    assert groups.chosen.tolist() == [1, 2]
    assert groups.split == ["a", "c"]


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="lengths add up to 3 candidates, but there are 2"):
        Groups(candidates=torch.zeros(2, 1), lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="split has 2 entries for 1 groups"):
        Groups(candidates=torch.zeros(2, 1), lengths=torch.tensor([2]), split=["a", "b"])


def test_taking_groups_and_putting_them_back():
    groups = random_groups(6, utilities=None, split=list("aabbcc"), category=list("xyxyxy"))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    taken = groups.take(order)
    for place, number in enumerate(order.tolist()):
        own = slice(int(groups.starts[number]), int(groups.starts[number] + groups.lengths[number]))
        there = slice(int(taken.starts[place]), int(taken.starts[place] + taken.lengths[place]))
        assert torch.equal(taken.candidates[there], groups.candidates[own])
        assert taken.category[place] == groups.category[number]
    back: Any = Groups.concatenate([taken.take([n]) for n in order.argsort().tolist()])
    assert torch.equal(back.candidates, groups.candidates)
    assert torch.equal(back.chosen, groups.chosen)
    assert Groups(**back.as_inputs()).split == groups.split


def test_groups_are_taken_by_number_or_mask():
    groups = random_groups(4)
    taken = groups.take(torch.tensor([False, True, False, True]))
    assert torch.equal(taken.candidates, groups.take([1, 3]).candidates)
    assert len(groups.take([])) == 0
    with pytest.raises(ValueError, match="the mask has 2 entries for 4 groups"):
        groups.take([False, True])


def test_ranks_need_a_first():
    def ranked(*ranks: int) -> Groups:
        candidates = torch.zeros(len(ranks), 1)
        lengths = torch.tensor([len(ranks)])
        return Groups(candidates=candidates, lengths=lengths, ranks=torch.tensor(ranks))

    assert ranked(1, 0).check().best.tolist() == [False, True]
    with pytest.raises(ValueError, match="group 0 has no candidate of rank 0, which is the best"):
        ranked(1, 2).check()
    with pytest.raises(ValueError, match="group 0 has ranks below -1, which is no rank"):
        ranked(-5, 0).check()


def test_parts_with_and_without_a_choice_are_not_put_together():
    groups = random_groups(2)
    bare = Groups(candidates=groups.candidates, lengths=groups.lengths)
    with pytest.raises(
        ValueError, match="chosen is given for 1 of 2 parts; give it for all or none"
    ):
        Groups.concatenate([groups, bare])


def test_a_split_keeps_matches_together():
    ids = [f"match {n // 5}" for n in range(200)]
    groups = random_groups(200, split=ids)
    rest, held = groups.split_by(0.3, seed=1)
    assert not set(rest.split) & set(held.split)
    assert len(rest) + len(held) == 200
    assert len(held) == pytest.approx(60, abs=5)
    again = groups.split_by(0.3, seed=1)[1]
    assert torch.equal(again.candidates, held.candidates)
    assert held.split != groups.split_by(0.3, seed=2)[1].split
    with pytest.raises(ValueError, match=r"fraction is 1\.5; it must lie between 0 and 1"):
        groups.split_by(1.5)
    with pytest.raises(ValueError, match="all groups have the split id 'm'; a split needs two"):
        random_groups(3, split=["m"] * 3).split_by(0.5)


def made_one(groups: Groups) -> Any:
    return collapsed(groups)


def test_equal_candidates_become_one_and_the_chosen_stays():
    # The third is the chosen one again; minus zero is zero; the other group has nothing to choose.
    groups: Any = Groups.of(
        [
            [[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [3.0, 0.0]],
            [[5.0, 5.0], [5.0, 5.0]],
            [[1.0, 0], [7, 0]],
        ],
        chosen=[2, 0, 1],
    )
    found, told = made_one(groups)
    assert (told.duplicates, told.forced) == (2, 1)
    assert found.candidates.tolist() == [[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [7.0, 0.0]]
    assert found.chosen.tolist() == [1, 1]
    texts, told = made_one(Groups.of([["a", "b", "a"], ["c", "d"]], chosen=[2, 0]))
    assert (texts.candidates, texts.chosen.tolist()) == (["b", "a", "c", "d"], [1, 0])
    assert told.duplicates == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int8, torch.float64])
def test_candidates_of_any_type_are_found_equal(dtype):
    rows = torch.tensor([[1, 0], [1, 0], [0, 1]]).to(dtype)
    found, told = made_one(Groups.of([rows], chosen=[1]))
    assert told.duplicates == 1
    assert torch.equal(found.candidates, rows[1:])
    assert found.chosen.tolist() == [0]


def test_no_groups_and_no_features_are_made_one_too():
    none, told = made_one(random_groups(2).take([]))
    assert (len(none), told.duplicates, told.forced) == (0, 0, 0)
    alike, told = made_one(Groups(candidates=torch.zeros(3, 0), lengths=torch.tensor([3])))
    assert (len(alike), told.duplicates, told.forced) == (0, 2, 1)


def test_of_equal_candidates_the_best_stays():
    found, _ = made_one(Groups.of([[[1.0], [1.0], [2.0]]], utilities=[[0.0, 3.0, 1.0]]))
    assert found.utilities.tolist() == [3.0, 1.0]
