"""The study of better answers: no learning from what is judged, metrics by hand, one JSON."""

import json
import lzma
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from moefold.preference import FitConfig, Groups
from moefold.preference.text import together
from studies.better_answer import learning, main, scores
from studies.better_answer.absolute import answer_score, answer_was_best
from studies.better_answer.data import ALPACA, LLMBAR, Answers, read_alpaca, read_llmbar, spread
from studies.better_answer.features import lengths_of, with_features
from studies.better_answer.judging import (
    by_writer,
    interval,
    measured,
    pair_accuracy,
    plain_baselines,
)
from studies.better_answer.learning import held_out_scores, learnt, parts, trained
from studies.better_answer.report import tables, write_plot
from studies.better_answer.settings import ARMS, ATTACK, STRONG, Arm, Settings
from studies.better_answer.vectors import vectors
from studies.files import claim, read_json
from studies.tables import with_tables

REAL = Path(os.environ.get("MOEFOLD_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (REAL / ALPACA).exists(), reason=f"the answers are not at {REAL}; set MOEFOLD_DATA"
)
HERE = Path(main.__file__).parent

TINY = Settings(
    seeds=(0, 1),
    folds=2,
    arms=("length alone", "pairs by score", "scores, linear"),
    few_writers=("pairs by score",),
    attacked=("pairs by score",),
    transferred=("pairs by score",),
    within=("length alone",),
    epochs=1,
    batch=8,
    tried=((1e-2, 0.1),),
)
WRITERS = ("ada", STRONG[0], STRONG[1], "bob", ATTACK)


Pair = tuple[float, float]


class Stub:
    """Stands for an encoder: a vector of counts of letters, and a note of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str], **_: object) -> torch.Tensor:
        self.asked += texts
        return torch.tensor([[float(text.count(letter)) for letter in "aeiou "] for text in texts])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    draw = np.random.default_rng(0)

    def text() -> str:
        return " ".join(draw.choice(["an", "ode", "is", "up"], draw.integers(1, 9)))

    rows = [
        {
            "instruction": f"prompt {n}",
            "cands": [[writer, round(float(draw.random()), 3), text()] for writer in WRITERS],
        }
        for n in range(8)
    ]
    sets = ["Natural", *(f"Adversarial/{name}" for name in ("Neighbor", "GPTInst"))] * 4
    pairs = [
        {
            # One prompt stands in both files, one pair holds a separator of lines.
            "input": f"prompt {n}" if n == 3 else f"question {n}",
            "output_1": f"{text()}\u2028{text()}",
            "output_2": text(),
            "label": 1 + n % 2,
            "set": f"LLMBar/{name}",
        }
        for n, name in enumerate(sets)
    ]
    (folder / ALPACA).write_bytes(lzma.compress(json.dumps(rows).encode()))
    lines = "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs) + "\n"
    (folder / LLMBAR).write_bytes(lzma.compress(lines.encode()))
    return folder


def made_up(count: int = 12, split: list[str] | None = None) -> Groups:
    """Groups of two to four vectors, of which the first number is what they are worth."""
    draw = torch.Generator().manual_seed(1)
    groups = [torch.randn(2 + n % 3, 4, generator=draw) for n in range(count)]
    return Groups.of(
        groups,
        utilities=[one[:, 0] for one in groups],
        split=split or [f"p{n}" for n in range(count)],
    )


# -- data ------------------------------------------------------------------------------------------


def test_answers_come_with_their_writers_and_scores(source: Path):
    found = read_alpaca(source)
    assert found.groups.lengths.tolist() == [5] * 8
    assert found.writers[:5] == list(WRITERS)
    assert found.groups.context == found.groups.split == [f"prompt {n}" for n in range(8)]
    kept = {pool: int(found.by(pool).sum()) for pool in ("16 writers", "15 writers", "13 writers")}
    assert kept == {"16 writers": 40, "15 writers": 32, "13 writers": 16}


def test_the_better_answer_of_a_pair_is_worth_one(source: Path):
    found = read_llmbar(source).groups
    assert found.category is not None
    assert found.category[:3] == ["Natural", "Neighbor", "GPTInst"]
    assert found.utilities is not None
    assert found.utilities[:4].tolist() == [1, 0, 0, 1]  # labels 1 and 2
    assert "\u2028" in found.candidates[0]
    assert len(found) == 12


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no alpaca.* and no llmbar.*; give --data"):
        read_alpaca(tmp_path)


def test_a_spread_goes_from_the_first_on():
    assert spread([0, 1, 2, 3, 4, 5], 3) == [0, 2, 4]
    assert spread([0, 1], None) == spread([0, 1], 5) == [0, 1]


@needs_data
def test_the_real_files_are_as_told():
    alpaca, llmbar = read_alpaca(REAL), read_llmbar(REAL)
    assert (len(alpaca.groups), len(llmbar.groups)) == (805, 419)
    attacks = {
        text
        for text, who in zip(alpaca.groups.candidates, alpaca.writers, strict=True)
        if who == ATTACK
    }
    assert len(attacks) == 1  # the same whatever the prompt
    assert set(STRONG) < set(alpaca.writers)


# -- vectors and features --------------------------------------------------------------------------


def test_each_text_is_encoded_once_and_kept(tmp_path: Path):
    stub, done = Stub(), []
    first = vectors(["a", "ee"], tmp_path, "x", lambda: stub, done.append)
    assert sorted(stub.asked) == ["a", "ee"]
    assert done == [2]
    assert first["ee"].tolist() == [0, 2, 0, 0, 0, 0]
    again = vectors(["ee", "a"], tmp_path, "x", _never)
    assert torch.equal(again["ee"], first["ee"])
    vectors(["ee", "a"], tmp_path, "another", lambda: stub)
    assert len(stub.asked) == 4


def test_what_was_encoded_before_a_stop_is_not_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("studies.better_answer.vectors.AT_ONCE", 1)

    def stop(_: int) -> None:
        raise InterruptedError("killed")

    stub = Stub()
    with pytest.raises(InterruptedError, match="killed"):
        vectors(["a", "ee"], tmp_path, "x", lambda: stub, stop)
    vectors(["a", "ee"], tmp_path, "x", lambda: stub)
    assert stub.asked == ["a", "ee"]


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as they are built, which is what they were given but takes no time to train."""
    monkeypatch.setattr(learning, "fit", lambda *_: None)


def _never() -> Stub:
    raise AssertionError("this was done before")


def test_features_are_of_the_answer_its_prompt_and_its_length():
    groups = Groups.of([["a b", "c\nd\n"]], utilities=[[0, 1]], context=["q"])
    known = {
        "a b": torch.tensor([1.0, 2]), "c\nd\n": torch.tensor([3.0, 4]), "q": torch.tensor([5.0, 6])
    }  # fmt: skip
    rows, prompt = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0, 6], [5, 6]])
    length = torch.tensor([[3.0, 2, 0], [4, 2, 2]]).log1p()

    def given(features: str, *, apart: bool = False) -> Any:
        arm = Arm(features=features, net="linear", loss="listwise", prompt_apart=apart)
        return with_features(groups, known, arm)

    assert torch.allclose(lengths_of(["a b", "c\nd\n"]), length)
    assert torch.equal(given("answer").candidates, rows)
    assert torch.equal(given("answer and prompt").candidates, together(rows, prompt))
    both = given("answer, prompt and length").candidates
    assert torch.allclose(both, torch.cat([together(rows, prompt), length], 1))
    assert given("length").context is None
    assert torch.equal(given("length", apart=True).context, prompt[:1])


