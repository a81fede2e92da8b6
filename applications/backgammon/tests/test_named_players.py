"""Players by name, and that those with a process end it."""

import numpy as np
import pytest

from moefold_backgammon.board import start
from moefold_backgammon.gnubg_socket import find_gnubg
from moefold_backgammon.named_players import DEBIAN, IN_PROCESS, SLOW, opened
from moefold_backgammon.net import new_model, save_net
from moefold_backgammon.plays import plays

BEFORE, DICE = start()[None], np.array([[3, 1]], np.int8)
FINALS, LENGTHS = plays(BEFORE, DICE)


def made(player):
    """The mover's men after a roll that everybody plays alike."""
    return FINALS[player.choose(BEFORE, DICE, FINALS, LENGTHS)[0], 1]


@pytest.mark.parametrize(
    ("name", "says"),
    [("gnubg-nn", 0), ("gnubg-nn-0", 0), ("gnubg-nn-1", 1), ("gnubg-nn-2", 2)],
)
def test_gnubgs_nets(name, says):
    pytest.importorskip("gnubg_nn", reason="gnubg-nn is optional")
    with opened(name) as player:
        assert player.name == f"gnubg-nn-{says}-ply"
        assert made(player)[[4, 5, 7]].tolist() == [2, 4, 2]  # 8/5 6/5


@pytest.mark.parametrize(("name", "says"), [("gnubg", 0), ("gnubg-0", 0), ("gnubg-1", 1)])
def test_gnubg_itself_is_ended_with_the_context(name, says):
    try:
        find_gnubg()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    with opened(name) as player:
        assert player.name == f"gnubg-{says}-ply"
        assert made(player)[[4, 5, 7]].tolist() == [2, 4, 2]
    with pytest.raises(RuntimeError, match="this gnubg has been closed; make another"):
        made(player)


def test_a_folder_is_called_by_its_name(tmp_path, monkeypatch):
    save_net(new_model(4), tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    with opened(".") as player:
        assert player.name == "mine"


def test_a_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pubeval").mkdir()
    with pytest.raises(ValueError, match="pubeval holds no net"), opened("pubeval"):
        pass


def test_names():
    assert IN_PROCESS.keys().isdisjoint(DEBIAN)
    assert {*IN_PROCESS, *DEBIAN} >= SLOW
    with pytest.raises(ValueError, match=r"no player 'gnu': .* gnubg-nn-2, random, gnubg"):
        opened("gnu").__enter__()
