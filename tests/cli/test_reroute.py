"""`moefold reroute`: with text a table, a plot, words and a calibrated model; without, a model."""

import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, OlmoeForCausalLM

import moefold
from moefold import routers
from moefold.cli import main
from moefold.cli.reroute import legend_of, table_of
from moefold.cli.texts import read_pairs, read_texts
from moefold.evaluate.budgets import halves
from moefold.evaluate.language import passed
from moefold.evaluate.sweep import Measured, SweepConfig
from moefold.rerouting import rerouting_of
from tests.embedding.tiny import WORDS, tokenizer
from tests.evaluate.test_budgets import example
from tests.rerouting.models import build

# Few draws would do, but the verb has no flag for them; few tokens are few pieces.
QUICK = ["--length", "16", "--tokens", "160"]
PAIRS = [["the rain", "rain falls", 4], ["the sun", "a sun", 5], ["one word", "the hill", 0.5]]


@pytest.fixture
def olmoe(tmp_path: Path) -> str:
    """A mixture with a tokenizer, and text to calibrate it on."""
    torch.manual_seed(0)
    build("olmoe").save_pretrained(tmp_path / "olmoe")
    tokenizer().save_pretrained(tmp_path / "olmoe")
    draw = np.random.default_rng(0)
    words = [" ".join(draw.choice(WORDS[3:], 16)) for _ in range(24)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return "olmoe"


def run(line: str) -> int:
    return main(line.split())


def test_the_example_of_the_help_runs(olmoe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["reroute", "--help"])
    (example,) = re.findall(r"^\s*\$ moefold (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert main([*example.split(), *QUICK]) == 0
    shown = capsys.readouterr().out
    # A line for the untouched model and for each budget; what the budget costs, in words.
    first = [line.split()[0] for line in shown.splitlines() if "%" in line]
    assert first[:6] == ["untouched", "1", "1.25", "1.5", "1.75", "2"]
    assert re.search(
        r"at a budget of 1.5: \d+\.\d % fewer FLOPs per token \(.* -> .*\), 1\.\d\d experts", shown
    )
    assert re.search(r"  perplexity \d+\.\d+ -> \d+\.\d+ \[.*\]: [+-]\d+\.\d %", shown)
    assert "now use unified(inference='threshold', budget=1.5)" in shown
    assert "to learn" not in shown  # it has learnt it
    assert {file.name for file in tmp_path.iterdir()} == {
        *("olmoe", "text.txt", "pairs.jsonl"),
        *("olmoe-rerouted", "olmoe-rerouted-budgets.json", "olmoe-rerouted-budgets.png"),
    }
    loaded = moefold.load("olmoe-rerouted")
    assert type(loaded) is OlmoeForCausalLM
    done = rerouting_of(loaded)
    assert done is not None
    assert done.config is not None
    assert done.config == routers.config("unified", inference="threshold", budget=1.5)
    # It is the model that was measured: the losses of its documents are those in the file.
    asked = SweepConfig(router=done.config, budgets=(1.5,), length=16, tokens=160)
    _, held_out = halves(read_texts(Path("text.txt")), tokenizer(), asked)
    rows = json.loads(Path("olmoe-rerouted-budgets.json").read_text())["rows"]
    (row,) = (row for row in rows if row["budget"] == 1.5)
    again = passed(loaded, held_out)
    assert again.losses is not None
    assert again.losses.tolist() == pytest.approx(row["losses"], rel=1e-5)
    assert again.experts_per_token == row["experts_per_token"]
    assert AutoTokenizer.from_pretrained("olmoe-rerouted")("rain")["input_ids"] == [9]
    assert run("load olmoe-rerouted") == 0
    shown = capsys.readouterr().out
    assert "every file is as it was saved" in shown
    assert "now use unified(inference='threshold', budget=1.5)" in shown


def test_pairs_budgets_and_a_second_run(olmoe, tmp_path, capsys):
    line = "reroute olmoe --calibrate text.txt --pairs pairs.jsonl --budgets 1,2 --results a/b.json"
    assert main([*line.split(), *QUICK]) == 0
    first = capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [row["budget"] for row in found["rows"]] == [None, 1, 2]
    assert found["rows"][1]["quality"]["low"] <= found["rows"][1]["quality"]["mean"]
    assert "pairs: Spearman x100 of similarities with people's scores" in first
    assert "at a budget" not in first  # none was asked for
    assert (tmp_path / "a" / "b.png").stat().st_size > 10_000
    assert main([*line.split(), *QUICK]) == 0
    assert capsys.readouterr().out == first
    assert main([*line.split(), *QUICK, "--alpha", "0.25"]) == 2
    assert "a/b.json holds a sweep with another router; give" in capsys.readouterr().err


def test_a_router_that_sees_later_tokens(olmoe, capsys):
    line = "reroute olmoe --inference group --budget 1 --budgets 2 --calibrate text.txt"
    assert main([*line.split(), *QUICK]) == 0
    shown = capsys.readouterr().out
    assert "no perplexity: unified(inference='group') looks at later tokens" in shown
    assert re.search(r"^ +1 +1\.00 +\d+\.\d % +- ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "router"),
    [
        ("", routers.config("unified", budget=2)),  # as many as the model has
        ("--budget 1.5 --alpha 0.25", routers.config("unified", budget=1.5, alpha=0.25)),
        ("--set budget=1.25", routers.config("unified", budget=1.25)),
        ("--set max-experts=2", routers.config("unified", max_experts=2, budget=2)),
        (
            "--inference prefix --budget 1",
            routers.config("unified", inference="prefix", budget=1.0),
        ),
        ("--router token-choice", None),
        ("--router token-choice --budget 1", routers.config("token-choice", k=1)),
        ("--router token-choice --set k=3", routers.config("token-choice", k=3)),
        ("--router expert-choice", routers.config("expert-choice", capacity_factor=2)),
    ],
)
def test_without_text(olmoe, flags, router, capsys):
    assert run(f"reroute olmoe {flags} --out made") == 0
    assert "2 mixtures of 6 experts (top 2) now use" in capsys.readouterr().out
    done = rerouting_of(moefold.load("made"))
    assert done is not None
    assert done.config == router
    assert not done.faithful


def test_faithful_and_force(olmoe, capsys):
    assert run("reroute olmoe --faithful --output made") == 0
    done = rerouting_of(moefold.load("made"))
    assert done is not None
    assert done.faithful
    assert run("reroute olmoe --output made") == 2
    assert "made holds a model of moefold; add --force to replace it" in capsys.readouterr().err
    assert run("reroute olmoe --output made --force") == 0
    # What was rerouted opens as the model it was, and can be rerouted otherwise.
    assert run("reroute made --budget 1 --output other") == 0
    again = rerouting_of(moefold.load("other"))
    assert again is not None
    assert again.config == routers.config("unified", budget=1.0)


REFUSED = {
    "olmoe --budget 7 --calibrate text.txt": "model.layers.0.mlp: budget is 7.0",
    "olmoe --budget 7": "model.layers.0.mlp: budget is 7.0",
    "olmoe --budget 0 --calibrate text.txt": "budget is 0.0; it must be a finite number of experts",
    "olmoe --calibrate empty.txt": "empty.txt is empty; give text of the kind the model will see",
    "olmoe --calibrate short.txt": "pieces, too few for two halves with an interval; give more",
    "olmoe --calibrate nowhere.txt": "no file at nowhere.txt; give a text file, .jsonl, or .xz",
    "olmoe --calibrate broken.txt.xz": "broken.txt.xz is no text in UTF-8 (Input format not",
    "olmoe --calibrate broken.jsonl": "broken.jsonl, line 2 is no JSON (",
    "olmoe --calibrate numbers.jsonl": "numbers.jsonl, line 1: 7 holds no text; write",
    "olmoe --calibrate text.txt --pairs numbers.jsonl": "line 1: 7 is no pair; write [",
    "olmoe --calibrate text.txt --pairs two.jsonl": "two.jsonl holds 2 pairs; an order needs at",
    "olmoe --calibrate text.txt --output made": "--output is for the model at one budget; say",
    "olmoe --calibrate text.txt --budgets one": "--budgets 'one': write numbers with commas",
    "olmoe --calibrate text.txt --budgets ,": "there are no budgets; give some, as in 1,1.5,2",
    "olmoe --budgets 1,2": "--budgets is for measuring; add --calibrate TEXT_FILE",
    "olmoe --pairs pairs.jsonl": "--pairs is for measuring; add --calibrate TEXT_FILE",
    "olmoe --inference threshold": "a threshold in every block to learn from text; add --calibrate",
    "olmoe --inference predictor": "a predictor in every block to learn from text; add --calib",
    "olmoe --router unfied": "unknown router 'unfied'; did you mean 'unified'",
    "olmoe --router hash": "router 'hash' cannot take the logits of a pretrained gate",
    "olmoe --router token-choice --alpha 0.5": "router 'token-choice' has no setting 'alpha'",
    "olmoe --router token-choice --budget 1.5": "a whole number of experts, not 1.5; take unified",
    "olmoe --set alpha": "--set 'alpha': write name=value",
    "olmoe --set alpha=2": "alpha is 2",
    "olmoe --output text.txt": "text.txt is a file; give a folder",
    "olmoe --output olmoe": "olmoe is not empty and was not written by moefold",
    "bert": "bert is dense: it has no mixture of experts to reroute; make one of it with moefold",
    "upcycled": "upcycled holds an upcycled model; its router is chosen at upcycling: moefold upc",
    "wordless --calibrate text.txt": "wordless has no tokenizer, without which text cannot be read",
    "body --calibrate text.txt": "a OlmoeModel predicts no tokens, and has no perplexity; open it",
    "nowhere": "no folder at 'nowhere'",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained_without_a_trace(line, olmoe, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("the rain falls")
    (tmp_path / "broken.txt.xz").write_text("the rain falls")
    (tmp_path / "broken.jsonl").write_text('"the rain"\n"the\n')
    (tmp_path / "numbers.jsonl").write_text("7\n")
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:2])))
    if line.startswith(("bert", "upcycled")):
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        bert = BertModel(BertConfig(vocab_size=60, num_hidden_layers=2, **sizes))
        bert.save_pretrained(tmp_path / "bert")
        moefold.upcycle(bert)
        moefold.save(bert, tmp_path / "upcycled")
    elif line.startswith("wordless"):
        build("olmoe").save_pretrained(tmp_path / "wordless")
    elif line.startswith("body"):
        body: Any = build("olmoe")
        body.model.save_pretrained(tmp_path / "body")
        tokenizer().save_pretrained(tmp_path / "body")
    capsys.readouterr()
    assert run(f"reroute {line}") == 2
    error = capsys.readouterr().err
    assert REFUSED[line] in error
    assert "Traceback" not in error
    assert not (tmp_path / "made").exists()


