"""Learning on some prompts to score answers of others, settings chosen without a look at those.

    parts(groups, 5, seed)                 which part each prompt is in
    learnt(arm, groups, settings, seed)    a model, how to learn it chosen inside these groups
    held_out_scores(...)                   each prompt scored by what was learnt from other parts

Shapes: `groups`, `candidates`, as in `Groups`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefold.preference import (
    FitConfig,
    Groups,
    NetConfig,
    PreferenceConfig,
    PreferenceModel,
    fit,
    regret,
)
from moefold.preference.ragged import highest
from studies.better_answer.absolute import ABSOLUTE, Absolute
from studies.better_answer.settings import Arm, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A model, and the learning rate and weight decay that were chosen for it."""

    model: PreferenceModel
    how: tuple[float, float]


def parts(groups: Groups, folds: int, seed: int) -> Int[Tensor, " groups"]:
    """Which of so many parts each group is in; groups of one split id are in the same.

    Args:
        groups: with split ids.
        folds: parts, alike in size as far as ids allow.
        seed: of the draw.

    Raises:
        ValueError: there are fewer ids than parts.
    """
    assert groups.split is not None
    names = sorted(set(groups.split))
    if len(names) < folds:
        raise ValueError(f"{len(names)} prompts cannot be put into {folds} parts; give more")
    drawn = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)) % folds
    place = dict(zip(names, drawn.tolist(), strict=True))
    return torch.tensor([place[name] for name in groups.split])


def held_out_scores(
    arm: Arm,
    groups: Groups,
    settings: Settings,
    seed: int,
    taught: Bool[Tensor, " candidates"] | None = None,
) -> tuple[Float[Tensor, " candidates"], list[tuple[float, float]]]:
    """A score for each candidate, by a model that learnt from the other parts' groups.

    Args:
        arm: how to learn.
        groups: with features.
        settings: of the study.
        seed: of the parts and of learning.
        taught: candidates that are learnt from; all if None. All are scored.

    Returns:
        The scores, whose size means nothing across parts, and what each part chose.
    """
    part = parts(groups, settings.folds, seed)
    scores = torch.full((len(groups.candidates),), torch.nan)
    chosen = []
    for number in range(settings.folds):
        held = part == number
        found = learnt(arm, only(groups, ~held, taught), settings, seed)
        scores[held[groups.group_of_candidate]] = found.model.values(groups.take(held))
        chosen.append(found.how)
    return scores, chosen


def only(
    groups: Groups, kept: Bool[Tensor, " groups"], taught: Bool[Tensor, " candidates"] | None
) -> Groups:
    """These groups, with the candidates that are learnt from."""
    if taught is None:
        return groups.take(kept)
    of_kept = taught[kept[groups.group_of_candidate]]
    return groups.take(kept).with_candidates(of_kept)


def learnt(arm: Arm, groups: Groups, settings: Settings, seed: int) -> Learnt:
    """A model of these groups.

    Each learning rate and decay is tried on a part of the groups and judged by what its choices in
    the rest are worth; all groups then teach the best.

    Args:
        arm: how to learn.
        groups: with features and utilities.
        settings: of the study.
        seed: of first weights, the order of data and the split that chooses.
    """
    how = settings.tried[0]
    if len(settings.tried) > 1:
        tried, rest = groups.split_by(settings.inner, seed=seed)
        worth = {
            one: float(worth_of_choice(trained(arm, tried, settings, one, seed), rest).mean())
            for one in settings.tried
        }
        how = max(settings.tried, key=lambda one: worth[one])
    return Learnt(model=trained(arm, groups, settings, how, seed), how=how)


def trained(
    arm: Arm, groups: Groups, settings: Settings, how: tuple[float, float], seed: int
) -> PreferenceModel:
    """A model of these groups with a given learning rate and weight decay."""
    absolute = arm.loss in ABSOLUTE
    config = PreferenceConfig(
        net=NetConfig(arm.net, arm.net_settings),
        standardize=True,
        **({} if absolute else {"loss": arm.loss, "loss_settings": arm.loss_settings}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.build(groups)
    rate, decay = how
    taught_how = FitConfig(
        epochs=settings.epochs,
        batch_size=settings.batch,
        learning_rate=rate,
        weight_decay=decay,
        seed=seed,
    )
    # To the trainer a model is a module that returns its loss, which is all that is asked here too.
    taught = Absolute(model, arm.loss, groups) if absolute else model
    fit(taught, groups, taught_how)
    return model


def worth_of_choice(model: PreferenceModel, groups: Groups) -> Float[Tensor, " groups"]:
    """What the candidate is worth that the model chooses, of each group."""
    return chosen_worth(model.values(groups), groups)


def chosen_worth(values: Float[Tensor, " candidates"], groups: Groups) -> Tensor:
    """What the candidate of the highest value is worth, of each group; several share it.

    Args:
        values: what the choice goes by.
        groups: with utilities.
    """
    assert groups.utilities is not None
    best = highest(groups.utilities.double(), groups.group_of_candidate, len(groups))
    return best - regret(values, groups)