# -- what is judged was not learnt from ------------------------------------------------------------


def test_parts_share_no_prompt_and_hold_all():
    split = [f"p{n // 2}" for n in range(12)]  # two groups of each prompt
    groups = made_up(12, split)
    for seed in range(5):
        found = parts(groups, 3, seed)
        assert found.bincount().tolist() == [4, 4, 4]
        for name in set(split):
            assert len({int(p) for p, own in zip(found, split, strict=True) if own == name}) == 1
    assert parts(groups, 3, 0).tolist() != parts(groups, 3, 1).tolist()
    with pytest.raises(ValueError, match="6 prompts cannot be put into 7 parts; give more"):
        parts(groups, 7, 0)


@pytest.mark.usefixtures("untrained")
def test_a_part_is_scored_by_what_the_others_taught(monkeypatch: pytest.MonkeyPatch):
    groups, seen = made_up(), []
    taught = torch.ones(len(groups.candidates), dtype=torch.bool)
    taught[groups.starts[2] + 2] = False  # one of four candidates of the third group

    def spy(arm: Arm, given: Groups, settings: Settings, seed: int) -> learning.Learnt:
        seen.append(given)
        return learnt(arm, given, settings, seed)

    monkeypatch.setattr(learning, "learnt", spy)
    values, chosen = held_out_scores(ARMS["pairs"], groups, TINY, 0, taught)
    part = parts(groups, TINY.folds, 0)
    assert values.isfinite().all()
    assert chosen == [(1e-2, 0.1)] * TINY.folds
    for number, given in enumerate(seen):
        assert groups.split is not None
        wanted = {name for name, own in zip(groups.split, part, strict=True) if own != number}
        assert set(given.split) == wanted
        left_out = int("p2" in wanted)
        assert len(given.candidates) == int(groups.lengths[part != number].sum()) - left_out
    for number, given in enumerate(seen):
        held = groups.take(part == number)
        model = learnt(ARMS["pairs"], given, TINY, 0).model
        mine = values[(part == number)[groups.group_of_candidate]]
        assert torch.equal(mine, model.values(held))


