"""The study of a small language model: same start for all, honest judging, numbers from JSON."""

import json
import lzma
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import moefold
from moefold.evaluate.files import whole_file
from studies.files import claim, read_json, write_json
from studies.jobs import Job, work
from studies.language_model import report, training
from studies.language_model.data import HELDOUT, TRAIN, Data, cut, prepare, read_books, spread
from studies.language_model.embedded import embedding_table, tasks, tokenizer, training_texts
from studies.language_model.files import place
from studies.language_model.judging import judge, leaks
from studies.language_model.main import RESULTS, export, study
from studies.language_model.model import new_model, open_trained
from studies.language_model.results import of_rule
from studies.language_model.rules import open_under, rules, without_training
from studies.language_model.settings import TRAINED, Settings, training_router
from studies.language_model.training import RUN, WEIGHTS, train
from studies.tables import with_tables, write_tables

REAL = Path(os.environ.get("MOEFOLD_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (REAL / HELDOUT).exists(), reason=f"the books are not at {REAL}; set MOEFOLD_DATA"
)

TINY = Settings(
    seeds=(0, 1),
    share=0.5,
    vocabulary=270,
    length=16,
    batch=4,
    learning_rate=1e-2,
    dim=16,
    layers=2,
    heads=2,
    experts=4,
    width=8,
    budget=2.0,
    chunks_per_book=4,
    calibration=8,
    teaching=8,
    budgets=(1.5,),
    tasks=(),
    slow_tasks=(),
)

BOOKS = """# Title: {0} One

## Author: {0} A

## Year: 1800

-------
_A line that belongs to it_

{1}

# Title: {0} Two

## Author: {0} B

## Year: 1801

-------
{2}
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    draw = np.random.default_rng(0)
    for name, who in ((TRAIN, "Read"), (HELDOUT, "Kept")):
        texts = [" ".join(draw.choice(["ada", "eats", "figs", "now"], 200)) for _ in range(2)]
        with lzma.open(folder / name, "wt", encoding="utf-8", newline="") as file:
            file.write(BOOKS.format(who, *texts).replace("\n", "\r\n"))
    return folder


@pytest.fixture(scope="module")
def data(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return prepare(source, tmp_path_factory.mktemp("data"), TINY)


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("trained")

    def once(arm: str) -> Path:
        if not (folder / arm / RUN).exists():
            train(TINY, data, arm, 0, folder / arm)
        return folder / arm

    return once


# -- data ------------------------------------------------------------------------------------------


def test_books_come_without_their_heads(source: Path):
    one, two = read_books(source / TRAIN)
    assert (one.title, one.author, two.title) == ("Read One", "Read A", "Read Two")
    assert one.text.startswith("_A line that belongs to it_\n\n")
    assert "Title" not in one.text + two.text


def test_only_the_first_part_of_a_training_book_is_read(source: Path, data: Data):
    told = read_json(data.tokenizer.parent / "data.json")
    texts = [book.text for book in read_books(source / TRAIN)]
    assert told["training_characters"] == sum(len(text) // 2 for text in texts)
    assert told["training_tokens"] == data.train.size


def test_sequences_are_cut_from_the_texts_with_a_mark_between(data: Data):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data.tokenizer))
    ids = [0, *tokenizer.encode("figs now").ids, 0, *tokenizer.encode("ada").ids]
    assert cut(tokenizer, ["figs now", "ada"], len(ids)).tolist() == [ids]
    assert cut(tokenizer, ["figs now", "ada"], len(ids) + 1).size == 0


def test_a_spread_takes_the_first_and_the_last():
    rows = np.arange(10, dtype=np.uint16).reshape(5, 2)
    assert spread(rows, 3).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert spread(rows, 9).tolist() == rows.tolist()


def test_an_order_is_the_seeds_and_holds_every_sequence(data: Data):
    first, again, other = data.order(3), data.order(3), data.order(4)
    assert (first == again).all()
    assert (first != other).any()
    assert sorted(map(tuple, other.tolist())) == sorted(map(tuple, data.train.tolist()))


def test_data_are_made_once(source: Path, data: Data, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("studies.language_model.data.read_books")
    again = prepare(source, data.tokenizer.parent, TINY)
    assert (again.train == data.train).all()
    assert again.heldout.keys() == {"Kept One", "Kept Two"}


def test_missing_texts_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no books_train.* and no books_heldout.*give --data"):
        prepare(tmp_path, tmp_path / "data", TINY)


@needs_data
def test_no_author_is_read_and_judged():
    read, kept = ({b.author for b in read_books(REAL / name)} for name in (TRAIN, HELDOUT))
    assert len(read) > 50
    assert len(kept) > 5
    assert not read & kept


# -- the same start for all ------------------------------------------------------------------------


@pytest.mark.parametrize("arm", TRAINED)
def test_every_way_of_training_begins_with_the_same_weights(arm: str):
    before = new_model(TINY, 5).state_dict()
    model = new_model(TINY, 5)
    router = training_router(TINY, arm)
    if router is not None:
        moefold.reroute(model, router)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(before["lm_head.weight"], new_model(TINY, 6).lm_head.weight)


@pytest.mark.parametrize("arm", TRAINED)
def test_every_way_of_training_sees_the_same_tokens(
    arm: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[int]] = []

    class Watching(training.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["input_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(training, "Trainer", Watching)
    told = train(TINY, data, arm, 1, tmp_path)
    whole = len(data.train) // TINY.batch * TINY.batch
    assert seen == data.order(1)[:whole].tolist()
    assert told["tokens"] == whole * TINY.length


@pytest.mark.parametrize("arm", ["expert-choice", "unified"])
def test_what_competes_computes_the_budget(arm: str, trained: Callable[[str], Path]):
    # 16 tokens and 2 experts each: 32 pairs of a sequence, or 8 of each of 4 experts; no rounding.
    assert read_json(trained(arm) / RUN)["experts_per_token"] == TINY.budget


def test_a_run_that_is_begun_again_ends_the_same(
    data: Data, tmp_path: Path, trained: Callable[[str], Path]
):
    train(TINY, data, "unified", 0, tmp_path)
    again, before = tmp_path / WEIGHTS, trained("unified") / WEIGHTS
    assert again.read_bytes() == before.read_bytes()


def test_thresholds_are_learnt_in_training_and_kept(trained: Callable[[str], Path]):
    router = training_router(TINY, "unified")
    learnt = open_trained(TINY, trained("unified") / WEIGHTS, router, learnt=True)
    fresh = open_trained(TINY, trained("unified") / WEIGHTS, router)
    for name, value in fresh.state_dict().items():
        same = torch.equal(value, learnt.state_dict()[name])
        assert same == (".rerouter." not in name), name


def test_a_loss_that_is_no_number_stops_the_run(data: Data, tmp_path: Path):
    hot = replace(TINY, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"token-choice, seed 0: the loss is .* lower learn"):
        train(hot, data, "token-choice", 0, tmp_path)
    assert not (tmp_path / RUN).exists()


# -- judging ---------------------------------------------------------------------------------------


def test_losses_are_those_of_the_model_itself(data: Data):
    model = new_model(TINY, 0).eval()
    moefold.reroute(model, "token-choice")
    found = judge(model, data)["losses"]
    for title, chunks in data.heldout.items():
        ids = torch.from_numpy(chunks.astype("int64"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, :-1].double()
        plain = -logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean()
        # Losses near 6 in float32 against float64, each of a few roundings of 6e-8.
        assert found[title] == pytest.approx(float(plain), rel=1e-5)


def test_operations_are_counted_by_the_rows_that_are_computed(data: Data):
    d, tokens = TINY.dim, TINY.length

    def by_hand(experts: float) -> float:
        # Multiplications twice: query, key, value and output; scores and mix with every token of
        # the sequence; the gate; three matrices of each expert; and the output.
        layer = 4 * d * d + 2 * tokens * d + d * TINY.experts + experts * 3 * d * TINY.width
        return 2 * (TINY.layers * layer + d * TINY.vocabulary)

    model = new_model(TINY, 0).eval()
    for budget in (2.0, 1.5, 3.0):
        moefold.reroute(model, moefold.routers.config("unified", budget=budget))
        found = judge(model, data)
        # The angles of positions are a product too: half a head for each place of a batch.
        extra = found["flops_per_token"] - by_hand(budget)
        assert 0 <= extra <= 2 * d // TINY.heads // 2
        assert found["experts_per_token"] == budget
        moefold.revert(model)


def test_judging_leaves_the_model_as_it_was(data: Data, trained: Callable[[str], Path]):
    model = open_under(TINY, data, trained("unified") / WEIGHTS, rules(TINY, "unified")["group"])
    ids = torch.from_numpy(data.heldout["Kept Two"].astype("int64"))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        judge(model, data)
        assert torch.equal(model(input_ids=ids).logits, before)


RULED = [(arm, rule) for arm in TRAINED for rule in rules(TINY, arm)]


@pytest.mark.parametrize(("arm", "rule"), RULED, ids=[" ".join(one) for one in RULED])
def test_only_the_groups_own_choice_leaks(
    arm: str, rule: str, data: Data, trained: Callable[[str], Path]
):
    model = open_under(TINY, data, trained(arm) / WEIGHTS, rules(TINY, arm)[rule])
    found = judge(model, data)
    assert found["leakage"]["clean"] == (rule != "group")
    assert found["leakage"]["others"]["rerouted"] == 0
    assert found["leakage"]["later"]["rerouted"] == 0 or rule == "group"
    assert found["losses"].keys() == {"Kept One", "Kept Two"}
    json.dumps(found, allow_nan=False)


def test_token_choice_can_be_rerouted_to_all_that_is_promised(
    data: Data, trained: Callable[[str], Path]
):
    for name, rule in without_training(TINY).items():
        model = open_under(TINY, data, trained("token-choice") / WEIGHTS, rule)
        clean = leaks(model, data.heldout["Kept One"])["clean"]
        assert clean == (not name.endswith("group")), name


def test_a_rule_takes_the_trained_weights(data: Data, trained: Callable[[str], Path]):
    path = trained("token-choice") / WEIGHTS
    model = open_under(TINY, data, path, rules(TINY, "token-choice")["own top k"])
    ids = torch.from_numpy(data.train[:4].astype("int64"))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        fresh = new_model(TINY, 0).eval()(input_ids=ids).logits
    loss, start = (
        functional.cross_entropy(one[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for one in (logits, fresh)
    )
    assert loss < start  # of text it was trained on


def test_a_trained_model_is_a_folder_of_transformers(
    data: Data, trained: Callable[[str], Path], tmp_path: Path
):
    weights = trained("token-choice") / WEIGHTS
    place(tmp_path, "token-choice", 0).parent.mkdir(parents=True)
    place(tmp_path, "token-choice", 0).symlink_to(weights.parent)
    export(TINY, data, tmp_path, tmp_path / "exported")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    ids = torch.from_numpy(data.train[:4].astype("int64"))
    with torch.no_grad():
        wanted = open_trained(TINY, weights, None)(input_ids=ids).logits
        assert torch.allclose(opened(input_ids=ids).logits, wanted, atol=1e-5)
    read = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert read("ada eats").input_ids == tokenizer(data)("ada eats").input_ids
    with pytest.raises(ValueError, match=r"no trained model at .*token-choice-0.*run the study"):
        export(TINY, data, tmp_path / "nowhere", tmp_path / "other")


# -- the order of work -----------------------------------------------------------------------------


def test_a_folder_belongs_to_its_settings(tmp_path: Path):
    claim(tmp_path, TINY)
    claim(tmp_path, TINY)
    assert Settings.from_dict(read_json(tmp_path / "settings.json")) == TINY
    with pytest.raises(ValueError, match=r"another alpha, batch; give another --output"):
        claim(tmp_path, replace(TINY, batch=8, alpha=0.4))


def test_a_stranger_among_the_arms_is_refused():
    with pytest.raises(ValueError, match=r"arms hold 'sinkhorn'; a study can train token-choice"):
        replace(TINY, arms=("unified", "sinkhorn"))


def test_what_is_done_is_not_done_again(tmp_path: Path):
    done = tmp_path / "done"
    done.touch()
    work([Job(name="x", leaves=done, call=_fail, given=())], 1)


def _half(path: Path) -> None:
    path.write_text("half")
    raise InterruptedError("killed")


def _fail() -> None:
    raise AssertionError("this was done before")


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "a.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": math.nan})
    with pytest.raises(InterruptedError, match="killed"), whole_file(path) as beside:
        _half(beside)
    assert list(tmp_path.iterdir()) == []


# -- sentence vectors ------------------------------------------------------------------------------


def test_slow_tasks_are_for_hidden_states_without_a_prompt():
    some = replace(TINY, tasks=("STS12",), slow_tasks=("Banking77Classification",))
    assert tasks(some, "hidden", "none") == ("STS12", "Banking77Classification")
    assert tasks(some, "hidden", "PromptEOL") == tasks(some, "sum", "none") == ("STS12",)


def test_scores_are_shown_as_means_over_seeds_with_the_range_of_their_average():
    scores = {"A": [0.1, 0.3], "B": [0.2, 0.2]}
    results = {
        "settings": {"tasks": ["A", "B"], "slow_tasks": ["C"]},
        "embedded": {
            "trained": {"none": {"hidden": {**scores, "C": [0.5, 0.7]}, "routing": scores}}
        },
    }
    heads, rows = embedding_table(results)
    assert heads == ("model", "prompt", "vector", "A", "B", "average of these", "C")
    assert rows == [
        ("trained", "none", "hidden", "20.0", "20.0", "20.0 (15.0 to 25.0)", "60.0"),
        ("trained", "none", "routing", "20.0", "20.0", "20.0 (15.0 to 25.0)", ""),
    ]


def test_training_texts_are_read_from_the_training_sequences(data: Data):
    texts = training_texts(data)
    assert len(texts) == len(data.train)
    assert set("".join(texts)) <= set("ada eats figs now_A line that belongs to it\n")


# -- results and report ----------------------------------------------------------------------------


def verdict(*losses: float, clean: bool = True) -> dict:
    leak = {"rerouted": 0 if clean else 3, "tokens": 10, "output": 0.0}
    return {
        "router": "r",
        "losses": dict(zip("abc", losses, strict=True)),
        "experts_per_token": 2.0,
        "flops_per_token": 1.5e6,
        "leakage": {
            **dict.fromkeys(("later", "others", "padding", "decoding"), leak),
            "tolerance": 1e-12,
            "clean": clean,
        },
    }


def test_a_rule_is_compared_with_token_choice_by_seed_and_book():
    own = [verdict(1.0, 2.0, 3.0), verdict(2.0, 3.0, 4.0)]
    other = [verdict(0.9, 1.9, 2.9, clean=False), verdict(1.9, 2.9, 3.9, clean=False)]
    found = of_rule(other, own)
    assert found["loss"]["mean"] == pytest.approx(2.4)
    assert found["loss"]["low"] < 2.0 < found["loss"]["high"]
    # Every pair differs by 0.1, whatever is drawn: the books' own spread is not in the interval.
    for end in ("mean", "low", "high"):
        assert found["difference"][end] == pytest.approx(-0.1)
    assert found["leakage"]["later"]["rerouted"] == 6
    assert not found["leakage"]["clean"]


def test_losses_are_shown_as_perplexity():
    interval = {"mean": math.log(50), "low": math.log(40), "high": math.log(60)}
    assert report.perplexity(interval) == "50.0 (40.0 to 60.0)"
    change = {"mean": math.log(0.98), "low": math.log(0.95), "high": math.log(1.01)}
    assert report.relative(change) == "\N{MINUS SIGN}2.0 % (\N{MINUS SIGN}5.0 to +1.0)"


def test_leaks_are_named_with_their_tokens():
    none = {"rerouted": 0, "tokens": 10, "output": 1e-15}
    found = {**dict.fromkeys(("later", "others", "padding", "decoding"), none), "tolerance": 1e-12}
    assert report.leaks({**found, "clean": True}) == "none"
    found |= {"later": {**none, "rerouted": 3}, "decoding": {**none, "output": 1e-3}}
    assert (
        report.leaks({**found, "clean": False})
        == "**leaks**: later tokens 3 of 10, token by token 0 of 10"
    )


def test_tables_are_put_between_their_marks():
    text = "before\n<!-- table: a -->\nold\n<!-- end of table -->\nafter\n"
    made = with_tables(text, {"a": "new"})
    assert made == "before\n<!-- table: a -->\n\nnew\n\n<!-- end of table -->\nafter\n"
    assert with_tables(made, {"a": "new"}) == made
    with pytest.raises(ValueError, match=r"README has no <!-- table: b -->"):
        with_tables(text, {"b": "new"})


@pytest.mark.skipif(not RESULTS.exists(), reason="the study has not been published yet")
def test_the_readme_says_what_the_results_say():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert with_tables(readme, report.tables(read_json(RESULTS))) == readme


def test_the_readme_says_what_the_budgets_say():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    made = report.budget_table(read_json(RESULTS.parent / report.BUDGETS))
    assert with_tables(readme, {"budgets": made}) == readme


def test_budgets_are_shown_against_the_untouched_model():
    def row(budget: float | None, flops: float, mean: float, ratio: float) -> dict:
        about = {"mean": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
        return {
            "budget": budget,
            "experts_per_token": 2.0,
            "flops_per_token": flops,
            "perplexity": {"mean": mean},
            "perplexity_ratio": about,
            "quality": {"mean": 20.0},
            "quality_change": {"mean": -1.0, "low": -2.0, "high": 0.5},
        }

    made = report.budget_table({"rows": [row(None, 200.0, 50.0, 1.0), row(1.5, 150.0, 60.0, 1.2)]})
    assert made.splitlines()[2:] == [
        "| untouched | 2.00 | 100.0 % | 50.0 |  | 20.0 |  |",
        "| 1.5 | 2.00 | 75.0 % | 60.0 | +20.0 % (+10.0 to +30.0) | 20.0 "
        "| \N{MINUS SIGN}1.0 (\N{MINUS SIGN}2.0 to +0.5) |",
    ]


@needs_data
@pytest.mark.slow
def test_a_whole_study_goes_on_where_it_stopped(source: Path, tmp_path: Path):
    pytest.importorskip("mteb")
    here = tmp_path / "source"
    here.mkdir()
    for path in (*source.iterdir(), REAL / "sts12_16.jsonl.xz"):
        (here / path.name).symlink_to(path)
    small = replace(TINY, tasks=("STS16",))
    results = study(small, here, tmp_path / "study", 2)
    text = write_tables(report.tables(results), tmp_path / "tables.md")
    assert "| unified | group |" in text
    assert "**leaks**" in text
    report.write_plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    run = tmp_path / "study" / "trained" / "unified-1" / RUN
    before = run.with_name(WEIGHTS).read_bytes()
    run.unlink()
    again = study(small, here, tmp_path / "study", 2)
    assert run.with_name(WEIGHTS).read_bytes() == before
    for part in ("judged", "rerouted", "embedded"):
        assert again[part] == results[part], part
