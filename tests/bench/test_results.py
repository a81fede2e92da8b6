"""Files of results, the page and the tables made of them."""

import json
import re
from dataclasses import replace

import pytest
import torch

from moefold.bench import run as module
from moefold.bench import scaling
from moefold.bench.models import ModelSettings, run_model
from moefold.bench.page import write_page
from moefold.bench.results import (
    read_results,
    results_folder,
    surroundings,
    write_results,
)
from moefold.bench.run import Asked, run
from moefold.bench.scaling import Scaling, run_scaling
from moefold.bench.settings import Settings
from moefold.bench.shapes import SHAPES, Shape
from tests.bench.common import EXPERTS, QUICK, SOFT, TOKENS, Fake

SMALL = Scaling(
    base=replace(TOKENS, tokens=32),
    tokens=(16, 32),
    experts=(2, 4),
    ks=(1, 2),
    k_experts=4,
    k_width=16,
    widths=(8, 16),
    group_tokens=32,
    group_lengths=(8, 16),
    soft=replace(SOFT, experts=4, slots=2),
    soft_experts=(1, 2),
    fine_ks=(1, 2),
)
GPU = replace(SHAPES["7b-256"], name="on <GPU>")
ASKED = Asked(
    parts=("layers", "decode", "models", "scaling"),
    settings=replace(QUICK, dtypes=("fp32",)),
    shapes=(TOKENS, EXPERTS, GPU),
    peers=[
        Fake("twice", lambda y: 2 * y),
        Fake("rate", another="it is another <layer>"),
        Fake("same"),
    ],
    models=ModelSettings(models=("nowhere",)),
    scaling=SMALL,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Everything, measured once on tiny layers."""
    found = tmp_path_factory.mktemp("bench") / "results.json"
    run(ASKED, found)
    return found


def test_a_run_is_written_whole(file):
    results = read_results(file)
    assert results["finished"]
    assert results["schema"] == 1
    assert [entry["shape"]["name"] for entry in results["layers"]] == ["tokens", "experts"]
    assert [entry["shape"]["name"] for entry in results["decode"]] == ["tokens"]
    assert results["models"][0]["refused"].startswith("no folder at 'nowhere'; give one, or minilm")
    assert results["not_measured"][0]["shape"]["name"] == "on <GPU>"
    found = results["surroundings"]
    assert {"date", "commit", "cpu", "capability", "cores", "threads", "load_before"} <= set(found)
    assert found["versions"].keys() >= {"python", "torch", "moefold"}
    assert results["settings"]["rounds"] == 2


def test_what_is_finished_is_kept_when_a_run_is_stopped(tmp_path, monkeypatch):
    def stops(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_decode", stops)
    asked = replace(ASKED, parts=("layers", "decode"), shapes=(TOKENS,), peers=())
    with pytest.raises(KeyboardInterrupt):
        run(asked, tmp_path / "half.json")
    results = read_results(tmp_path / "half.json")
    assert not results["finished"]
    assert len(results["layers"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["half.json"]  # nothing beside it
    write_page([results], tmp_path / "page.html")
    assert "no: it was stopped" in (tmp_path / "page.html").read_text()


def test_threads_are_given_back(tmp_path):
    import torch

    before = torch.get_num_threads()
    asked = replace(ASKED, parts=("models",), settings=replace(QUICK, threads=2))
    assert run(asked, tmp_path / "r.json")["surroundings"]["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no JSON file"),
        ("[]", "holds no results of `moefold bench`"),
        ('{"kind": "mteb", "schema": 1}', "holds no results of `moefold bench`"),
        ('{"kind": "moefold bench", "schema": 99}', "has schema 99, and this version reads 1"),
    ],
)
def test_other_files_are_refused(text, match, tmp_path):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_results(tmp_path / "other.json")


def test_no_file_and_no_results(tmp_path):
    with pytest.raises(ValueError, match=r"no file at .*; give what `moefold bench` wrote"):
        read_results(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a page needs the results of at least one run"):
        write_page([], tmp_path / "page.html")


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results({"x": float("nan")}, tmp_path / "r.json")
    assert not list(tmp_path.iterdir())


def test_where_results_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(results_folder()) == "."
    for folder in ("benchmarks/layers", "src/moefold/bench"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "src")
    assert results_folder() == tmp_path / "benchmarks" / "results" / "local"


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    from moefold.bench import results

    monkeypatch.setattr(results, "__file__", str(tmp_path / "moefold" / "bench" / "results.py"))
    (tmp_path / "moefold" / "bench").mkdir(parents=True)
    assert surroundings("cpu")["commit"] is None


def test_the_page_shows_it_all(file, tmp_path):
    write_page([read_results(file)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 2 + 8  # two layers; eight curves
    assert text.index("At a glance") < text.index("What ran where") < text.index("Few tokens")
    assert "1 more layers<small>for cuda</small></th><td>not measured" in text
    assert text.count("<details>") == text.count("</details>") > 0
    assert "NOT TIMED, because it is wrong: twice" in text
    assert "<li>twice: it differs from the reference" in text
    assert "it is another &lt;layer&gt;" in text
    assert "on &lt;GPU&gt;" in text
    assert "not measured" in text
    assert "it is for cuda, and this run was on cpu" in text
    assert "no folder at &#x27;nowhere&#x27;" in text
    assert "group length, fp32, 1 thread" in text
    # It can be mailed: nothing is fetched.
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", text)


def test_the_page_tells_runs_apart(file, tmp_path):
    one = read_results(file)
    two, other = json.loads(json.dumps(one)), json.loads(json.dumps(one))
    two["surroundings"]["threads"] = 2
    other["surroundings"] |= {"cpu": "Another", "capability": "NEON"}
    page = tmp_path / "page.html"

    def titles(*several):
        write_page(several, page)
        return re.findall(r"<h3>(.*?)</h3>", page.read_text())

    for name in ("tokens, fp32", "nowhere, fp32", "tokens, fp32", "group length, fp32"):
        assert f"{name}, 1 thread" in titles(one, two)
        assert f"{name}, 2 threads" in titles(one, two)
        torch = one["surroundings"]["versions"]["torch"]
        assert f"{name}, 1 thread, Another (NEON), torch {torch}" in titles(one, other)
    assert "tokens, fp32, 1 thread, inference" in titles(one, two)


def test_a_page_of_wrong_layers_only(file, tmp_path):
    results = read_results(file)
    for entry in results["layers"]:
        entry["records"] = [r for r in entry["records"] if r["kind"] != "ours"]
        entry["records"] = [r for r in entry["records"] if r["variant"] != "same"]
    write_page([{**results, "scaling": []}], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<svg" not in text
    assert "<td>not timed</td><td>none ran</td>" in text


def test_what_another_run_measured_is_not_missing(file, tmp_path):
    results = read_results(file)
    other = json.loads(json.dumps(results))
    other["layers"] = [{**other["layers"][0], "shape": GPU.to_dict()}]
    write_page([results, other], tmp_path / "page.html")
    assert "not measured" not in (tmp_path / "page.html").read_text()


def test_what_the_terminal_shows(file):
    from moefold.cli.bench import _summary

    lines = _summary(read_results(file))
    text = "\n".join(lines)
    assert "tokens, fp32: share of the dense MLP's speed" in lines
    assert re.search(r"  twice +not timed: it differs from the reference", text)
    assert re.search(r"  rate +\d+\.\d ms  \d+ GFLOP/s, not compared", text)
    assert re.search(r"tokens, fp32, 3: dense \d+ µs, moefold \d+ µs, same \d+ µs", text)
    assert lines[-1] == "not measured: on <GPU>: it is for cuda, and this run was on cpu"
    assert "nowhere, fp32: not measured: no folder at 'nowhere'" in text
    assert re.search(r"group length, fp32: soft grows to the power of -?\d+\.\d\d", text)


def test_curves_have_their_points(file):
    curves = {curve["name"]: curve for curve in read_results(file)["scaling"]}
    assert list(curves) == [
        *("tokens", "experts", "k", "width", "group length", "soft experts"),
        *("memory, experts of one width", "memory, finer experts"),
    ]
    assert curves["tokens"]["lines"]["moefold"]["x"] == [16, 32]
    assert list(curves["group length"]["lines"]) == [
        "token-choice",
        "expert-choice",
        "unified",
        "soft",
    ]
    for curve in curves.values():
        for line in curve["lines"].values():
            assert "exponent" in line["fit"]
    # Finer experts: the dense MLP stays the same, so its memory does too.
    dense = curves["memory, finer experts"]["lines"]["dense"]["mib"]
    assert dense[0] == dense[1]


def test_memory_grows_with_the_rows(file):
    # Twice as many rows of one width: more is alive, to the byte and on any machine.
    curves = {curve["name"]: curve for curve in read_results(file)["scaling"]}
    one, two = curves["memory, experts of one width"]["lines"]["moefold"]["mib"]
    assert two > one > 0


def test_memory_of_a_curve_is_beside_weights_and_gradients():
    layer = torch.nn.Linear(16, 16, bias=False)
    # The result of 48 tokens, and the gradient of their input.
    assert scaling._beside_weights(layer, TOKENS, "fp32", "cpu") == 4 * 48 * (16 + 16)


@pytest.mark.parametrize("dtype", ["fp32", "amp"])
def test_one_point_has_no_exponent(dtype, monkeypatch):
    one = replace(SMALL, tokens=(16,), experts=(2,), ks=(1,), widths=(8,), group_lengths=(8,))
    one = replace(one, soft_experts=(1,), fine_ks=(1,), routers=("soft",))
    low = []

    def looked_at(make):
        def made(*given):
            layer = make(*given)
            layer.register_forward_hook(lambda *_: low.append(torch.is_autocast_enabled("cpu")))
            return layer

        return made

    for name in ("ours", "dense"):
        monkeypatch.setattr(scaling, name, looked_at(getattr(scaling, name)))
    for curve in run_scaling(one, dtype, replace(QUICK, rounds=1)):
        assert curve["dtype"] == dtype
        for line in curve["lines"].values():
            assert "fit" not in line
    assert set(low) == {dtype == "amp"}


@pytest.mark.parametrize("dtype", ["fp32", "amp"])
def test_an_upcycled_encoder(dtype, monkeypatch):
    from moefold.bench import models

    model, low = tiny_bert(), []
    model.register_forward_hook(lambda *_: low.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(models, "_opened", lambda name: model)
    which = ModelSettings(models=("bert-12",), batch=2, length=6, experts=4)
    found = run_model("bert-12", dtype, which, QUICK)
    json.dumps(found, allow_nan=False)
    dense, one, two = found["records"]
    assert dense["times_dense"] == [1.0, 1.0, 1.0]
    assert (one["variant"], two["variant"]) == ("top-1 of 4", "top-2 of 4")
    # A router is all that top-1 adds; top-2 runs half of the MLPs twice.
    assert 1 < one["flops_of_dense"] < 1.02 < two["flops_of_dense"] < 1.5
    assert max(one["error"], two["error"]) <= found["tolerance"]
    # Operations are counted without; two errors and three passes are not.
    assert sum(low) == (3 + 3 * (QUICK.rounds + QUICK.warmup) if dtype == "amp" else 0)


def test_an_upcycled_encoder_that_differs_is_not_timed(monkeypatch):
    from moefold.bench import models

    monkeypatch.setattr(models, "_opened", lambda name: tiny_bert())
    made = models._upcycled

    def wrong(*given):
        model = made(*given)
        next(model.parameters()).data.mul_(1.01)  # the embeddings of words
        return model

    monkeypatch.setattr(models, "_upcycled", wrong)
    which = ModelSettings(models=("bert-12",), batch=2, length=6, experts=4, ks=(2,))
    _, two = run_model("bert-12", "fp32", which, QUICK)["records"]
    assert "it differs from the dense model by" in two["refused"]
    assert "ms" not in two


def tiny_bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
        ),
        add_pooling_layer=False,
    )


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rounds": 0}, "rounds=0: it must be at least 1"),
        ({"warmup": -1}, "warmup=-1: it must be at least 0"),
        ({"dtypes": ("fp8",)}, "unknown dtype 'fp8'; there are fp32, bf16, fp16"),
        ({"dtypes": ()}, "give at least one of dtypes and backends"),
        ({"backends": ("grouped_mm",)}, "unknown backend 'grouped_mm'"),
        ({"device": "tpu9"}, "unknown device 'tpu9'; give cpu or cuda"),
        ({"device": "meta"}, "no clock for device 'meta'; give cpu or cuda"),
    ],
)
def test_settings_that_are_impossible(wrong, match):
    with pytest.raises(ValueError, match=match):
        Settings(**wrong)


def test_parts_and_models_that_are_impossible():
    with pytest.raises(ValueError, match="unknown part 'speed'; there are layers, decode"):
        Asked(parts=("speed",))
    with pytest.raises(ValueError, match="k=3 of 2 experts; it must be 1 to that many"):
        ModelSettings(experts=2, ks=(3,))
    with pytest.raises(ValueError, match="batch=0: it must be at least 1"):
        ModelSettings(batch=0)


def test_a_gpu_that_is_not_there():
    import torch

    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="device 'cuda' is not there; give --device cpu"):
        Settings(device="cuda")


def test_shapes_of_another_device_are_not_run(tmp_path):
    asked = Asked(parts=("layers",), settings=QUICK, shapes=(GPU,))
    results = run(asked, tmp_path / "r.json")
    assert "layers" not in results
    assert len(results["not_measured"]) == 1


def test_every_named_shape_is_asked_for_by_default():
    assert Asked().shapes == tuple(SHAPES.values())
    assert all(isinstance(shape, Shape) for shape in Asked().shapes)