def test_a_rate_is_chosen_by_groups_that_did_not_teach_it(monkeypatch: pytest.MonkeyPatch):
    groups, taught, judged = made_up(), [], []

    def spy(arm: Arm, given: Groups, settings: Settings, how: Pair, seed: int) -> Pair:
        taught.append((how, set(given.split or ())))
        return how

    def worth(how: Pair, rest: Groups) -> torch.Tensor:
        judged.append(set(rest.split or ()))
        return torch.tensor([{0.1: 0.3, 0.2: 0.9, 0.3: 0.5}[how[0]]])

    monkeypatch.setattr(learning, "trained", spy)
    monkeypatch.setattr(learning, "worth_of_choice", worth)
    found = learnt(
        ARMS["pairs"], groups, replace(TINY, tried=((0.1, 1.0), (0.2, 1.0), (0.3, 1.0))), 0
    )
    assert found.how == (0.2, 1.0)
    assert taught[-1] == ((0.2, 1.0), set(groups.split or ()))  # all of them teach in the end
    for (_, own), rest in zip(taught[:3], judged, strict=True):
        assert rest
        assert not own & rest
        assert own | rest == set(groups.split or ())


def test_the_seed_is_that_of_first_weights_and_of_the_order(monkeypatch: pytest.MonkeyPatch):
    given: list[FitConfig] = []
    monkeypatch.setattr(learning, "fit", lambda model, groups, how: given.append(how))
    one, same, other = (
        trained(ARMS["mlp"], made_up(), TINY, (1e-2, 3.0), seed).values(made_up())
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert [how.seed for how in given] == [0, 0, 1]
    assert (given[0].learning_rate, given[0].weight_decay) == (1e-2, 3.0)


@pytest.mark.parametrize("name", ["pair-logistic", "answer-score", "answer-was-best"])
def test_what_an_answer_is_worth_can_be_learnt(name: str):
    arm = Arm(features="answer", net="linear", loss=name)
    model = trained(arm, made_up(60), replace(TINY, epochs=10, batch=16), (2e-1, 0.0), 0)
    # Three of four by chance would be lucky: the best of two, three or four is one in three.
    assert measure_agreement(model.values(made_up(30)), made_up(30)) > 0.75


def measure_agreement(values: torch.Tensor, groups: Groups) -> float:
    from moefold.preference import agreement

    return float(agreement(values, groups).mean())


@pytest.mark.usefixtures("untrained")
def test_prompts_of_both_sources_do_not_teach_what_is_taken_over(
    source: Path, monkeypatch: pytest.MonkeyPatch
):
    data, seen = _data(source), []

    def spy(arm: Arm, given: Groups, settings: Settings, seed: int) -> learning.Learnt:
        seen.append(given)
        return learnt(arm, given, settings, seed)

    monkeypatch.setattr(scores, "learnt", spy)
    groups = with_features(data.llmbar.groups, data.vectors, ARMS["pairs by score"])
    scores.transferred("pairs by score", data, groups, TINY, 0)
    assert seen[0].split == [f"prompt {n}" for n in range(8) if n != 3]
    assert seen[0].lengths.tolist() == [4] * 7  # without the attack
    scores.by_other_sets("pairs by score", groups, TINY, 0)
    for name, given in zip(sorted(set(groups.category or ())), seen[1:], strict=True):
        assert set(given.category) == {"Natural", "Neighbor", "GPTInst"} - {name}


def _data(source: Path) -> scores.Data:
    alpaca, llmbar = read_alpaca(source), read_llmbar(source)
    texts = scores.texts_of(alpaca, llmbar)
    rows = Stub().encode(texts)
    return scores.Data(alpaca=alpaca, llmbar=llmbar, vectors=dict(zip(texts, rows, strict=True)))


# -- losses and metrics, by hand -------------------------------------------------------------------


def test_absolute_losses_are_those_worked_out_by_hand():
    groups = Groups.of([torch.zeros(2, 1)], utilities=[[0.2, 0.9]])
    s = torch.tensor([0.1, -0.3])
    assert answer_score(s, groups, 0.5).tolist() == pytest.approx([0.4**2, 0.7**2])
    wanted = [math.log1p(math.exp(0.1)), math.log1p(math.exp(0.3))]  # the second is the best
    assert answer_was_best(s, groups, 0.5).tolist() == pytest.approx(wanted)


WORKED = Groups.of(
    [["a" * 10, "b" * 11, "c" * 30], ["d" * 5, "e" * 50]],
    utilities=[[0.9, 0.5, 0.45], [0.1, 0.15]],
    context=["p", "q"],
    split=["p", "q"],
)


def test_metrics_are_those_worked_out_by_hand():
    values = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])
    found = measured(values, WORKED, Settings())
    assert found["agreement"].tolist() == [0.5, 0]  # the two of value 1 share it
    assert found["worth"].tolist() == pytest.approx([0.7, 0.1])
    # Clear: 0.9 against 0.5 (a tie, half) and against 0.45 (right); none in the second group.
    assert found["pairs"].tolist() == pytest.approx([0.75, math.nan], nan_ok=True)
    # Of similar length among these: 10 and 11 characters.
    assert found["similar"].tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    assert found["longest"].tolist() == [0, 0]


