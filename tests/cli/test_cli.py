"""The command line: its verbs, its frozen flags, its errors, and every example in its help."""

import json
import re
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import moefold
from moefold import cli
from moefold.cli import main
from moefold.surgery.encoder import MINILM_PACKAGE
from moefold.surgery.hosts.layer import is_moe_layer

OFF_BY = r"measured +on 6 sample sentences: the output of the model is off by (\S+) of its length"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "rain", "token", "."]


@pytest.fixture
def dense(tmp_path):
    """A BERT-like folder with a tokenizer, as the real classes save it."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(tmp_path / "dense")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "dense")
    return "dense"


def help_of(verb: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


# The flags are a promise: to change this list is to break somebody's script.
SURGERY = [
    "--alpha",
    "--backend",
    "--birth",
    "--birth-set",
    "--budget",
    "--capacity",
    "--capacity-factor",
    "--copy-noise-std",
    "--experts",
    "--group",
    "--k",
    "--no-renormalize",
    "--num-experts",
    "--renormalize",
    "--router",
    "--router-at",
    "--router-std",
    "--set",
    "--shared-width",
    "--sites",
    "--slots",
]
FLAGS = {
    "doctor": ["--leakage"],
    "evaluate": sorted(
        [
            *("--batch-size", "--data", "--device", "--mteb", "--output", "--router", "--set"),
            *("--faithful", "--no-faithful", "--force", "--no-force"),
            *("--instructions", "--no-instructions", "--clean-text", "--no-clean-text"),
            *("--kind", "--layer", "--max-length", "--pooling", "--prompt", "--routing-of"),
            *("--fit", "--routing-pooling", "--similarity-weight", "--standardize"),
        ]
    ),
    "list": [],
    "plan": sorted([*SURGERY, "--dtype"]),
    "upcycle": sorted(
        [
            *SURGERY,
            "--force",
            "--max-shard-size",
            "--no-force",
            "--no-stream",
            "--out",
            "--seed",
            "--stream",
        ]
    ),
}


# Their examples need what another verb has written.
LATER = {
    "load": [],
    "reroute": sorted(
        [
            *("--alpha", "--batch-size", "--budget", "--budgets", "--calibrate", "--device"),
            *("--faithful", "--no-faithful", "--force", "--no-force", "--inference", "--length"),
            *("--out", "--output", "--pairs", "--results", "--router", "--set", "--tokens"),
        ]
    ),
    "save": ["--force", "--no-force", "--out"],
}


@pytest.mark.parametrize("verb", [*FLAGS, *LATER])
def test_flags_are_frozen(verb, capsys):
    text = help_of(verb, capsys)
    found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
    assert sorted(set(found) - {"--help"}) == (FLAGS | LATER)[verb]


def test_verbs_are_frozen(capsys):
    assert list(cli.VERBS) == [
        *(
            "bench",
            "demo",
            "doctor",
            "evaluate",
            "export",
            "load",
            "list",
            "save",
            "plan",
            "prefer",
            "reroute",
            "revert",
            "upcycle",
        )
    ]
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in cli.VERBS)


def examples(text: str) -> list[list[str]]:
    """Words of every line of `text` that is an example."""
    return [line.split() for line in re.findall(r"^\s*\$ moefold (.*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("verb", list(FLAGS))
def test_every_verb_has_an_example_that_runs(verb, capsys):
    (words,) = examples(help_of(verb, capsys))
    assert words[0] == verb
    _needs_the_encoder(words)
    assert main(words) == 0
    assert capsys.readouterr().out


def test_the_example_of_moefold_itself_runs(capsys):
    assert main([]) == 0
    (words,) = examples(capsys.readouterr().out)
    _needs_the_encoder(words)
    assert main(words) == 0
    assert "3 of 6 MLPs become 8 experts" in capsys.readouterr().out


def _needs_the_encoder(words: list[str]) -> None:
    if "minilm" in words:
        try:
            cli.version(MINILM_PACKAGE)
        except ModuleNotFoundError:
            pytest.skip(f"the package {MINILM_PACKAGE} is not installed")


def test_help_imports_no_verb():
    code = (
        "import sys\n"
        "from moefold.cli import main\n"
        "main(['--help'])\n"
        "guests = ('tyro', 'rich', 'transformers', 'sentence_transformers', 'safetensors')\n"
        "print([name for name in guests if name in sys.modules])\n"
        "print([name for name in sys.modules if name.startswith('moefold.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "[]"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"moefold \d+\.\d+\S*\n", capsys.readouterr().out)


def test_upcycle_and_load_back(dense, tmp_path, capsys):
    assert main(["upcycle", dense, "--out", "moe", "--num-experts", "4", "--sites", "last:2"]) == 0
    shown = capsys.readouterr().out
    assert "BertModel (bert): 2 of 4 MLPs become 4 experts, router token-choice(k=2" in shown
    assert "+ encoder.layer.3" in shown
    change = re.search(OFF_BY, shown)
    # Renormalised copies: float32 rounding, relative.
    assert change is not None
    assert float(change.group(1)) < 1e-5
    assert "read back, every weight is the same" in shown
    loaded = moefold.load("moe")
    assert isinstance(loaded, BertModel)
    kinds = [is_moe_layer(layer) for layer in loaded.encoder.layer]
    assert kinds == [False, False, True, True]
    tokenizer = AutoTokenizer.from_pretrained("moe")
    with torch.no_grad():
        output = loaded(**tokenizer(["the rain."], return_tensors="pt"))[0]
    assert output.shape == (1, 5, 16)
    assert output.isfinite().all()
    source = json.loads((tmp_path / "moe" / "moefold.json").read_text())["source"]
    assert source["name"] == "dense"


def test_the_change_is_told_when_there_is_one(dense, capsys):
    assert main(["upcycle", dense, "--out", "moe", "--router", "soft", "--slots", "2"]) == 0
    shown = capsys.readouterr().out
    assert "at birth               another function: experts see mixtures of tokens" in shown
    change = re.search(OFF_BY, shown)
    assert change is not None
    assert float(change.group(1)) > 1e-2


def test_a_folder_is_replaced_only_if_told_to(dense, capsys):
    assert main(["upcycle", dense, "--out", "moe"]) == 0
    first = moefold.load("moe").state_dict()
    assert main(["upcycle", dense, "--out", "moe", "--seed", "1"]) == 2
    assert "moe holds an upcycled model; add --force to replace it" in capsys.readouterr().err
    assert main(["upcycle", dense, "--out", "moe", "--seed", "1", "--force"]) == 0
    second = moefold.load("moe").state_dict()
    name = "encoder.layer.1.moe.router.weight"
    assert not torch.equal(first[name], second[name])
    assert main(["upcycle", dense, "--out", "moe", "--force"]) == 0
    assert torch.equal(first[name], moefold.load("moe").state_dict()[name])  # the seed again


def test_settings_of_the_router(dense, capsys):
    words = "--router unified --budget 1.5 --alpha 0.25 --group 4 --shared-width 8"
    assert main(["plan", dense, *words.split()]) == 0
    shown = capsys.readouterr().out
    assert "router unified(budget=1.5, alpha=0.25, group=4)" in shown
    assert "rows per token         1.50" in shown
    assert main(["plan", dense, "--k", "1", "--no-renormalize"]) == 0
    assert "router token-choice(k=1, renormalize=False)" in capsys.readouterr().out


def test_renormalize_is_passed_on_whenever_it_is_said(dense, capsys):
    def shown(*words: str) -> str:
        assert main(["plan", dense, *words]) == 0
        return capsys.readouterr().out.partition("\n")[0]

    biased = ("--router", "bias-balanced")
    assert "renormalize=False" in shown(*biased, "--no-renormalize")
    assert "renormalize=False" not in shown(*biased)
    assert "renormalize=True" in shown(*biased, "--renormalize")
    assert "renormalize=True" in shown()
    assert "renormalize=True" not in shown("--router", "expert-choice")
    assert "renormalize=True" in shown("--router", "expert-choice", "--renormalize")


def test_any_setting_of_the_router(dense, capsys):
    words = ["--router", "hash", "--set", "by=position"]
    assert main(["plan", dense, *words]) == 0
    assert "router hash(k=1, by='position'" in capsys.readouterr().out
    assert main(["upcycle", dense, "--out", "moe", *words]) == 0
    assert "router hash(k=1, by='position'" in capsys.readouterr().out
    words = ["--set", "noise-std=0.5", "--set", "k=3", "--copy-noise-std", "0.25"]
    assert main(["plan", dense, *words]) == 0
    shown = capsys.readouterr().out
    assert "noise_std=0.5" in shown
    assert "rows per token         3.00" in shown
    assert "noise of standard deviation 0.25 is added to every copy" in shown


REFUSED = {
    "plan nowhere": "plan: no folder at 'nowhere'; give an existing local folder, the word",
    "plan dense --router expert-chioce": "unknown router 'expert-chioce'; did you mean 'expert-ch",
    "plan dense --router soft --k 2": "router 'soft' has no setting 'k'",
    "plan dense --router unified --no-renormalize": "router 'unified' has no setting 'renormalize'",
    "plan dense --router unified --renormalize": "router 'unified' has no setting 'renormalize'",
    "plan dense --set k": "--set 'k': write name=value, as in --set k=2",
    "plan dense --set kk=2": "has no setting 'kk'",
    "plan dense --k 9": "k is 9, but there are only 8 experts",
    "plan dense --sites last:9": "sites 'last:9': N must be a whole number from 1 to 4",
    "plan dense --router-std -1": "router_std is -1.0; it must be a finite number, zero or more",
    "plan pickled": "pytorch_model.bin is a pickle, which is never opened, and no safetensors",
    "plan empty": "cannot open empty as a transformer",
    "plan vocab.txt": "model 'vocab.txt' is a file; give the folder that holds config.json",
    "plan dense --router-at soft": "--router-at 'soft': write PATTERN=ROUTER, as in --router-at",
    "plan dense --router-at layer=soft(k)": "--router-at 'k': write name=value, as in --router-at",
    "plan dense --router-at layer=sofd": "unknown router 'sofd'; did you mean 'soft'",
    "plan dense --router-at nowhere=soft": "moe_at (--router-at) 'nowhere' matches no site that",
    "upcycle dense --out empty/../dense": "dense is not empty and was not written by moefold",
    "upcycle dense --out .": "is the current directory; give a folder inside it, or another one",
    "upcycle dense --out vocab.txt/a/moe": "vocab.txt/a/moe: ",
    "plan dense --backend quick": "unknown backend 'quick'",
    "upcycle dense --out moe --backend quick": "unknown backend 'quick'",
    "plna dense": "moefold: unknown verb 'plna'; did you mean 'plan'? There are: bench, demo",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_explained_without_a_trace(line, dense, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert REFUSED[line] in error
    assert "Traceback" not in error
    assert not (tmp_path / "moe").exists()


def test_an_upcycled_folder_is_not_a_dense_model(dense, capsys):
    assert main(["upcycle", dense, "--out", "moe"]) == 0
    assert main(["plan", "moe"]) == 2
    assert "moe holds an upcycled model; give the dense one" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "plan", ("moefold.no_such_module:main", ""))
    assert main(["plan"]) == 2
    assert "No module named 'moefold.no_such_module'; install what" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys):
    errors = {
        PermissionError(13, "Permission denied", "/root/moe"): "Permission denied: /root/moe",
        OSError(28, "No space left on device"): "No space left on device",
        OSError("no such thing\non the hub"): "no such thing",
        OSError(): "OSError",
    }
    for error, message in errors.items():

        def refuse(_: list[str], error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("moefold.cli.doctor.main", refuse)
        assert main(["doctor"]) == 2
        assert capsys.readouterr().err == f"moefold doctor: {message}\n"


def test_a_folder_that_cannot_be_written_is_refused_first(dense, monkeypatch, capsys):
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setattr("moefold.cli.upcycle.open_model", lambda _: pytest.fail("was opened"))
    assert main(["upcycle", dense, "--out", "moe"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"cannot write to moe: /.*: Permission denied; give a folder else", error)


def test_an_interrupted_verb_says_so(monkeypatch, capsys):
    def interrupted(_: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moefold.cli.doctor.main", interrupted)
    assert main(["doctor"]) == 130
    assert "moefold doctor: interrupted" in capsys.readouterr().err


def test_list_shows_what_is_registered(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for kind, names in {
        "routers": moefold.routers.names(),
        "backends": ["reference", "grouped"],
        "hosts": ["transformers", "sentence-transformer"],
        "layers": ["bert", "llama", "t5-gated", "timm-vit"],
        "births": ["copies"],
        "losses": ["balance", "z"],
    }.items():
        assert f"{kind}\n" in shown
        assert all(f"  {name} " in shown for name in names)
    assert main(["list", "hosts"]) == 0
    assert capsys.readouterr().out.startswith("hosts\n  sentence-transformer ")
    with pytest.raises(SystemExit) as stop:
        main(["list", "cats"])
    assert stop.value.code == 2


def test_doctor_explains_backends(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  {'torch':<22} {torch.__version__}" in shown
    assert "backends on cpu, float64" in shown
    for part in re.split(r"^backends on .*$", shown, flags=re.MULTILINE)[1:]:
        assert part.count("auto takes it") == 1
        assert re.search(r"^  reference +can run", part, re.MULTILINE)


def test_what_reads_no_further_is_no_error(monkeypatch, capsys):
    def closed(_: list[str]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("moefold.cli.doctor.main", closed)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)  # else pytest's own output would end
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("moefold.cli.doctor.main", lambda _: warnings.warn("rain", stacklevel=1))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().err == "moefold doctor: rain\n"
