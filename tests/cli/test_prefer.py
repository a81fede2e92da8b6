"""`moefold prefer`: learning from choices, ranking, evaluating; interrupted and gone on with."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moefold.cli import main, prefer_apply
from moefold.demo.bars import Bars
from moefold.preference.model import PreferenceModel
from moefold.preference.saved import load
from moefold.surgery.encoder import MINILM_PACKAGE

QUICK = "--epochs 12 --batch-size 32 --hidden 8 --learning-rate 0.05"
SHORT = "--epochs 2 --batch-size 64 --hidden 4"

FLAGS = {
    "fit": [
        *("--batch-size", "--comparator", "--device", "--encoder", "--epochs", "--evaluate-every"),
        *("--force", "--held-out", "--hidden", "--hold-out", "--learning-rate", "--loss"),
        *("--loss-set", "--net", "--no-force", "--no-standardize", "--no-train-encoder", "--out"),
        *("--output", "--save-every", "--seed", "--set", "--standardize", "--train-encoder"),
        *("--warmup", "--weight-decay"),
    ],
    "rank": ["--device", "--out", "--output"],
    "evaluate": ["--device", "--out", "--output"],
}


def decisions(count: int, *, seed: int = 0, least: int = 2) -> list[dict[str, Any]]:
    """The expert likes a large first number and a small third one; the second is noise."""
    draw = random.Random(seed)
    found = []
    for n in range(count):
        size = draw.randint(least, 6)
        candidates = [[round(draw.gauss(0, 1), 3) for _ in range(3)] for _ in range(size)]
        worth = [a - abs(c) for a, _, c in candidates]
        kind = "wide" if size > 3 else "narrow"
        chosen = worth.index(max(worth))
        found.append(
            {"candidates": candidates, "chosen": chosen, "split": f"m{n // 4}", "category": kind}
        )
    return found


def write(name: str, rows: list[dict[str, Any]], *only: str) -> None:
    rows = [{k: v for k, v in row.items() if not only or k in only} for row in rows]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path: Path) -> None:
    write("choices.jsonl", decisions(200))
    write("others.jsonl", decisions(80, seed=1))
    write("candidates.jsonl", decisions(30, seed=2, least=1), "candidates")


def run(line: str) -> int:
    return main(["prefer", *line.split()])


def lines_of(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("verb", list(FLAGS))
def test_flags_are_frozen_and_every_verb_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        run(f"{verb} --help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
    assert sorted(set(found) - {"--help"}) == FLAGS[verb]
    (example,) = re.findall(r"^\s*\$ moefold (.*)$", text, re.MULTILINE)
    assert example.startswith(f"prefer {verb} ")


def test_the_examples_of_the_help_run(files, capsys):
    """One after the other: the second and the third need what the first has written."""
    examples = []
    for verb in ("", "fit ", "rank ", "evaluate "):
        with pytest.raises(SystemExit):
            run(f"{verb}--help")
        examples += re.findall(r"^\s*\$ moefold (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert examples[0] == examples[1]
    for example in examples[1:]:
        # The example of fit trains for a thousand steps.
        words = [*example.split(), *(QUICK.split() if "fit" in example else [])]
        assert main(words) == 0
    shown = capsys.readouterr().out
    assert "wrote my-expert, with report.html and report.json" in shown
    assert "30 decisions ranked; wrote candidates-ranked.jsonl and candidates-ranked.html" in shown
    assert "wrote my-expert-choices.json and my-expert-choices.html" in shown


def test_what_is_learnt_is_what_the_expert_does(files, tmp_path, capsys):
    assert run(f"fit choices.jsonl --output made --held-out others.jsonl {QUICK}") == 0
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    held_out = report["held_out"]
    assert held_out["groups"] == 80
    # The expert is a function that 8 hidden units can nearly be, and it is never of two minds.
    assert held_out["agreement"] > 0.8
    assert held_out["agreement"] > held_out["chance"] + 0.3
    assert held_out["temperature"] == load("made").temperature != 1.0  # it was calibrated
    told = 100 * held_out["agreement"]
    assert f"agreement   {told:.1f} ±" in shown.out
    assert set(held_out["categories"]) == {"wide", "narrow"}
    assert "200 decisions to learn from" in shown.err
    assert "80 decisions held out" in shown.err
    page = (tmp_path / "made" / "report.html").read_text()
    assert f"In {told:.1f} % of 80 decisions the model chooses as the expert did." in page
    assert report["history"]["loss"][-1] < report["history"]["loss"][0]
    assert not (tmp_path / "made-checkpoints").exists()


def test_evaluating_says_what_fitting_said(files, tmp_path, capsys):
    assert run(f"fit choices.jsonl --output made --held-out others.jsonl {QUICK}") == 0
    assert run("evaluate made others.jsonl --output told.json") == 0
    found = json.loads(Path("told.json").read_text())
    fitted = json.loads((tmp_path / "made" / "report.json").read_text())["held_out"]
    assert fitted["unseen"]["groups"] == 80
    for name in ("agreement", "chance", "groups", "candidates", "temperature"):
        assert found[name] == pytest.approx(fitted[name], rel=1e-12), name
    # Log-odds are differences of float32 scores here, and of the same in float64 there.
    assert found["loss"] == pytest.approx(fitted["loss"], rel=1e-5)
    assert Path("told.html").is_file()
    assert not Path("told.json.partial").exists()
    capsys.readouterr()


def test_ranking_goes_by_the_model(files):
    assert run(f"fit choices.jsonl --output made {QUICK}") == 0
    assert run("rank made candidates.jsonl --output a/ranked.jsonl") == 2  # there is no folder a
    assert run("rank made candidates.jsonl --output ranked.jsonl") == 0
    model = load("made")
    comparator: Any = model.comparator
    rows = [row["candidates"] for row in lines_of("candidates.jsonl")]
    assert 1 in {len(candidates) for candidates in rows}
    for candidates, told in zip(rows, lines_of("ranked.jsonl"), strict=True):
        with torch.no_grad():
            scores = comparator.scores(torch.tensor(candidates))
        assert told["ranking"] == scores.argsort(descending=True).tolist()
        assert told["best"] == told["ranking"][0]
        # Summed in another order, for other candidates were in the same product.
        assert told["values"] == pytest.approx(scores.tolist(), abs=1e-5)
        chances = (scores / model.temperature).softmax(0).tolist()
        assert told["chances"] == pytest.approx(chances, abs=1e-5)


def interrupted_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Whoever sits at the keyboard has seen so many steps of training."""
    seen = 0
    advance = Bars.advance

    def stop(self: Bars, work: float) -> None:
        nonlocal seen
        seen += work == 1  # reading moves by more
        if seen > steps:
            raise KeyboardInterrupt
        advance(self, work)

    monkeypatch.setattr(Bars, "advance", stop)