def test_pairs_on_the_border_count():
    groups = Groups.of([torch.zeros(2, 1)], utilities=[[0.0, 0.25]])
    length = torch.tensor([100.0, 200.0])
    right = torch.tensor([0.0, 1.0])
    assert pair_accuracy(right, groups, 0.25, length, 2.0).tolist() == [1.0]
    assert pair_accuracy(-right, groups, 0.25, length, 2.0).tolist() == [0.0]
    assert pair_accuracy(right, groups, 0.26, length, 2.0).isnan().all()
    assert pair_accuracy(right, groups, 0.25, length, 1.99).isnan().all()


def test_baselines_are_those_worked_out_by_hand():
    axis = torch.eye(2)
    known = {"p": axis[0], "q": axis[1]} | {str(text): axis[0] for text in WORKED.candidates}
    known["c" * 30] = torch.tensor([3.0, 4.0])
    found = {name: values[0].tolist() for name, values in plain_baselines(WORKED, known).items()}
    assert found["chance"] == [0] * 5
    assert found["longest"] == [10, 11, 30, 5, 50]
    assert found["most alike the prompt"] == pytest.approx([1, 1, 0.6, 0, 0])


def test_a_writer_is_known_by_other_prompts_only():
    groups = Groups.of(
        [["a", "b"]] * 4,
        utilities=[[0.0, 1.0], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1]],
        split=[f"p{n}" for n in range(4)],
    )
    data = Answers(groups=groups, writers=["ada", "bob"] * 4)
    part = parts(groups, 2, 0)
    pool = torch.ones(8, dtype=torch.bool)
    found = by_writer(data, TINY, 0, pool).reshape(4, 2)
    assert groups.utilities is not None
    worth = groups.utilities.reshape(4, 2)
    for number in range(4):
        others = worth[part != part[number]].double().mean(0)
        assert found[number].tolist() == pytest.approx(others.tolist())


