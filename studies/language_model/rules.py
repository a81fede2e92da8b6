"""Which rules a trained model is judged under, by name.

A model that competed in training is judged by its group's own choice, which sees later tokens and
is said to leak, and by causal rules. A model of token choice is also rerouted without training.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import OlmoeForCausalLM

import moefold
from moefold import routers
from moefold.routers import RouterConfig
from moefold.routers.inference import GROUP
from studies.language_model.data import Data, spread
from studies.language_model.model import open_trained
from studies.language_model.settings import RULES, Settings, competing, training_router

OWN = "own top k"
BATCH = 8
"""Sequences that are calibrated on at a time; a predictor takes a step for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a trained model chooses.

    Attributes:
        router: None for the model's own top k.
        learnt: whether what the router learnt in training is taken over.
        calibrated: sequences of training text from which its threshold or its predictor is learnt
            afterwards; 0 for neither.
    """

    router: RouterConfig | None
    learnt: bool = False
    calibrated: int = 0


def rules(settings: Settings, arm: str) -> dict[str, Rule]:
    """The rules for a model of an arm."""
    if arm == "token-choice":
        return {OWN: Rule(router=None)}
    if arm == "threshold":
        return {"threshold": Rule(router=training_router(settings, arm), learnt=True)}
    found = {
        rule: Rule(router=competing(settings, arm, rule), learnt=rule == "threshold")
        for rule in (GROUP, *RULES)
    }
    for rule, sequences in (("threshold", settings.calibration), ("predictor", settings.teaching)):
        router = competing(settings, arm, rule)
        found[f"{rule}, afterwards"] = Rule(router=router, calibrated=sequences)
    return found


def without_training(settings: Settings) -> dict[str, Rule]:
    """The rules for a model of token choice that is rerouted without training."""
    found = {OWN: Rule(router=None), "top 1": Rule(router=routers.config("token-choice", k=1))}
    for budget in settings.budgets:
        for rule in (GROUP, "threshold", "prefix"):
            router = competing(settings, "unified", rule, budget=budget)
            found[f"unified {budget:g}, {rule}"] = _rule(settings, router, rule)
        router = competing(settings, "unified", "threshold", budget=budget, combine="softmax")
        name = f"unified {budget:g}, softmax weights, threshold"
        found[name] = _rule(settings, router, "threshold")
    for rule in (GROUP, "threshold"):
        router = routers.config("seq-topk", k=int(settings.budget), inference=rule)
        found[f"seq-topk {settings.budget:g}, {rule}"] = _rule(settings, router, rule)
        router = competing(settings, "expert-choice", rule)
        found[f"expert-choice {settings.budget:g}, {rule}"] = _rule(settings, router, rule)
    return found


def _rule(settings: Settings, router: RouterConfig, rule: str) -> Rule:
    return Rule(router=router, calibrated=settings.calibration if rule == "threshold" else 0)


def open_under(settings: Settings, data: Data, weights: Path, rule: Rule) -> OlmoeForCausalLM:
    """A trained model under a rule, in evaluation mode."""
    model = open_trained(settings, weights, rule.router, learnt=rule.learnt)
    if rule.calibrated:
        text = torch.from_numpy(spread(data.train, rule.calibrated).astype("int64"))
        moefold.calibrate(model, [{"input_ids": ids} for ids in text.split(BATCH)])
    return model
