"""A net that values positions, and decisions as what it learns from.

Boards stay as they are, 50 bytes each, and become the 196 inputs of `encoding.unary` inside the
net, a batch at a time: four thousand games are three million positions.

Shapes: `m 2 25` men by position, side and point, [opponent, mover]; `m` values.
"""

from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn

from moefold.preference import ConsistentComparator, Groups, PreferenceModel, load, save
from moefold.preference.scorers import MLPScorer
from moefold_backgammon.board import BAR, CATEGORIES, MEN, POINTS, categories
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.encoding import UNARY
from moefold_backgammon.players import NetPlayer

HIDDEN = 40
"""Hidden units, if nothing else is said."""


@final
class BoardScorer(nn.Module):
    """A scorer of positions: unary inputs, one hidden layer, one value for the mover.

    Args:
        hidden: hidden units.
    """

    of_men: Tensor

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.net = MLPScorer(UNARY, hidden=hidden)
        men = torch.arange(MEN + 1)
        table = torch.stack([men >= 1, men >= 2, men >= 3, (men - 3).clamp_min(0) / 2], 1)
        self.register_buffer("of_men", table.float(), persistent=False)

    def inputs(self, boards: Int8[Tensor, "m 2 25"]) -> Float[Tensor, "m 196"]:
        """What `encoding.unary` makes of the boards."""
        points = self.of_men[boards[:, :, :POINTS].long()].flatten(2)
        rest = torch.stack([boards[:, :, BAR] / 2, (MEN - boards.sum(2)) / MEN], 2)
        return torch.cat([points, rest.to(points)], 2).flatten(1)

    def forward(self, boards: Int8[Tensor, "m 2 25"]) -> Float[Tensor, "m 1"]:
        """The value of each position to the mover, up to a constant."""
        return self.net(self.inputs(boards))


def new_model(
    hidden: int = HIDDEN, *, loss: str = "pair-logistic", seed: int = 0
) -> PreferenceModel:
    """An untrained model.

    Args:
        hidden: hidden units.
        loss: one of `moefold.preference.preference_losses`.
        seed: of its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PreferenceModel(ConsistentComparator(BoardScorer(hidden)), loss=loss)


def groups_of(decisions: Decisions, *, by_equity: bool = False) -> Groups:
    """Decisions as groups: plays are candidates, games what is never split, phases categories.

    Args:
        decisions: of an expert.
        by_equity: leave out which play was chosen, so that equities speak: every play as good as
            the best is then right, and pairs are of any two plays of different equity.
    """
    kinds = categories(decisions.before)
    return Groups(
        candidates=torch.from_numpy(decisions.finals),
        lengths=torch.from_numpy(decisions.lengths.astype(np.int64)),
        chosen=None if by_equity else torch.from_numpy(decisions.chosen.astype(np.int64)),
        utilities=torch.from_numpy(decisions.equities),
        split=[str(game) for game in decisions.game.tolist()],
        category=[CATEGORIES[kind] for kind in kinds.tolist()],
    )


def player_of(model: PreferenceModel, *, name: str = "net") -> NetPlayer:
    """A player that takes the play whose position the model values most."""
    comparator: Any = model.comparator

    @torch.no_grad()
    def score(boards: Int8[np.ndarray, "m 2 25"]) -> Float32[np.ndarray, " m"]:
        return comparator.scores(torch.from_numpy(np.ascontiguousarray(boards))).numpy()

    return NetPlayer(score, name=name)


def save_net(model: PreferenceModel, folder: Path) -> None:
    """Writes a net into a folder, whole or not at all."""
    save(model, folder)


def load_net(folder: Path) -> PreferenceModel:
    """Opens what `save_net` wrote.

    Raises:
        ValueError: the folder holds something else.
    """
    hidden = _hidden_units(folder)
    return load(folder, scorer=BoardScorer(hidden))


def _hidden_units(folder: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return file.get_slice("comparator.scorer.net.hidden.weight").get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no net of this package ({error}); give a folder that train wrote"
        ) from error


__all__ = [
    "HIDDEN",
    "BoardScorer",
    "groups_of",
    "load_net",
    "new_model",
    "player_of",
    "save_net",
]