def test_an_interval_leaves_out_what_has_no_value():
    table = np.array([[0.0, 1.0, math.nan], [0.5, 0.5, math.nan]])
    found = interval(table)
    assert (found["mean"], found["groups"], found["seeds"]) == (0.5, 2, [0.5, 0.5])
    assert found["low"] < 0.5 < found["high"]
    assert interval(table[:, 2:])["mean"] is None


# -- the whole study -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Stub]:
    """A study of made-up answers in this process, with the stub for an encoder, models as built."""
    output, stub = tmp_path_factory.mktemp("study"), Stub()
    with pytest.MonkeyPatch.context() as patch:
        _in_this_process(patch, stub)
        patch.setattr(learning, "fit", lambda *_: None)
        results = main.study(TINY, source, output, 1)
    return results, output, stub


def _in_this_process(patch: pytest.MonkeyPatch, stub: Stub | None) -> None:
    def work(jobs, processes):
        for job in jobs:
            if not job.leaves.exists():
                assert stub is not None, job.name
                job.call(*job.given)

    patch.setattr(main, "work", work)
    for module in (main, scores):
        patch.setattr(module, "pretrained_encoder", _never if stub is None else lambda: stub)


def test_a_study_leaves_results_of_every_row(done: tuple[dict, Path, Stub]):
    results, output, _ = done
    told = read_json(output / "results.json")
    assert told == json.loads(json.dumps(results))
    assert Settings.from_dict(told["settings"]) == TINY
    assert all(len(one) == 64 for one in told["data"]["sha256"].values())
    assert set(told["judged"]) == {"15 writers", "13 writers", "16 writers"}
    for found in told["judged"].values():
        assert set(found) == {"best", "baselines", "15 writers", "13 writers", "16 writers"}
        assert set(found["15 writers"]) == set(TINY.arms)
        chance = found["baselines"]["chance"]["worth"]["mean"]
        assert chance < found["best"]["mean"]
        for rows in (found["baselines"], found["15 writers"]):
            for row in rows.values():
                assert 0 <= row["agreement"]["mean"] <= 1
                assert row["worth"]["mean"] <= found["best"]["mean"] + 1e-9
        assert len(found["15 writers"]["pairs by score"]["worth"]["seeds"]) == 2
        assert found["15 writers"]["pairs by score"]["agreement"]["groups"] == 8
    for pool, count in (("13 writers", 2), ("15 writers", 4), ("16 writers", 5)):
        chance = told["judged"][pool]["baselines"]["chance"]["agreement"]["mean"]
        assert chance == pytest.approx(1 / count)
    names = [one["name"] for one in told["contrasts"]]
    assert "comparing against scores, linear" in names
    assert "mlp against linear" not in names  # there is no mlp in this one
    sets = told["llmbar"]["transfer"]["pairs by score"]
    counted = {name: one["groups"] for name, one in sets.items()}
    assert counted == {
        "Natural": 4, "Neighbor": 4, "GPTInst": 4, "GPTOut": 0, "Manual": 0,
        "adversarial": 8, "all": 12,
    }  # fmt: skip
    assert told["chosen"]["within"]["length alone"] == {"0.01, 0.1": 4}  # two seeds, two folds


