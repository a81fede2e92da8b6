"""What the study does: sizes, routers and rules, in one value to which a folder belongs."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from moefold import routers
from moefold.routers import RouterConfig

TRAINED = ("token-choice", "expert-choice", "unified", "threshold")
"""Ways of training."""

RULES = ("threshold", "prefix", "token-choice")
"""Causal rules by which a router that competes in training chooses afterwards; beside them stands
`group`, the competing choice itself, which looks at later tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that changes a number.

    Attributes:
        seeds: of initial weights and of the order of the data.
        arms: ways of training, keys of `training_router`.
        share: the part of each training book that is read, from its beginning.
        vocabulary: size of the byte-level BPE.
        length: tokens of a sequence, in training and in evaluation.
        passes: how often the training text is seen.
        batch: sequences in a step.
        learning_rate: of AdamW, the highest; cosine decay to zero.
        warmup: share of the steps over which the rate grows.
        weight_decay: of AdamW.
        balance: weight of the balance loss of token choice; the competing routers have none.
        dim: width of a token.
        layers: of the model.
        heads: of attention.
        experts: in each layer.
        width: of an expert.
        budget: experts for each token, on average.
        alpha: share of the sigmoid in the unified score.
        chunks_per_book: sequences of each held-out book.
        calibration: sequences of training text from which thresholds are learnt afterwards.
        teaching: the same for predictors, which learn by gradient.
        budgets: of the models that are rerouted without training.
        tasks: of MTEB, for every kind of vector.
        slow_tasks: of MTEB, for hidden states without a prompt only.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ("token-choice", "expert-choice", "unified", "threshold")
    share: float = 0.12
    vocabulary: int = 2048
    length: int = 128
    passes: float = 1.0
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    balance: float = 0.01
    dim: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    width: int = 128
    budget: float = 2.0
    alpha: float = 0.5
    chunks_per_book: int = 64
    calibration: int = 128
    teaching: int = 1024
    budgets: tuple[float, ...] = (2.0, 1.5, 1.0)
    tasks: tuple[str, ...] = (
        "STSBenchmark",
        "STS12",
        "STS13",
        "STS16",
    )
    slow_tasks: tuple[str, ...] = ("Banking77Classification",)

    def __post_init__(self) -> None:
        strangers = sorted(set(self.arms) - set(TRAINED))
        if strangers:
            raise ValueError(
                f"arms hold {', '.join(map(repr, strangers))}; a study can train "
                f"{', '.join(TRAINED)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """From what `to_dict` gave."""
        made: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**{field.name: made[field.name] for field in fields(cls)})


QUICK = Settings(
    seeds=(0,),
    arms=("token-choice", "expert-choice", "unified"),
    share=0.003,
    vocabulary=512,
    length=64,
    batch=8,
    dim=32,
    layers=2,
    heads=2,
    experts=8,
    width=32,
    chunks_per_book=4,
    calibration=16,
    teaching=64,
    budgets=(2.0, 1.0),
    tasks=("STSBenchmark",),
    slow_tasks=(),
)
"""A look at every part, in some minutes; its numbers mean nothing."""


def competing(settings: Settings, arm: str, rule: str, **changes: Any) -> RouterConfig:
    """A router that competes in training and follows a rule in evaluation.

    Args:
        settings: of the study.
        arm: `expert-choice` or `unified`.
        rule: one of `RULES`, or `group`.
        **changes: of the router's settings.
    """
    own: dict[str, Any] = {
        "unified": {"budget": settings.budget, "alpha": settings.alpha},
        "expert-choice": {"capacity_factor": settings.budget},
    }[arm]
    return routers.config(arm, **{**own, "inference": rule, **changes})


def training_router(settings: Settings, arm: str) -> RouterConfig | None:
    """The router an arm is trained with; None for the model as it is."""
    if arm == "token-choice":
        return None
    if arm == "threshold":
        return routers.config("threshold", budget=settings.budget, alpha=settings.alpha)
    return competing(settings, arm, "threshold")
