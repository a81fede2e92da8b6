"""Scores: what competes. The first of the three choices that make a sparse router.

Shapes: logits `[groups, members, experts]` in, scores of the same shape out; `valid` marks the real
tokens of every group. A larger score wins.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefold.ops.transport import sinkhorn, sparse_transport
from moefold.routers.base import Reach, check_at_least_zero, check_one_of, check_positive
from moefold.routers.capacity import Capacity

Scores = Float[Tensor, "groups members experts"]
Valid = Bool[Tensor, "groups members"] | None


@runtime_checkable
class Score(Protocol):
    """Turns logits into what competes."""

    @property
    def reach(self) -> Reach: ...

    def alone(self) -> "Score":
        """The score that stands for it where nothing is known but the token."""
        ...

    def __call__(self, logits: Scores, valid: Valid) -> Scores: ...


@dataclass(frozen=True, slots=True)
class Softmax:
    """Softmax over experts: how much of a token an expert gets, relative to the other experts."""

    reach: Reach = field(default="token", init=False)

    def alone(self) -> "Softmax":
        return self

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        return logits.softmax(-1)


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """Sigmoid of each logit: every pair is judged by itself."""

    reach: Reach = field(default="token", init=False)

    def alone(self) -> "Sigmoid":
        return self

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        return logits.sigmoid()


@dataclass(frozen=True, slots=True)
class Relu:
    """The positive part of each logit (Wang et al., *ReMoE*, 2024, section 3.1)."""

    reach: Reach = field(default="token", init=False)

    def alone(self) -> "Relu":
        return self

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        return logits.relu()


@dataclass(frozen=True, slots=True)
class Identity:
    """The logits themselves."""

    reach: Reach = field(default="token", init=False)

    def alone(self) -> "Identity":
        return self

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Unified:
    """`(1 - alpha) * softmax over experts + alpha * expert-side score` (USMoE).

    The expert-side score is `(2 / E) * sigmoid(logit)`, which is `1 / E` at a logit of 0, in the
    released code; or, in the first version of the paper, a softmax over the tokens of the group
    whose rows are then divided by their sum over experts. The latter looks at the whole group.

    Source: Do et al., *Sparse Mixture of Experts as Unified Competitive Learning*, 2025, and its
    released code.
    """

    alpha: float = 0.5
    expert_score: Literal["sigmoid", "token-softmax"] = "sigmoid"

    def __post_init__(self) -> None:
        check_at_least_zero("alpha", self.alpha)
        if self.alpha > 1:
            raise ValueError(
                f"alpha is {self.alpha!r}; it must lie between 0 (each token's view) and 1 (each "
                "expert's)."
            )
        check_one_of("expert_score", self.expert_score, ("sigmoid", "token-softmax"))

    @property
    def reach(self) -> Reach:
        return "token" if self.expert_score == "sigmoid" else "group"

    def alone(self) -> "Unified":
        return Unified(alpha=self.alpha)  # what the paper's later versions put in its place

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        if self.expert_score == "sigmoid":
            by_expert = logits.sigmoid() * (2.0 / logits.shape[-1])
        else:
            # exp(logit - over_tokens) is the softmax over tokens. Dividing its rows by their sums
            # is a softmax over experts, which does not underflow where a token is far behind.
            over_tokens = _hide_padding(logits, valid).logsumexp(1, keepdim=True)
            by_expert = (logits - over_tokens).softmax(-1)
        return (1 - self.alpha) * logits.softmax(-1) + self.alpha * by_expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinkhorn:
    """Entropic transport plan of the logits, without gradient; see `ops.transport.sinkhorn`."""

    iterations: int = 20
    epsilon: float = 1.0
    reach: Reach = field(default="group", init=False)

    def __post_init__(self) -> None:
        check_positive("iterations", self.iterations)
        check_positive("epsilon", self.epsilon, integer=False)

    def alone(self) -> "Softmax":
        return Softmax()  # the plan's similarity, and what its rows are weighed by

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        return sinkhorn(logits, valid, iterations=self.iterations, epsilon=self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTransport:
    """Transport plan with at most `capacity` tokens for each expert, without gradient.

    See `ops.transport.sparse_transport`; the similarity is a softmax over experts.
    """

    capacity: Capacity = field(default_factory=lambda: Capacity(factor=2.0))
    iterations: int = 20
    learning_rate: float = 1e-2
    gamma: float = 1.0
    reach: Reach = field(default="group", init=False)

    def __post_init__(self) -> None:
        check_positive("iterations", self.iterations)
        check_positive("learning_rate", self.learning_rate, integer=False)
        check_positive("gamma", self.gamma, integer=False)

    def alone(self) -> "Softmax":
        return Softmax()  # the plan's similarity, and what its rows are weighed by

    def __call__(self, logits: Scores, valid: Valid) -> Scores:
        _, members, experts = logits.shape
        most = self.capacity.of(members, 1, experts)
        rows = most if valid is None else self.capacity.of_groups(valid.sum(1), 1, experts)
        return sparse_transport(
            logits.softmax(-1),
            rows,
            valid,
            most=most,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            gamma=self.gamma,
        )


def _hide_padding(logits: Tensor, valid: Valid) -> Tensor:
    """Logits that are as low as can be where there is no real token: finite in an empty group."""
    if valid is None:
        return logits
    real = valid.reshape(*valid.shape, *(1 for _ in logits.shape[2:]))
    return logits.masked_fill(~real, torch.finfo(logits.dtype).min)
