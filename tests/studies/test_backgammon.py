"""The study of backgammon: losses by definition, games kept apart, judging, and its README."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("moefold_backgammon")

from moefold_backgammon.board import CATEGORIES, start
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.net import groups_of, load_net, save_net
from moefold_backgammon.players import best_of_each
from moefold_backgammon.plays import plays
from moefold_backgammon.pubeval import pubeval_scores

from moefold.preference import ConsistentComparator, FitConfig, Groups, fit, preference_loss
from moefold.preference.scorers import LinearScorer
from studies.backgammon import report, training
from studies.backgammon.data import games_of, to_learn_from
from studies.backgammon.judging import PlayerWhoRemembers, by_game, information, phases
from studies.backgammon.main import RESULTS, unique
from studies.backgammon.results import summarise
from studies.backgammon.settings import ARMS, QUICK, Run, Settings
from studies.backgammon.training import model_of, place, rate_file, train, tune
from studies.files import claim, read_json
from studies.tables import with_tables

TINY = replace(QUICK, games=((2, 1), (4, 1)), methods=4, tuning=(2, 1, 2), strongest=(4, 1, 8))


def played(games: range) -> Decisions:
    """Games of PubEval against itself, whose choice is the label."""
    draw = np.random.default_rng(games.start)
    number = np.array(games)
    boards = np.tile(start(), (len(number), 1, 1))
    parts: list[list[np.ndarray]] = []
    for _ in range(8):
        dice = draw.integers(1, 7, (len(number), 2)).astype(np.int8)
        moves = plays(boards, dice)[1] > 0
        finals, lengths = plays(boards[moves], dice[moves])
        scores = pubeval_scores(boards[moves], finals, lengths)
        chosen = best_of_each(scores, lengths)
        kept = lengths > 1
        by_play = np.repeat(kept, lengths)
        one = [boards[moves][kept], dice[moves][kept], finals[by_play], lengths[kept]]
        parts.append([*one, chosen[kept], scores[by_play] / 30, number[moves][kept]])
        boards[moves] = finals[np.cumsum(lengths) - lengths + chosen]
        boards = np.ascontiguousarray(boards[:, ::-1])
    before, dice, finals, lengths, chosen, equities, game = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Decisions(
        before=before.astype(np.int8),
        dice=dice,
        finals=finals.astype(np.int8),
        lengths=lengths.astype(np.int32),
        chosen=chosen.astype(np.int32),
        equities=equities.astype(np.float32),
        plies=np.zeros(len(finals), np.int8),
        game=game.astype(np.int32),
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for name, first, count in (("labels", 0, 8), ("test", 20, 4), ("tuning", 30, 2)):
        (folder / name).mkdir()
        for at in range(first, first + count, 2):
            played(range(at, at + 2)).save(folder / name / f"games-{at:05d}.safetensors")
    return folder


# -- losses ----------------------------------------------------------------------------------------


def example() -> tuple[Any, Groups]:
    torch.manual_seed(0)
    net = ConsistentComparator(LinearScorer(3)).double()
    groups = Groups(
        candidates=torch.randn(7, 3, dtype=torch.float64),
        lengths=torch.tensor([3, 4]),
        chosen=torch.tensor([1, 2]),
        utilities=torch.tensor([0.1, 0.5, -0.2, 0.3, 0.0, 0.9, 0.8], dtype=torch.float64),
    )
    return net, groups


def split(values: Any, groups: Groups) -> Any:
    return values.split(groups.lengths.tolist())


def test_the_equity_loss_is_the_mean_of_each_decisions_mean_error():
    net, groups = example()
    scores = net.scores(groups.candidates)
    each = [
        ((s - u) ** 2).mean()
        for s, u in zip(split(scores, groups), split(groups.utilities, groups), strict=True)
    ]
    assert torch.allclose(preference_loss(net, groups, "equity"), torch.stack(each).mean())


def test_the_pointwise_loss_asks_of_each_play_whether_it_was_chosen():
    net, groups = example()
    each = []
    for s, chosen in zip(split(net.scores(groups.candidates), groups), (1, 2), strict=True):
        p = s.sigmoid()
        each.append(
            -torch.cat(
                [p[chosen].log()[None], (1 - p).log()[torch.arange(len(s)) != chosen]]
            ).mean()
        )
    assert torch.allclose(preference_loss(net, groups, "was-it-chosen"), torch.stack(each).mean())


# -- data ------------------------------------------------------------------------------------------


def test_seeds_learn_from_other_games_as_long_as_there_are_enough(output: Path):
    settings = replace(TINY, games=((2, 1), (4, 1)), strongest=(8, 1, 8))
    assert settings.most_games == 8
    found = [set(to_learn_from(settings, output, 4, seed).game.tolist()) for seed in (0, 1, 2)]
    assert found == [{0, 1, 2, 3}, {4, 5, 6, 7}, {0, 1, 2, 3}]
    odd = games_of(output / "labels", 1, 2)
    assert set(odd.game.tolist()) == {1, 2}
    assert int(odd.lengths.sum()) == len(odd.finals)


def test_every_net_is_trained_once_and_the_largest_first():
    runs = unique(Settings())
    assert len({run.name for run in runs}) == len(runs)
    wanted = {run for part in Settings().runs().values() for run in part}
    assert set(runs) == wanted | {run.after for run in wanted if run.after is not None}
    work = [run.games * run.passes * run.hidden for run in runs]
    assert work == sorted(work, reverse=True)
    shared = [run for run in Settings().runs()["sizes"] if run in Settings().runs()["methods"]]
    assert {run.arm for run in shared} == {"pair", "list", "regression"}


def test_a_folder_belongs_to_one_study(tmp_path: Path):
    claim(tmp_path, QUICK)
    claim(tmp_path, QUICK)
    with pytest.raises(ValueError, match="holds a study with another hidden, seeds"):
        claim(tmp_path, replace(QUICK, hidden=9, seeds=(0,)))


# -- training and judging --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_learns_what_it_is_told(name: str, output: Path):
    arm = ARMS[name]
    decisions = games_of(output / "labels", 0, 8)
    groups = groups_of(decisions, by_equity=arm.by_equity, with_before=arm.sees_before)
    model = model_of(arm, 8, seed=0)
    history = fit(model, groups, FitConfig(epochs=6, batch_size=16, learning_rate=1e-2))
    assert history.loss[-1] < history.loss[0]


def test_a_run_is_tuned_trained_and_can_be_opened(output: Path):
    settings = replace(TINY, strongest=(8, 1, 8))
    run = Run(arm="list", games=4, passes=1, hidden=8, seed=0)
    tune(settings, output, "list")
    told = read_json(rate_file(output, "list"))
    assert told["rate"] in settings.rates
    assert told["agreement"][f"{told['rate']:g}"] == max(told["agreement"].values())
    train(settings, output, run, Path("nobody"))
    found = read_json(place(output, run) / "run.json")
    assert found["decisions"] == len(games_of(output / "labels", 0, 4))
    assert load_net(place(output, run) / "net").loss == "listwise"


def test_the_strongest_begins_with_what_it_learnt_before(output: Path, monkeypatch):
    settings = replace(TINY, strongest=(4, 1, 8), strongest_then=("sharp", 2, 5e-4))
    (run,) = settings.runs()["strongest"]
    assert run.after is not None
    began: list[Any] = []

    def watched(model, groups, config, **more):
        began.append(({k: t.clone() for k, t in model.state_dict().items()}, config))
        return fit(model, groups, config, **more)

    monkeypatch.setattr(training, "fit", watched)
    for one in (run.after, run):
        train(settings, output, one, Path("nobody"))
    (_, first), (weights, then) = began
    learnt = load_net(place(output, run.after) / "net").state_dict()
    assert all(torch.equal(weights[name], learnt[name]) for name in learnt)
    assert (first.learning_rate, first.epochs) == (settings.strongest_rate, 1)
    assert (then.learning_rate, then.epochs) == (5e-4, 2)
    told = read_json(place(output, run) / "run.json")
    assert (told["arm"], told["after"]["arm"]) == ("sharp", "soft")


def test_a_player_who_remembers_chooses_by_both_positions(output: Path, tmp_path: Path):
    decisions = games_of(output / "labels", 0, 2)
    model = model_of(ARMS["experts-before"], 8, seed=0)
    save_net(model, tmp_path / "net")
    groups: Any = groups_of(decisions, with_before=True)
    player = PlayerWhoRemembers(load_net(tmp_path / "net"))
    chosen = player.choose(decisions.before, decisions.dice, decisions.finals, decisions.lengths)
    assert np.array_equal(chosen, model.eval().best(groups).numpy())
    other = np.ascontiguousarray(decisions.before[::-1])
    assert not np.array_equal(
        chosen, player.choose(other, decisions.dice, decisions.finals, decisions.lengths)
    )


def test_numbers_by_game_keep_the_mean_of_the_decisions():
    values, game = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), np.array([7, 7, 3, 3, 3])
    found = by_game(values, game)
    assert np.mean(found) == pytest.approx(values.mean())
    assert found == pytest.approx([2 * 2 / 5, 1 * 2 / 5])  # in the order of their numbers


def test_phases_count_each_kind_of_position_by_itself(output: Path):
    decisions = games_of(output / "labels", 0, 4)
    model = model_of(ARMS["experts"], 8, seed=0).eval()
    groups = groups_of(decisions)
    kinds = np.zeros(len(groups), np.int8)
    kinds[:] = CATEGORIES.index("contact")
    kinds[: len(groups) // 2] = CATEGORIES.index("race")
    found = phases(model, groups, kinds)
    assert set(found["load"]) == {"contact", "race"}
    assert sum(found["positions"].values()) == len(groups.candidates)
    first = int(groups.lengths[: len(groups) // 2].sum())
    assert found["positions"]["race"] == first
    for load in found["load"].values():
        assert math.fsum(load) == pytest.approx(1)


def test_information_is_all_or_nothing_at_the_ends():
    assert information(np.eye(3) * 5) == pytest.approx(1)
    assert information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert information(np.array([[8.0, 0], [4, 4]])) == pytest.approx(0.3112781 / 1.0, abs=1e-6)


# -- the README ------------------------------------------------------------------------------------


@pytest.mark.skipif(not RESULTS.exists(), reason="the study has not been published yet")
def test_the_readme_holds_what_results_json_says():
    readme = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert with_tables(readme, report.tables(read_json(RESULTS))) == readme


@pytest.mark.skipif(not RESULTS.exists(), reason="the study has not been published yet")
def test_the_plot_is_drawn_from_results_json(tmp_path: Path):
    report.write_plot(read_json(RESULTS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_study_that_is_not_done_has_no_results(output: Path):
    with pytest.raises(FileNotFoundError):
        summarise(TINY, output)
