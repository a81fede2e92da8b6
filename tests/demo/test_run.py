"""The demo from end to end: a tiny random encoder, sixty pairs, seconds."""

import importlib
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

import moefold
from moefold.demo import DemoSettings, run, twins
from moefold.demo.bars import Bars
from moefold.demo.folder import claim, forget
from moefold.demo.pairs import mine, split
from tests.demo.library import write_library
from tests.train.tiny import tiny_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder, a small library and the demo's output."""
    root = tmp_path_factory.mktemp("demo")
    tiny_folder(root / "encoder")
    write_library(root / "library")
    return root


@pytest.fixture(scope="module")
def settings(place: Path) -> DemoSettings:
    return DemoSettings(
        model=str(place / "encoder"),
        seeds=2,
        examples=16,
        batch_size=8,
        warmup_examples=8,
        learning_rate=1e-3,
        max_tokens=32,
        heldout=None,
        precision="fp32",
    )


@pytest.fixture(scope="module")
def printed() -> StringIO:
    return StringIO()


@pytest.fixture(scope="module")
def results(place: Path, settings: DemoSettings, printed: StringIO) -> dict:
    torch.set_num_threads(1)
    console = Console(file=printed, width=200)
    return run(settings, place / "out", console=console, library=place / "library")


def test_the_mixture_computes_the_same_at_birth(results: dict, printed: StringIO):
    birth = results["birth"]
    # Two experts with equal weights and combine weights that sum to 1 up to float32: a few times
    # 2^-24 in each of two layers of an encoder of width 16.
    assert 0 <= birth["relative_error_max"] < 1e-5
    assert birth["cosine_min"] > 1 - 1e-9
    assert f"{birth['relative_error_max']:.1e}" in printed.getvalue()


def test_twins_are_compared_on_the_same_budgets(results: dict, settings: DemoSettings):
    models, flops = results["models"], results["flops_per_pair"]
    assert flops["moe"] > flops["dense"]
    assert models["moe"]["examples"] == models["dense"]["examples"] == settings.examples
    continued = models["dense-continued"]
    # At least the MoE's operations, and less than a batch more.
    more = continued["training_flops"] - models["moe"]["training_flops"]
    assert 0 <= more < settings.batch_size * flops["dense"]
    assert continued["examples"] > settings.examples
    assert models["untouched"]["examples"] == 0


def test_no_held_out_module_was_trained_on(results: dict, place: Path):
    found = split(mine(place / "library"))
    assert results["data"]["heldout_modules"] == sorted({p.module for p in found.heldout})
    assert results["data"]["train_pairs"] == len(found.train)
    assert results["data"]["sha256"] == found.digest()


def test_both_twins_saw_the_same_data_in_the_same_order(results: dict):
    # The mixture computes what the dense encoder does at birth, and the first loss is computed
    # before any update: it is equal but for dropout, which draws alike in both, and rounding.
    for seed in range(2):
        curves = {
            one["kind"]: one["curve"]["loss"]
            for one in results["runs"]
            if one["seed"] == seed and "curve" in one
        }
        assert len(curves["moe"]) == 2
        assert len(curves["dense"]) > 2
        # Losses are of size one to ten, logits of size 20 in float32.
        assert curves["moe"][0] == pytest.approx(curves["dense"][0], rel=1e-4)


def test_training_moved_all_of_them(results: dict, place: Path):
    values = {}
    for file in (place / "out" / "runs").glob("*.json"):
        for name, one in json.loads(file.read_text())["results"].items():
            values[f"{file.stem} {name}"] = tuple(one["values"]["ndcg@10"])
    assert len(values) == 1 + 2 * 3
    assert len(set(values.values())) > 4  # a small corpus may rank alike now and then


def test_the_saved_mixture_is_the_trained_one(results: dict, settings: DemoSettings, place: Path):
    loaded = moefold.load(place / "out" / "moe")
    assert isinstance(loaded, SentenceTransformer)
    assert loaded.max_seq_length == 24  # the encoder's own, not what the demo cut texts to
    loaded.max_seq_length = settings.max_tokens
    materials = twins.Materials(
        settings=settings,
        train=(),
        heldout=split(mine(place / "library")).heldout,
        flops={"moe": 1.0, "dense": 1.0},
        fingerprint="",
        own_tokens=None,
        out=place,
    )
    values = twins.evaluate(loaded, materials, "moe", Bars(Console(file=StringIO())))
    stored = json.loads((place / "out" / "runs" / "seed-0-moe.json").read_text())
    assert values == stored["results"]["moe"]["values"]
    assert stored["kind"] == results["runs"][1]["kind"] == "moe"


def test_what_is_printed_is_what_is_stored(results: dict, printed: StringIO, place: Path):
    stored = json.loads((place / "out" / "results.json").read_text())
    assert stored["comparisons"] == json.loads(json.dumps(results["comparisons"]))
    text = printed.getvalue()
    for verdict in results["verdicts"]:
        assert verdict in text
    assert f"{results['models']['moe']['ndcg@10']['mean']:.4f}" in text
    assert stored["versions"]["torch"] == torch.__version__