def test_texts_in_every_form(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    rows = ['"one"', '["two", 3]', "", '{"text": "three\u2028", "id": 4}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert read_texts(tmp_path / "a.jsonl") == ["one", "two", "three\u2028"]
    for name in ("a.txt", "a.jsonl"):
        packed = tmp_path / f"{name}.xz"
        packed.write_bytes(lzma.compress((tmp_path / name).read_bytes()))
        assert read_texts(packed) == read_texts(tmp_path / name)
    rows = [*PAIRS[:2], {"sentence1": "c", "sentence2": "d", "score": 2}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_pairs(tmp_path / "pairs.jsonl") == [*map(tuple, PAIRS[:2]), ("c", "d", 2.0)]


def test_a_table_without_pairs_has_no_column_for_them():
    sweep = example()
    assert [column.header for column in table_of(sweep).columns][-2:] == ["pairs", "agreement"]
    without = type(sweep)(
        original=Measured(budget=None, experts_per_token=2, flops_per_token=2e9),
        budgets=(Measured(budget=1.0, experts_per_token=1, flops_per_token=1e9),),
        router="unified()",
        no_perplexity=None,
    )
    table = table_of(without)
    assert [column.header for column in table.columns][-2:] == ["perplexity", "agreement"]
    assert [list(column.cells) for column in table.columns] == [
        *(["untouched", "1"], ["2.00", "1.00"], ["100.0 %", "50.0 %"], ["-", "-"], ["-", "-"])
    ]
    assert not any("pairs" in line for line in legend_of(without)[:2])
