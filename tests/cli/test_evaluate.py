"""`moefold evaluate`: every kind of model, tasks from a folder, and what is refused."""

import hashlib
import json
import lzma
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import moefold
from moefold.cli import main
from moefold.embedding import EmbeddingConfig, embedder
from moefold.surgery import pretrained_encoder
from tests.embedding.tiny import WORDS, tokenizer
from tests.rerouting.models import build
from tests.train.tiny import tiny_folder

pytest.importorskip("mteb")


@pytest.fixture(autouse=True)
def _no_bars():
    logging.disable_progress_bar()


@pytest.fixture
def data(tmp_path):
    """Pairs of words in the form of STS-B and of STS12 to STS16."""
    rows = [[f"the {a}", f"{b} falls", n % 5.0, 2012 + n % 2] for n, (a, b) in enumerate(pairs())]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "data").mkdir()
    for name in ("stsb_test", "sts12_16"):
        (tmp_path / "data" / f"{name}.jsonl.xz").write_bytes(lzma.compress(text))
    return "data"


def pairs() -> list[tuple[str, str]]:
    words = WORDS[3:]
    return [(words[n], words[-1 - n * n % len(words)]) for n in range(len(words))]


@pytest.fixture
def causal(tmp_path):
    """A pretrained mixture with its tokenizer."""
    build("olmoe").save_pretrained(tmp_path / "olmoe")
    tokenizer().save_pretrained(tmp_path / "olmoe")
    return "olmoe"


def told(task: str = "STSBenchmark", folder: str = "evaluation") -> dict:
    return json.loads(Path(folder, f"{task}.json").read_text(encoding="utf-8"))


def test_without_tasks_it_says_what_there_is(causal, data, capsys, monkeypatch):
    monkeypatch.delenv("MOEFOLD_DATA", raising=False)
    assert main(["evaluate", causal]) == 0
    shown = capsys.readouterr().out
    assert "STS12                     from sts12_16.jsonl.xz" in shown
    assert "give --data FOLDER, or set MOEFOLD_DATA" in shown
    monkeypatch.setenv("MOEFOLD_DATA", data)
    assert main(["evaluate", causal]) == 0
    shown = capsys.readouterr().out
    assert "STS12                     there: sts12_16.jsonl.xz" in shown
    assert "SICK-R                    lacks sick.jsonl.xz" in shown
    assert "next: moefold evaluate olmoe --mteb STSBenchmark --data data" in shown


def test_a_causal_mixture_rerouted_and_not(causal, data, capsys):
    words = f"evaluate {causal} --mteb STSBenchmark STS12 --data {data} --device cpu".split()
    assert main(words) == 0
    done = capsys.readouterr()
    assert "olmoe, hidden of OlmoeForCausalLM, as it is" in done.out
    assert "cosine_spearman" in done.out
    assert "mean" in done.out
    assert "running STS12" in done.err
    assert told()["model"]["embedding"] == EmbeddingConfig().to_dict()
    assert main(words) == 0  # nothing is run again
    done = capsys.readouterr()
    assert done.out.count("finished before") == 2
    assert "running" not in done.err
    other = "--kind sum --prompt prompteol --router unified --set budget=1.5 --set alpha=0.25"
    assert main([*words, *other.split()]) == 2
    assert (
        "STSBenchmark.json is the result of another model, setting or data"
        in capsys.readouterr().err
    )
    assert main([*words, *other.split(), "--output", "other"]) == 0
    assert "sum of OlmoeForCausalLM, unified(budget=1.5, alpha=0.25)" in capsys.readouterr().out
    one, two = told(), told(folder="other")
    assert two["model"]["router"] == {"name": "unified", "settings": {"budget": 1.5, "alpha": 0.25}}
    assert two["model"]["embedding"]["kind"] == "sum"
    assert one["model"]["weights_sha256"] == two["model"]["weights_sha256"]
    assert one["score"]["main_score"] != two["score"]["main_score"]


def test_models_in_every_form(data, tmp_path, capsys):
    tiny_folder(tmp_path / "encoder")
    model = build("olmoe")
    moefold.reroute(model, moefold.routers.config("unified", budget=1.5))
    config = EmbeddingConfig(kind="routing")
    embedder(model, tokenizer(), config).save_pretrained("embedder", create_model_card=False)
    from moefold.rerouting.saved import save

    save(model, "rerouted", tokenizer=tokenizer())
    upcycled = pretrained_encoder("encoder")
    moefold.upcycle(upcycled, moefold.UpcycleConfig(), inputs=False)
    moefold.save(upcycled, "upcycled")
    scores = {}
    for name in ("encoder", "upcycled", "embedder", "rerouted"):
        more = ["--kind", "routing"] if name == "rerouted" else []
        words = ["evaluate", name, "--mteb", "STSBenchmark", "--data", data, "--output", name]
        assert main([*words, "--device", "cpu", *more]) == 0, capsys.readouterr().err
        scores[name] = told(folder=name)["score"]["main_score"]
        router = told(folder=name)["model"]["router"]
        assert (router is not None) == (name in ("embedder", "rerouted"))
    # Copies with renormalised weights keep the function; and two folders hold the same model.
    assert scores["upcycled"] == pytest.approx(scores["encoder"], abs=1e-3)
    assert scores["rerouted"] == scores["embedder"]
    assert len(set(scores.values())) >= 2