def test_an_interrupted_fit_goes_on_and_ends_alike(files, tmp_path, monkeypatch, capsys):
    line = f"fit choices.jsonl --hold-out 0.2 {QUICK} --save-every 20"
    assert run(f"{line} --output whole") == 0
    with monkeypatch.context() as patched:
        interrupted_after(patched, 50)
        assert run(f"{line} --output parts") == 130
    assert (tmp_path / "parts-checkpoints" / "checkpoint-40").is_dir()
    assert not (tmp_path / "parts").exists()
    capsys.readouterr()
    assert run(f"{line} --output parts") == 0
    seen = re.findall(r"step (\d+) of 60: ", capsys.readouterr().err)
    assert seen
    assert min(map(int, seen)) > 40  # it did not begin anew
    one, other = (load_file(f"{name}/model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    told = [json.loads(Path(f"{name}/report.json").read_text()) for name in ("whole", "parts")]
    assert told[0] == told[1]  # the curve of the first part too


def test_other_settings_are_no_continuation(files, monkeypatch, capsys):
    line = f"fit choices.jsonl {QUICK} --save-every 20 --output made"
    with monkeypatch.context() as patched:
        interrupted_after(patched, 50)
        assert run(line) == 130
    assert run(f"{line} --seed 1") == 2
    assert "is of a run with other groups, another model or other settings" in (
        capsys.readouterr().err
    )
    # --force begins anew, over a model too, and what it has begun goes on without it.
    assert run(f"{line} --seed 2 --force") == 0
    with monkeypatch.context() as patched:
        interrupted_after(patched, 30)
        assert run(f"{line} --seed 1 --force") == 130
    assert run(f"{line} --seed 1") == 0


@pytest.mark.parametrize("verb", ["rank", "evaluate"])
def test_an_interrupted_pass_goes_on(verb, files, monkeypatch, capsys):
    assert run(f"fit choices.jsonl --output made {SHORT}") == 0
    monkeypatch.setattr(prefer_apply, "_AT_ONCE", 20)  # four pieces
    line, suffix = f"{verb} made others.jsonl --output", "jsonl" if verb == "rank" else "json"
    assert run(f"{line} whole.{suffix}") == 0
    calls = []
    values = PreferenceModel.values

    def stop(self: PreferenceModel, *args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return values(self, *args, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(PreferenceModel, "values", stop)
        assert run(f"{line} parts.{suffix}") == 130
        assert not Path(f"parts.{suffix}").exists()
        with Path(f"parts.{suffix}.partial").open("a") as stream:
            stream.write("[0.5, ")  # it died while it wrote
        capsys.readouterr()
        assert run(f"{line} parts.{suffix}") == 0
    assert len(calls) == 3 + 2
    assert "candidates were valued before" in capsys.readouterr().err
    assert Path(f"parts.{suffix}").read_text() == Path(f"whole.{suffix}").read_text()
    # Values of another model are not taken for this one's.
    assert run(f"fit choices.jsonl --output made {SHORT} --seed 1 --force") == 0
    Path(f"parts.{suffix}.partial").write_text(json.dumps({"model": "other"}) + "\n[1.0]\n")
    assert run(f"{line} parts.{suffix}") == 0
    assert Path(f"parts.{suffix}").read_text() != Path(f"whole.{suffix}").read_text()


def test_what_is_the_same_twice_is_one_alternative(capsys):
    rows = decisions(60)
    for row in rows:
        row["candidates"].append(row["candidates"][row["chosen"]])
    rows.append({**rows[0], "candidates": [[1, 2, 3]] * 2, "chosen": 1})
    rows.append({**rows[0], "candidates": [[1, 2, 3]], "chosen": 0})
    write("twice.jsonl", rows)
    assert run(f"fit twice.jsonl --hold-out 0 --output made {SHORT}") == 0
    shown = capsys.readouterr()
    assert re.search(r"60 decisions to learn from, .*, 61 duplicates left out", shown.err)
    assert "nothing was held out to judge the model by" in shown.out
    assert run("evaluate made twice.jsonl --output told.json") == 0
    assert json.loads(Path("told.json").read_text())["groups"] == 60


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("--comparator antisymmetric", "AntisymmetricComparator"),
        ("--comparator free --hidden 4", "FreeComparator"),
        ("--net linear --loss listwise", "ConsistentComparator"),
        ("--net mixture --set num-experts=2 --set router=token-choice", "ConsistentComparator"),
        ("--set activation=relu --loss-set margin=0.5 --no-standardize", "ConsistentComparator"),
    ],
)
def test_other_models(flags, kind, files):
    line = f"fit choices.jsonl --epochs 1 --batch-size 64 --output made {flags}"
    assert run(line) == 0
    model = load("made")
    assert type(model.comparator).__name__ == kind
    assert run("rank made candidates.jsonl --output ranked.jsonl") == 0
    told = lines_of("ranked.jsonl")
    assert len(told) == 30
    assert ("chances" in told[0]) == (kind == "ConsistentComparator")
    assert run("evaluate made others.jsonl --output told.json") == 0


REFUSED = {
    "": None,
    "fti choices.jsonl": "unknown 'fti'; did you mean 'fit'? There are: fit, rank, evaluate",
    "fit nowhere.jsonl --output made": "no file at nowhere.jsonl",
    "fit choices.jsonl --output candidates.jsonl": "candidates.jsonl is a file; give a folder",
    "fit choices.jsonl --output full": "full is not empty and holds no model of preferences",
    "fit candidates.jsonl --output made": "says nothing of what the expert chose; add",
    "fit choices.jsonl --output made --net mlq": "the net 'mlq'",
    "fit choices.jsonl --output made --set hidden": "--set 'hidden': write name=value, as in",
    "fit choices.jsonl --output made --set width=3": "net 'mlp' has no setting 'width'",
    "fit choices.jsonl --output made --loss pairs": "unknown preference loss 'pairs'",
    "fit choices.jsonl --output made --hold-out 1": "--hold-out is 1.0; it must be 0 or more",
    "fit choices.jsonl --output made --epochs 0": "epochs is 0; it must be positive",
    "fit choices.jsonl --output made --train-encoder": "--train-encoder needs an encoder",
    "fit choices.jsonl --output made --encoder minilm": "are numbers; leave --encoder out",
    "fit texts.jsonl --output made": "are texts; name what makes vectors of them, as in --encoder",
    "fit texts.jsonl --output made --encoder minilm --comparator free": "that is free does not",
    "rank nowhere candidates.jsonl": "no folder at",
    "evaluate full choices.jsonl": "full has no moefold_preference.json",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained_without_a_trace(line, files, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").touch()
    write("texts.jsonl", [{"candidates": ["a", "b"], "chosen": 0}] * 2)
    if not line:
        assert run(line) == 0
        assert "usage: moefold prefer {fit,rank,evaluate}" in capsys.readouterr().out
        return
    assert run(line) == 2
    error = capsys.readouterr().err
    assert str(REFUSED[line]) in error
    assert "Traceback" not in error
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_is_replaced_only_if_told_to(files, capsys):
    assert run(f"fit choices.jsonl --output made {SHORT}") == 0
    assert run(f"fit choices.jsonl --output made {SHORT}") == 2
    assert "made holds a model; add --force to replace it" in capsys.readouterr().err
    first = load_file("made/model.safetensors")
    assert run(f"fit choices.jsonl --output made {SHORT} --force") == 0
    again = load_file("made/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_texts_with_a_real_encoder(trained, capsys):
    pytest.importorskip("sentence_transformers")
    try:
        from importlib.metadata import version

        version(MINILM_PACKAGE)
    except ModuleNotFoundError:
        pytest.skip(f"the package {MINILM_PACKAGE} is not installed")
    weather = ["It will rain tomorrow.", "Snow fell all night.", "The sun is out.", "Fog lifts."]
    food = ["Bread needs an oven.", "I like soup.", "The cake is sweet.", "Cook the rice."]
    draw = random.Random(0)
    rows = [
        {"candidates": [draw.choice(food), draw.choice(weather)], "chosen": 1} for _ in range(40)
    ]
    for row in rows:
        if draw.random() < 0.5:
            row["candidates"].reverse()
            row["chosen"] = 0
    write("texts.jsonl", rows)
    asked = [{"candidates": ["A storm is coming.", "The salad is fresh."]}]
    write("asked.jsonl", asked)
    line = "fit texts.jsonl --encoder minilm --output made --hold-out 0 --epochs 8"
    assert run(f"{line} --train-encoder --batch-size 8" if trained else f"{line} --epochs 60") == 0
    assert run("rank made asked.jsonl --output ranked.jsonl") == 0
    assert lines_of("ranked.jsonl")[0]["best"] == 0
    assert "A storm is coming." in Path("ranked.html").read_text()