def test_the_chance_row_is_the_mean_of_all_answers(done: tuple[dict, Path, Stub], source: Path):
    groups = read_alpaca(source).groups
    assert groups.utilities is not None
    row = done[0]["judged"]["16 writers"]["baselines"]["chance"]
    assert row["worth"]["mean"] == pytest.approx(float(groups.utilities.mean()))
    assert row["agreement"]["mean"] == pytest.approx(1 / 5)
    assert row["pairs"]["mean"] == 0.5


def test_what_is_done_is_not_done_again(
    done: tuple[dict, Path, Stub], source: Path, monkeypatch: pytest.MonkeyPatch
):
    results, output, stub = done
    assert len(stub.asked) == len(set(stub.asked))
    _in_this_process(monkeypatch, None)
    again = main.study(TINY, source, output, 1)
    assert again == results
    with pytest.raises(ValueError, match="a study with another epochs; give another --output"):
        main.study(replace(TINY, epochs=2), source, output, 1)


def test_tables_and_plot_are_made_from_results(done: tuple[dict, Path, Stub], tmp_path: Path):
    results = done[0]
    made = tables(results)
    row = results["judged"]["15 writers"]["15 writers"]["pairs by score"]["worth"]
    assert f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in made["alpaca"]
    row = results["llmbar"]["within"]["length alone"]["all"]
    shown = " to ".join(f"{100 * row[end]:.1f}" for end in ("low", "high"))
    assert f"{100 * row['mean']:.1f} ({shown})" in made["llmbar"]
    assert "| none |" in made["llmbar"]  # sets of which there is no pair
    write_plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_readme_has_the_numbers_of_the_results():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    results = read_json(HERE / "results.json")
    assert with_tables(readme, tables(results)) == readme
    assert (HERE / "results.png").is_file()
    told = " ".join(readme.partition("## What is compared")[0].split())
    intervals = re.findall(r"(\S+?)(?: %)? (\(\S+ to \S+?\))", told)
    assert len(intervals) > 15
    for mean, ends in intervals:
        assert f"| {mean} {ends} |" in readme, (mean, ends)
    assert Settings.from_dict(results["settings"]) == Settings()


# -- settings, files and the command line ----------------------------------------------------------


def test_settings_that_cannot_be_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"arms hold 'oracle'; a study can learn by length alone"):
        replace(TINY, within=("oracle",))
    with pytest.raises(ValueError, match="folds is 1, with 2 seeds and 1 rates; give at least two"):
        replace(TINY, folds=1)
    claim(tmp_path, TINY)
    with pytest.raises(ValueError, match=r"with another folds, seeds; give another --output"):
        claim(tmp_path, replace(TINY, seeds=(5,), folds=3))


def test_scores_that_are_no_numbers_are_not_written(tmp_path: Path):
    path = tmp_path / "arm-0.safetensors"
    with pytest.raises(ValueError, match=r"1 of 2 candidates .* score for arm-0; lower"):
        scores.write_scores(path, torch.tensor([1.0, math.nan]), [(0.1, 1.0)])
    assert not list(tmp_path.iterdir())
    scores.write_scores(path, torch.tensor([1.0, 2.0]), [(0.1, 1.0)])
    values, chosen = scores.read_scores(path)
    assert (values.tolist(), chosen) == ([1.0, 2.0], [(0.1, 1.0)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--data and --output are needed"),
        (["--data", ".", "--output", "x", "--quick", "--publish"], "numbers that mean nothing"),
        (["--data", "nowhere", "--output", "x"], "nowhere has no alpaca"),
    ],
)
def test_a_wrong_command_line_says_why(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main.main(given)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
