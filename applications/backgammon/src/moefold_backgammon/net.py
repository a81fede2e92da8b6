"""A net that values positions, and decisions as what it learns from.

Boards stay as they are, 50 bytes each, and become the 196 inputs of `encoding.unary` inside the
net, a batch at a time: four thousand games are three million positions.

Shapes: `m 50` men by position, then by side and point, [opponent, mover]; `m` values.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn

from moefold import routers
from moefold.preference import (
    Groups,
    NetConfig,
    PreferenceConfig,
    PreferenceModel,
    load,
    save,
    scorers,
)
from moefold_backgammon.board import BAR, CATEGORIES, MEN, POINTS, categories
from moefold_backgammon.decisions import Decisions
from moefold_backgammon.encoding import UNARY
from moefold_backgammon.players import NetPlayer

HIDDEN = 40
"""Hidden units, if nothing else is said."""

PLACES = 2 * (POINTS + 1)
"""Numbers of a board: 24 points and the bar of both sides."""


@scorers.register("board", summary="a backgammon position by its men, one hidden layer")
@final
class BoardScorer(nn.Module):
    """A scorer of positions: unary inputs, one hidden layer or several to choose from, one value.

    Args:
        features: numbers of a board, 50.
        context: 50 if the net is also shown the position before the play, else 0.
        hidden: hidden units, of each expert.
        num_experts: how many such layers there are; a router chooses for each position.
        experts_per_position: how many of them it chooses.
        over: what it chooses by: the "candidate", or the "context".
        activation: of the hidden units.
        bias: of the output: comparisons leave it open, absolute targets need it.

    Raises:
        ValueError: boards of another size, or no such activation.
    """

    def __init__(
        self,
        features: int = PLACES,
        context: int = 0,
        *,
        hidden: int = HIDDEN,
        num_experts: int = 1,
        experts_per_position: int = 1,
        over: str = "candidate",
        activation: str = "tanh",
        bias: bool = False,
    ) -> None:
        if features != PLACES or context not in (0, PLACES):
            raise ValueError(
                f"boards of {features} numbers and contexts of {context}: a board has {PLACES}, "
                f"24 points and the bar of both sides; a context is none or a board"
            )
        super().__init__()
        settings: dict[str, Any] = {"hidden": hidden, "activation": activation}
        if num_experts > 1:
            router = routers.config("token-choice", k=experts_per_position)
            settings |= {"num_experts": num_experts, "over": over, "router": router}
        net = NetConfig("mixture" if num_experts > 1 else "mlp", settings)
        self.net = net.build(UNARY, UNARY if context else 0)
        self.bias = nn.Parameter(torch.zeros(1)) if bias else None

    def forward(
        self, boards: Int8[Tensor, "m 50"], context: Int8[Tensor, "m 50"] | None = None
    ) -> Float[Tensor, "m 1"]:
        """The value of each position to the mover, up to a constant."""
        value = self.net(inputs(boards), None if context is None else inputs(context))
        return value if self.bias is None else value + self.bias


def inputs(boards: Int8[Tensor, "m 50"]) -> Float[Tensor, "m 196"]:
    """What `encoding.unary` makes of the boards, on their device."""
    men = boards.float().view(-1, 2, POINTS + 1)
    made = men.new_empty(len(men), 2, UNARY // 2)
    points, by_point = men[:, :, :POINTS], made[:, :, : 4 * POINTS].unflatten(2, (POINTS, 4))
    for place in range(3):
        by_point[..., place] = (points - place).clamp(0, 1)
    by_point[..., 3] = (points - 3).clamp_min(0) / 2
    made[:, :, -2] = men[:, :, BAR] / 2
    made[:, :, -1] = (MEN - men.sum(2)) / MEN
    return made.flatten(1)


def new_model(
    hidden: int = HIDDEN,
    *,
    loss: str = "pair-logistic",
    loss_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    sees_before: bool = False,
    **settings: Any,
) -> PreferenceModel:
    """An untrained model.

    Args:
        hidden: hidden units, of each expert.
        loss: one of `moefold.preference.preference_losses`.
        loss_settings: of the loss.
        seed: of its weights.
        sees_before: the net is shown the position before the play as well.
        settings: more of `BoardScorer`.

    Raises:
        ValueError: no such loss or setting.
    """
    config = PreferenceConfig(
        net=NetConfig("board", {"hidden": hidden, **settings}),
        loss=loss,
        loss_settings=loss_settings or {},
        features=PLACES,
        context=PLACES if sees_before else 0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build()


def groups_of(
    decisions: Decisions, *, by_equity: bool = False, with_before: bool = False
) -> Groups:
    """Decisions as groups: plays are candidates, games what is never split, phases categories.

    Args:
        decisions: of an expert.
        by_equity: leave out which play was chosen, so that equities speak: every play as good as
            the best is then right, and pairs are of any two plays of different equity.
        with_before: the position before the play is the context.
    """
    kinds = categories(decisions.before)
    return Groups(
        candidates=_rows(decisions.finals),
        lengths=torch.from_numpy(decisions.lengths.astype(np.int64)),
        chosen=None if by_equity else torch.from_numpy(decisions.chosen.astype(np.int64)),
        utilities=torch.from_numpy(decisions.comparable),
        context=_rows(decisions.before) if with_before else None,
        split=[str(game) for game in decisions.game.tolist()],
        category=[CATEGORIES[kind] for kind in kinds.tolist()],
    )


def player_of(model: PreferenceModel, *, name: str = "net") -> NetPlayer:
    """A player that takes the play whose position the model values most.

    Raises:
        ValueError: the model is shown the position before the play.
    """
    if model.preference_config is not None and model.preference_config.context:
        raise ValueError(
            f"{name} is shown the position before the play, and this player shows it only the one "
            f"after; train a net without sees_before"
        )
    comparator: Any = model.comparator

    @torch.no_grad()
    def score(boards: Int8[np.ndarray, "m 2 25"]) -> Float32[np.ndarray, " m"]:
        return comparator.scores(_rows(boards)).numpy()

    return NetPlayer(score, name=name)


def save_net(model: PreferenceModel, folder: Path) -> None:
    """Writes a net into a folder, whole or not at all."""
    save(model, folder)


def load_net(folder: Path) -> PreferenceModel:
    """Opens what `save_net` wrote.

    Raises:
        ValueError: the folder holds something else.
    """
    try:
        model = load(folder)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds no net of this package ({error}); give a folder that train wrote"
        ) from error
    config = model.preference_config
    if config is None or config.net.name != "board":
        raise ValueError(
            f"{folder} holds a model that scores no boards; give a folder that train wrote"
        )
    return model


def _rows(boards: Int8[np.ndarray, "m 2 25"]) -> Int8[Tensor, "m 50"]:
    return torch.from_numpy(np.ascontiguousarray(boards)).view(len(boards), PLACES)


__all__ = [
    "HIDDEN",
    "PLACES",
    "BoardScorer",
    "groups_of",
    "inputs",
    "load_net",
    "new_model",
    "player_of",
    "save_net",
]