def test_the_page_shows_the_verdict_and_the_sites(results: dict, place: Path):
    html = (place / "out" / "report.html").read_text()
    minus = "\N{MINUS SIGN}"
    assert results["verdicts"][0].split(":")[0].split(" by ")[0] in html
    assert "layer 1" in html
    assert "layer 3" in html
    assert f"MoE {minus} dense twin" in html


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins that cost the same, without the seconds that counting takes."""
    module = importlib.import_module("moefold.demo.run")
    monkeypatch.setattr(module, "training_flops", lambda *_: 1.0)


@pytest.mark.usefixtures("uncounted")
def test_a_finished_run_is_not_run_again(
    results: dict, settings: DemoSettings, place: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(twins, "fine_tune", never)
    console = Console(file=StringIO(), width=200)
    again = run(settings, place / "out", console=console, library=place / "library")
    assert again["comparisons"] == results["comparisons"]
    # The time says what it all took, not how quickly it was looked up.
    assert again["seconds"] > sum(one.get("wall_seconds", 0.0) for one in results["runs"])
    # Other settings are another run.
    other = replace(settings, learning_rate=2e-3)
    with pytest.raises(AssertionError, match="trained again"):
        run(other, place / "out", console=console, library=place / "library")


@pytest.mark.usefixtures("uncounted")
def test_an_unfinished_run_is_run_again_and_finished_ones_are_kept(
    settings: DemoSettings, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    console = Console(file=StringIO(), width=200)
    trained: list[int] = []
    real = twins.fine_tune

    def counting(encoder, pairs, tuning, **rest):
        trained.append(tuning.examples)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(encoder, pairs, tuning, **rest)

    monkeypatch.setattr(twins, "fine_tune", counting)
    one = replace(settings, seeds=1)
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path, console=console, library=place / "library")
    assert [f.name for f in (tmp_path / "runs").glob("seed*")] == ["seed-0-moe.json"]
    run(one, tmp_path, console=console, library=place / "library")
    # First the MoE, then the dense twin, interrupted; then only the dense twin.
    assert trained == [16, 16, 16]
    # A lost mixture is made again.
    for file in (tmp_path / "moe").rglob("*.safetensors"):
        file.unlink()
    (tmp_path / "moe").rename(tmp_path / "lost")
    run(one, tmp_path, console=console, library=place / "library")
    assert trained[3:] == [16]


@pytest.mark.usefixtures("uncounted")
def test_a_mixture_is_never_taken_for_that_of_other_settings(
    settings: DemoSettings, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One demo finishes; another with other settings is interrupted once its mixture is saved; then
    # the first is called again: its file would match, but `moe/` is the other's.
    console = Console(file=StringIO(), width=200)
    one = replace(settings, seeds=1)
    run(one, tmp_path, console=console, library=place / "library")
    with monkeypatch.context() as patch:
        patch.setattr(twins, "write_json", _interrupt)
        other = replace(one, examples=8)
        with pytest.raises(KeyboardInterrupt):
            run(other, tmp_path, console=console, library=place / "library")
    mixed = _weights(tmp_path)
    run(one, tmp_path, console=console, library=place / "library")
    assert _weights(tmp_path) != mixed


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _weights(out: Path) -> bytes:
    (file,) = (out / "moe").rglob("*.safetensors")
    return file.read_bytes()


@pytest.mark.usefixtures("uncounted")
def test_a_router_that_looks_at_the_group_runs_too(
    settings: DemoSettings, place: Path, tmp_path: Path
):
    router = moefold.routers.config("expert-choice", capacity_factor=2.0)
    config = moefold.UpcycleConfig(moe=moefold.MoEConfig(num_experts=4, router=router))
    other = replace(settings, upcycle=config, seeds=1, examples=8)
    console = Console(file=StringIO(), width=200)
    found = run(other, tmp_path, console=console, library=place / "library")
    # It does not keep the function at birth, and the demo says so instead of hiding it.
    assert found["birth"]["relative_error_max"] > 1e-3
    assert "another function" in found["plan"]


def test_too_little_to_train_on(settings: DemoSettings, tmp_path: Path):
    small = replace(settings, batch_size=64, examples=64)
    console = Console(file=StringIO())
    with pytest.raises(
        ValueError, match=r"yields \d+ pairs to train on, fewer than one batch of 64"
    ):
        run(small, tmp_path / "out", console=console, library=write_library(tmp_path / "l"))


def test_a_folder_of_somebody_else_is_left_alone(settings: DemoSettings, tmp_path: Path):
    console = Console(file=StringIO())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "important.json").write_text("{}")
    with pytest.raises(ValueError, match="holds files that no demo wrote"):
        run(settings, tmp_path, console=console, fresh=True)
    assert (tmp_path / "runs" / "important.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        run(settings, tmp_path / "file", console=console)


def test_fresh_forgets_finished_runs_and_nothing_else(tmp_path: Path):
    claim(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("seed-0-moe.json", "untouched.json", "mine.json"):
        (tmp_path / "runs" / name).write_text("{}")
    forget(tmp_path)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["mine.json"]
    claim(tmp_path)  # what a demo made it may use again
