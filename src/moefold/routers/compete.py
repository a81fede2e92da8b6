"""Competition: the experts' own results choose, and the gate learns to foresee them (CompeteSMoE).

In a competing pass every real token has a row of every expert. Until the experts have computed
these rows nothing is decided: the routing carries a `ByResults`, and `routing.settled(rows)` is the
routing that counts.

    affinity of expert e for token t = mean over features of softplus(result of e for t)
    winners of a token               = its k largest affinities
    weight of a winner               = its affinity / the sum of the token's winners; of a loser 0

Every other pass, and every pass outside of training, is routed by the gate.

Shapes: `batch tokens experts`; `rows dim` are the experts' results.

Source: Nguyen et al., *CompeteSMoE: Statistically Guaranteed Mixture of Experts Training via
Competition*, 2025 (arXiv 2505.13380), and the code released with it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moefold.ops.precise import in_full_precision
from moefold.ops.select import top
from moefold.ops.weigh import weigh
from moefold.routers.base import float32_or_better
from moefold.routing import SparseRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Competition:
    """In which passes experts compete, and for how many places.

    Attributes:
        k: winners of one token.
        rate: share of the training passes in which experts compete, drawn anew in every pass unless
            a `moefold.train.CompetitionSchedule` decides.
    """

    k: int
    rate: float

    def __post_init__(self) -> None:
        rate = self.rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate!r}; it is a share of passes, from 0 to 1.")

    def is_on(self, decided: bool | None) -> bool:
        """Whether experts compete in this pass: as decided for it, or drawn.

        Raises:
            ValueError: it would have to be drawn in a compiled graph.
        """
        if decided is not None:
            return decided
        if self.rate in (0, 1):
            return self.rate == 1
        if torch.compiler.is_compiling():
            raise ValueError(
                f"rate={self.rate} draws in each pass whether experts compete, which a compiled "
                "graph cannot; let moefold.train.CompetitionSchedule(model, ...) decide before "
                "each step, or train in eager mode."
            )
        # On the CPU, whatever the device is: nothing waits for it, and a pass that activation
        # checkpointing repeats draws the same.
        return bool(torch.rand(()) < self.rate)

    def opened(self, pairs: dict[str, Any]) -> dict[str, Any]:
        """The pairs of the gate, opened to all experts; their weights are the gate's until then."""
        logits, mask = pairs["logits"], pairs["mask"]
        everyone = torch.ones_like(logits, dtype=torch.bool)
        return {
            **pairs,
            "chosen": everyone if mask is None else everyone & mask.unsqueeze(-1),
            "weights": logits.softmax(-1),
            "most_rows": logits.numel(),
            "wanted": None,
            "student": logits,
            "decide": ByResults(k=self.k),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ByResults:
    """Settles a competition.

    Attributes:
        k: winners of one token.
    """

    k: int

    def __call__(self, routing: SparseRouting, rows: Float[Tensor, "rows dim"]) -> SparseRouting:
        """The same rows with the weights that their results earned.

        What competed were the affinities: they are the `logits` and, as a softmax, the `scores` of
        the routing that is returned, so that losses and metrics speak of them; the winners are
        `wanted`. Weights and scores have a gradient for the experts and none for the gate, whose
        logits remain in `student`.
        """
        with in_full_precision(rows.device):
            result = torch.nn.functional.softplus(float32_or_better(rows)).mean(-1)
            affinity = routing.by_pair(result)
            real = None if routing.mask is None else routing.mask.unsqueeze(-1).expand_as(affinity)
            winners = top(affinity.detach(), self.k, -1, real)
            weights = weigh(winners, affinity, normalize=True, scale=1.0)
            return replace(
                routing,
                weight_of_row=routing.by_row(weights),
                logits=affinity,
                noisy_logits=None,
                noise_std=0.0,
                scores=affinity.softmax(-1),
                wanted=winners,
                decide=None,
            )
