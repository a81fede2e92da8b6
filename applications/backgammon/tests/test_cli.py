"""The command line in process: a small life from labels to a match, and all that can go wrong."""

import io
import json
import shlex
import socket
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from human_lines import human_lines
from moefold_backgammon import gnubg_socket
from moefold_backgammon.board import start, swapped
from moefold_backgammon.cli import main, parser
from moefold_backgammon.gnubg_socket import find_gnubg
from moefold_backgammon.match import MatchConfig, play_match
from moefold_backgammon.players import PubEvalPlayer, RandomPlayer
from moefold_backgammon.plays import plays
from moefold_backgammon.position_id import encode_keys

README = Path(__file__).parents[1] / "README.md"
VERBS = ("label", "benchmark", "train", "evaluate", "match", "play", "serve")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def bm_line():
    """The start with 3 and 1, and two plays."""
    finals, _ = plays(start()[None], np.array([[3, 1]]))
    keys = encode_keys(swapped(finals[:2]))
    return f"m {encode_keys(start()[None])[0]} 3 1 {keys[0]} {keys[1]} 0.25\n"


def said(capsys, *words):
    """What a command that must succeed prints."""
    assert main(words) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line about a command that must fail, which is told from others by its status."""
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("moefold-backgammon: ")
    assert told.err.count("\n") == 1
    return told.err


def finished(file="m.jsonl"):
    return [json.loads(line)["pair"] for line in Path(file).read_text().splitlines()[1:]]


def test_from_labels_to_a_match(capsys):
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    labels = said(capsys, "label", "labels", "--games", "4", "--seed", "3")
    count = labels.split()[0]
    assert 80 < int(count) < 400  # 42 decisions in a game
    assert f"{count} decisions with " in labels
    trained = said(capsys, "train", "labels", "--output", "net", "--epochs", "1", "--hidden", "4")
    assert trained == f"learnt from {count} decisions; wrote net\n"
    made = said(capsys, "benchmark", "test.bm", "--decisions", "4", "--plies", "1")
    assert made.startswith("4 decisions with ")
    assert f"in {count} decisions, regret" in said(capsys, "evaluate", "net", "labels")
    judged = said(capsys, "evaluate", "net", "test.bm", "--results", "out/net.json")
    assert judged.startswith("net: PR ")
    told = json.loads(Path("out/net.json").read_text())
    assert (told["player"], told["decisions"]) == ("net", 4)
    # Its own plays at 1 ply are its own best plays.
    assert "PR 0.00" in said(capsys, "evaluate", "gnubg-nn-1", "test.bm")

    match = ["match", "net", "pubeval", "--results", "match.jsonl", "--pairs"]
    short = said(capsys, *match, "2")
    assert "of 4 games won" in short
    written = Path("match.jsonl").read_bytes()
    assert said(capsys, *match, "2") == short  # nothing is played again
    assert Path("match.jsonl").read_bytes() == written
    Path("match.jsonl").write_bytes(written[:-5])  # interrupted while it was written
    longer = said(capsys, *match, "4")
    assert "of 8 games won" in longer
    assert sorted(finished("match.jsonl")) == [0, 1, 2, 3]
    assert longer == said(capsys, "match", "net", "pubeval", "--pairs", "4")


def test_players_by_name_are_judged_by_labels(capsys):
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    said(capsys, "label", "labels", "--games", "1", "--processes", "2")
    own = said(capsys, "evaluate", "gnubg-nn", "labels", "--results", "own.json")
    assert own.startswith("agreement 1.000 ")
    assert "regret 0.0000" in own
    assert json.loads(Path("own.json").read_text())["agreement"] == 1
    assert float(said(capsys, "evaluate", "pubeval", "labels").split()[1]) < 0.9


def test_people_are_learnt_from_and_judged_by(capsys):
    Path("matches.jsonl").write_text(human_lines([f"match {n}" for n in range(10)]))
    train = ["train", "matches.jsonl", "--output", "net", "--epochs", "1", "--hidden", "4"]
    found = said(capsys, *train, "--held-out", "0.4")
    learnt, apart = (int(word) for word in found.replace("(", "").split() if word.isdigit())
    assert learnt > 0
    assert apart > 0
    judged = said(capsys, "evaluate", "net", "matches.jsonl", "--held-out", "0.4")
    assert judged.startswith(f"net: among all legal plays of {apart} decisions in ")
    every = said(capsys, "evaluate", "pubeval", "matches.jsonl", "--held-out", "1")
    assert f"of {learnt + apart} decisions in 10 matches" in every
    assert "as the people      1.000" in every  # who all play as PubEval does


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train nowhere --output net", "nowhere cannot be read as decisions: there is no such"),
        ("train test.bm --output net", "test.bm is a benchmark, which is for evaluate"),
        ("train empty --output net", "empty holds no .safetensors file"),
        ("train people.jsonl --output net --held-out 1", "nothing is left of 1 matches"),
        ("train people.jsonl --output net --held-out 2", "share 2.0 of the matches"),
        ("train people.jsonl --output net --epochs 0", "epochs is 0"),
        ("evaluate pubeval nowhere.bm", "nowhere.bm cannot be read as decisions: there is no such"),
        ("evaluate pubeval cut.bm", "line 2 of cut.bm, the last, is cut off"),
        ("evaluate pubeval notes.txt", "notes.txt is of no kind"),
        ("evaluate pubeval empty", "empty holds no .safetensors file"),
        ("evaluate pubeval cut.jsonl", "line 3 of cut.jsonl is no human decision"),
        ("evaluate pubeval test.bm --held-out 0.1", "--held-out 0.1 is of human matches"),
        ("evaluate empty test.bm", "empty holds no net of this package"),
        ("evaluate nobody test.bm", "no player 'nobody': give a folder that train wrote, or one"),
        ("match pubeval random --pairs 0", "0 pairs, 1024 at once"),
        ("match pubeval random --pairs 1 --results notes.txt", "line 1 of notes.txt is not of a"),
        ("match pubeval random --pairs 1 --results empty", "empty: Is a directory"),
        ("label labels --games 0", "0 games in shards"),
        ("label labels --top 3", "top 3 at 0 plies"),
        ("label test.bm", "test.bm: File exists"),
        ("label labels --processes 0", "--processes 0: at least one"),
        ("benchmark own.txt", "own.txt does not end in .bm"),
        ("benchmark test.bm", "test.bm is there and was made otherwise: 'm "),
        ("benchmark own.bm --decisions 0", "0 decisions: there must be"),
        ("benchmark own.bm --processes 0", "--processes 0: at least one"),
        ("play nobody", "no player 'nobody'"),
        ("serve nobody", "no player 'nobody'"),
    ],
)
def test_bad_input_is_a_line(capsys, words, says):
    if words.split()[0] in ("label", "benchmark"):
        pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    Path("test.bm").write_text(bm_line())
    Path("cut.bm").write_text((bm_line() * 2)[:-9])
    Path("notes.txt").write_text("milk\neggs\n")
    Path("people.jsonl").write_text(human_lines(["one"], turns=4))
    Path("cut.jsonl").write_text(human_lines(["one"], turns=3)[:-9])
    Path("empty").mkdir()
    assert says in refused(capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "required: VERB"),
        ("dance", "invalid choice: 'dance'"),
        ("match pubeval random --pairs many", "argument --pairs: invalid int value: 'many'"),
        ("serve pubeval --port 99999", "argument --port: '99999' is no port; a number from 0 to"),
        ("label labels --plies 3", "argument --plies: invalid choice: 3"),
    ],
)
def test_words_that_mean_nothing_are_refused(capsys, words, says):
    with pytest.raises(SystemExit) as left:
        main(words.split())
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as theirs:
        theirs.bind(("127.0.0.1", 0))
        theirs.listen()
        port = theirs.getsockname()[1]
        told = refused(capsys, "serve", "pubeval", "--port", str(port))
    assert f"port {port} of this machine is in use; name another by --port" in told


def test_an_interruption_has_a_status_of_its_own(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(RandomPlayer, "choose", interrupted)
    assert main(["match", "pubeval", "random", "--pairs", "1"]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_can_be_typed(capsys, verb):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [line for line in shown if line.startswith(f"moefold-backgammon {verb} ")]
    assert examples
    for line in shown:
        if line.startswith("moefold-backgammon "):
            assert parser().parse_args(shlex.split(line)[1:]).verb


def test_the_readme_shows_every_verb_as_it_can_be_typed():
    shown = [
        line.split("#")[0].split()[1:]
        for line in README.read_text().splitlines()
        if line.strip().startswith("moefold-backgammon ")
    ]
    assert {words[0] for words in shown} == set(VERBS)
    for words in shown:
        assert parser().parse_args(words).verb


def test_without_gnubg_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(gnubg_socket, "PROGRAMS", ("no-such-gnubg",))
    told = refused(capsys, "match", "pubeval", "gnubg", "--pairs", "1")
    assert "there is no program no-such-gnubg" in told
    assert "apt-get install gnubg" in told


def test_without_gnubg_nn_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gnubg_nn", None)
    told = refused(capsys, "match", "pubeval", "gnubg-nn", "--pairs", "1")
    assert "pip install gnubg-nn" in told


STAND_IN = """#!{python}
# A gnubg that plays as PubEval does, and dies of so many questions.
import os, pathlib, re, socket, sys
sys.path[:0] = {path!r}
from moefold_backgammon.external_player import answer
from moefold_backgammon.players import PubEvalPlayer
commands = pathlib.Path(sys.argv[sys.argv.index("-c") + 1]).read_text()
asked = 0
with socket.create_server(("127.0.0.1", int(re.search(r"external .*:(\\d+)", commands)[1]))) as at:
    connection, _ = at.accept()
    for line in connection.makefile("rb"):
        asked += 1
        if asked == int(os.environ["DIES_AFTER"]):
            os._exit(1)
        connection.sendall(answer(line.decode().strip(), PubEvalPlayer()).encode() + b"\\n")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in the place of gnubg."""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN.format(python=sys.executable, path=sys.path))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gnubg_socket, "PROGRAMS", (str(program),))


MATCH = ["match", "pubeval", "gnubg", "--pairs", "3", "--at-once", "1", "--results", "m.jsonl"]


@pytest.mark.usefixtures("stand_in")
def test_a_gnubg_that_dies_is_started_again(capsys, monkeypatch):
    monkeypatch.setenv("DIES_AFTER", "60")
    # It plays as its opponent does, so that every pair of games comes out even.
    assert "+0.000 points per game (+0.000 to +0.000)" in said(capsys, *MATCH)
    assert sorted(finished()) == [0, 1, 2]


@pytest.mark.usefixtures("stand_in")
def test_a_match_goes_on_after_gnubg_could_not(capsys, monkeypatch):
    monkeypatch.setenv("DIES_AFTER", "100000")
    said(capsys, *MATCH[:-2], "--results", "m.jsonl", "--pairs", "1")
    assert finished() == [0]
    monkeypatch.setenv("DIES_AFTER", "1")
    told = refused(capsys, *MATCH)
    assert "gnubg did not answer 'board:" in told
    assert "the finished pairs are in m.jsonl; the same command goes on" in told
    assert finished() == [0]
    assert "with --results FILE a match goes on" in refused(capsys, *MATCH[:-2])
    monkeypatch.setenv("DIES_AFTER", "100000")
    found = said(capsys, *MATCH)
    assert sorted(finished()) == [0, 1, 2]
    assert "of 6 games won" in found
    even = play_match(PubEvalPlayer(), PubEvalPlayer(), MatchConfig(pairs=3))
    assert f"{100 * even.wins.mean:.1f} %" in found


def test_gnubg_itself_plays(capsys):
    try:
        find_gnubg()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    found = said(capsys, "match", "random", "gnubg", "--pairs", "2", "--results", "m.jsonl")
    assert "random against gnubg-0-ply: -" in found
    assert len(finished()) == 2


def test_a_person_leaves_at_once(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("quit\n"))
    assert "type help" in said(capsys, "play", "pubeval")


def test_what_was_found_is_shown_even_if_it_cannot_be_written(capsys):
    Path("test.bm").write_text(bm_line() * 3)
    assert main(["evaluate", "random", "test.bm", "--results", "test.bm/x"]) == 2
    told = capsys.readouterr()
    assert "in each of 3 decisions" in told.out
    assert told.err == "moefold-backgammon: test.bm: File exists\n"
    assert Path("test.bm").read_text() == bm_line() * 3
