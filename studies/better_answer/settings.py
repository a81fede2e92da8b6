"""What the study does, in one value to which a folder of results belongs."""

import json
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

FEATURES = ("length", "answer", "answer and prompt", "answer, prompt and length")
"""What a scorer is given of an answer: numbers of its length, its vector, or products with the
prompt's vector too."""

ATTACK = "NullModel"
"""Writes one text whatever the prompt: no answer, but an order to the judge to prefer it."""

STRONG = ("FuseChat-Gemma-2-9B-Instruct", "FuseChat-Llama-3.2-3B-Instruct")
"""The two writers whose answers the judge nearly always prefers."""

POOLS = ("15 writers", "13 writers", "16 writers")
"""Whose answers there are to choose from: without the attack; without the attack and the two strong
writers; all that are in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to learn.

    Attributes:
        features: one of `FEATURES`.
        net: of `moefold.preference.scorers`.
        loss: of `moefold.preference.preference_losses`, or of `studies.better_answer.absolute`.
        net_settings: of the net.
        loss_settings: of the loss.
        prompt_apart: whether the prompt's vector is a context of its own too, to choose experts by.
    """

    features: str
    net: str
    loss: str
    net_settings: dict[str, Any] = field(default_factory=dict)
    loss_settings: dict[str, Any] = field(default_factory=dict)
    prompt_apart: bool = False


_HIDDEN = {"hidden": 16}
_BOTH = "answer and prompt"
_WEIGHTED = {"by_utility": True}

ARMS = MappingProxyType(
    {
        "length alone": Arm(features="length", net="linear", loss="pair-logistic"),
        "pairs": Arm(features=_BOTH, net="linear", loss="pair-logistic"),
        "pairs by score": Arm(
            features=_BOTH, net="linear", loss="pair-logistic", loss_settings=_WEIGHTED
        ),
        "listwise": Arm(features=_BOTH, net="linear", loss="listwise"),
        "plackett-luce": Arm(features=_BOTH, net="linear", loss="plackett-luce"),
        "lambda-rank": Arm(features=_BOTH, net="linear", loss="lambda-rank"),
        "answer alone": Arm(
            features="answer", net="linear", loss="pair-logistic", loss_settings=_WEIGHTED
        ),
        "with length": Arm(
            features="answer, prompt and length",
            net="linear",
            loss="pair-logistic",
            loss_settings=_WEIGHTED,
        ),
        "mlp": Arm(
            features=_BOTH,
            net="mlp",
            loss="pair-logistic",
            net_settings=_HIDDEN,
            loss_settings=_WEIGHTED,
        ),
        "mixture by answer": Arm(
            features=_BOTH,
            net="mixture",
            loss="pair-logistic",
            net_settings={"num_experts": 4, **_HIDDEN},
            loss_settings=_WEIGHTED,
        ),
        "mixture by prompt": Arm(
            features=_BOTH,
            net="mixture",
            loss="pair-logistic",
            net_settings={"num_experts": 4, "over": "context", **_HIDDEN},
            loss_settings=_WEIGHTED,
            prompt_apart=True,
        ),
        "scores, linear": Arm(features=_BOTH, net="linear", loss="answer-score"),
        "scores, mlp": Arm(features=_BOTH, net="mlp", loss="answer-score", net_settings=_HIDDEN),
        "was it best, linear": Arm(features=_BOTH, net="linear", loss="answer-was-best"),
        "was it best, mlp": Arm(
            features=_BOTH, net="mlp", loss="answer-was-best", net_settings=_HIDDEN
        ),
    }
)
"""Ways to learn; the last four are told of each answer by itself, all others compare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that changes a number.

    Attributes:
        seeds: of the parts that prompts are put into, of first weights and of the order of data.
        folds: parts of the prompts, each of which is judged by what was learnt from the others.
        prompts: of AlpacaEval that are used, None for all.
        pairs: of LLMBar that are used, None for all.
        arms: of `ARMS`, with answers of 15 writers.
        few_writers: arms that also learn from 13 writers only.
        attacked: arms that also learn from all 16.
        transferred: arms that are taken from AlpacaEval to LLMBar.
        within: arms that learn from LLMBar itself.
        epochs: passes over the training prompts.
        batch: prompts of a step.
        tried: learning rates with weight decays of AdamW, of which each training part chooses one
            pair by a split of its own.
        inner: share of a training part that chooses.
        similar: two answers are of similar length if the longer has at most so many times the
            characters of the shorter.
        clear: difference of the judge's scores from which on a pair has a better answer.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    folds: int = 5
    prompts: int | None = None
    pairs: int | None = None
    arms: tuple[str, ...] = tuple(ARMS)
    few_writers: tuple[str, ...] = ("pairs by score", "mlp")
    attacked: tuple[str, ...] = ("pairs by score",)
    transferred: tuple[str, ...] = ("length alone", "answer alone", "pairs by score", "mlp")
    within: tuple[str, ...] = ("length alone", "answer alone", "pairs by score", "mlp")
    epochs: int = 10
    batch: int = 64
    tried: tuple[tuple[float, float], ...] = ((1e-2, 10.0), (3e-3, 10.0))
    inner: float = 0.25
    similar: float = 1.1
    clear: float = 0.1

    def __post_init__(self) -> None:
        used = {*self.arms, *self.few_writers, *self.attacked, *self.transferred, *self.within}
        if strangers := sorted(used - set(ARMS)):
            raise ValueError(
                f"arms hold {', '.join(map(repr, strangers))}; a study can learn by "
                f"{', '.join(ARMS)}"
            )
        if self.folds < 2 or not self.seeds or not self.tried:
            raise ValueError(
                f"folds is {self.folds}, with {len(self.seeds)} seeds and {len(self.tried)} "
                f"rates; give at least two folds, a seed and a rate"
            )

    def learnt_from(self) -> dict[str, tuple[str, ...]]:
        """The arms that learn from each of the `POOLS`."""
        return dict(zip(POOLS, (self.arms, self.few_writers, self.attacked), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """From what `to_dict` gave."""
        made: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        made["tried"] = tuple((rate, decay) for rate, decay in values["tried"])
        return cls(**{one.name: made[one.name] for one in fields(cls)})


QUICK = Settings(
    seeds=(0,),
    folds=2,
    prompts=24,
    pairs=40,
    arms=("length alone", "pairs by score", "mixture by answer", "scores, linear"),
    few_writers=("pairs by score",),
    attacked=("pairs by score",),
    transferred=("pairs by score",),
    within=("pairs by score",),
    epochs=2,
    tried=((1e-2, 0.1),),
)
"""A look at every part, in a minute or two; its numbers mean nothing."""