def test_a_bare_encoder_is_pooled_by_the_mean(data, tmp_path, capsys):
    tiny_folder(tmp_path / "bare")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (tmp_path / "bare" / name).unlink()
    words = ["evaluate", "bare", "--mteb", "STSBenchmark", "--data", data, "--device", "cpu"]
    assert main(words) == 0
    assert "bare, mean of its last hidden states" in capsys.readouterr().out
    assert main([*words, "--pooling", "mean"]) == 2
    assert (
        "bare is an encoder that pools in its own way; --pooling is for" in capsys.readouterr().err
    )
    assert main([*words, "--router", "unified"]) == 2
    assert "--router is for a causal mixture of experts" in capsys.readouterr().err


REFUSED = {
    "--mteb STS17 --data data": "task 'STS17' cannot be taken from a folder; there are: Banking77",
    "--mteb SICK-R --data data": "data lacks sick.jsonl.xz, which SICK-R takes its data from",
    "--mteb STSBenchmark --data nowhere": "no folder at nowhere; give one that holds the tasks'",
    "--mteb Rain": "mteb has no task 'Rain'",
    "--set k=1": "--set is a setting of --router, which is not given",
    "--batch-size 0": "--batch-size is 0; it must be at least 1",
    "--prompt eol": "prompt 'eol' has no place for the text; give one of quotes, prompteol",
    "--mteb STS12 --data data --layer 9": "layer is 9, but OlmoeForCausalLM has hidden states 0",
    "--mteb STS12 --data data --router sofd": "unknown router 'sofd'; did you mean 'soft'",
    "--mteb STS12 --data data --router unified --set budget=9": "budget is 9",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained(line, causal, data, capsys, monkeypatch):
    monkeypatch.delenv("MOEFOLD_DATA", raising=False)
    assert main(["evaluate", causal, *line.split(), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert REFUSED[line] in error
    assert "Traceback" not in error


def test_data_that_cannot_be_fetched(causal, capsys, monkeypatch):
    monkeypatch.delenv("MOEFOLD_DATA", raising=False)
    assert main(["evaluate", causal, "--mteb", "STSBenchmark"]) == 2
    assert "the data of STSBenchmark cannot be fetched (" in capsys.readouterr().err


def test_without_mteb_it_says_what_to_install(causal, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["evaluate", causal]) == 2
    assert "the verb needs mteb; install it: pip install 'moefold[eval]'" in capsys.readouterr().err


def test_a_rerouted_folder_has_its_router(data, capsys):
    model = build("olmoe")
    moefold.reroute(model, "unified")
    from moefold.rerouting.saved import save

    save(model, "rerouted")
    words = ["evaluate", "rerouted", "--mteb", "STS12", "--data", data, "--device", "cpu"]
    assert main(words) == 2
    assert "rerouted has no tokenizer; save the model's own beside it" in capsys.readouterr().err
    save(model, "rerouted", tokenizer=tokenizer())
    assert main([*words, "--router", "seq-topk"]) == 2
    assert "rerouted holds a rerouted model; leave --router out" in capsys.readouterr().err
    assert torch.is_grad_enabled()


def test_features_are_standardized_by_the_texts_of_a_file(causal, data):
    words = ["evaluate", causal, "--mteb", "STSBenchmark", "--data", data, "--kind", "routing"]
    Path("texts.txt").write_text("\n".join(" ".join(pair) for pair in pairs()), encoding="utf-8")
    assert main([*words, "--standardize", "fitted", "--fit", "texts.txt"]) == 0
    digest = hashlib.sha256(Path("texts.txt").read_bytes()).hexdigest()
    assert told()["model"]["fitted_on"] == {"texts": len(pairs()), "sha256": digest}
    fitted = told()["score"]["main_score"]
    assert main([*words, "--output", "plain"]) == 0
    assert told(folder="plain")["score"]["main_score"] != fitted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--standardize", "fitted"], "--fit FILE says which: give both or none"),
        (["--fit", "one.txt"], "--fit FILE says which: give both or none"),
        (["--standardize", "fitted", "--fit", "one.txt"], "one.txt holds 1 line of text; give"),
        (["--standardize", "fitted", "--fit", "none.txt"], "no file at none.txt"),
    ],
)
def test_texts_to_standardize_by_go_with_the_setting(causal, data, words, message, capsys):
    Path("one.txt").write_text("a text\n", encoding="utf-8")
    asked = ["evaluate", causal, "--mteb", "STSBenchmark", "--data", data, "--kind", "routing"]
    assert main([*asked, *words]) == 2
    assert message in capsys.readouterr().err
