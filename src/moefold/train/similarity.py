"""When the experts of a layer are asked whether they have become alike (SimSMoE).

    schedule = SimilaritySchedule(model, frequency=16.0)
    for batch in batches:
        loss(model(batch)).backward()
        optimizer.step()
        schedule.step()
    schedule.close()

Two experts that see the same tokens are in danger of becoming one. So every pair of experts of a
layer collects the share of tokens that go to both, pass by pass; where a pair has collected more
than `frequency`, the layer computes the loss in the next step, and the pair begins anew.

Shapes: `collected [experts, experts]`, for each site.
"""

from contextlib import ExitStack
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moefold.moe import MoE
from moefold.output_losses import counted_rows, output_losses
from moefold.record import record_routing
from moefold.routers.base import check_at_least_zero
from moefold.routing import Routing, SparseRouting


@final
class SimilaritySchedule:
    """Turns a loss of results on in the steps in which it is due, layer by layer.

    Source: Do et al., *SimSMoE*, 2024, and its released code, which computes the loss in the pass
    that exceeds `frequency`, for every pair that did. Here it is the step after, and the loss
    compares the two experts that share most tokens then.

    Attributes:
        collected: by site, what every pair has collected; above the diagonal.
        due: by site, whether the loss is computed in this step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        frequency: float = 16.0,
        coefficient: float = 1.0,
        loss: str = "cka",
    ) -> None:
        """Listen to every layer with two experts or more; nothing is due at first.

        Args:
            model: has MoE layers.
            frequency: shares of tokens that a pair collects before it is looked at.
            coefficient: of the loss, where it is due.
            loss: a registered loss of results.

        Raises:
            ValueError: no such layer or loss; a value out of range.
        """
        check_at_least_zero("frequency", frequency)
        check_at_least_zero("coefficient", coefficient)
        output_losses.get(loss)
        self._layers = {
            site: layer
            for site, layer in model.named_modules()
            if isinstance(layer, MoE) and layer.experts.num_experts > 1
        }
        if not self._layers:
            raise ValueError(
                f"{type(model).__name__} has no MoE layer with two experts; upcycle it first."
            )
        self._frequency, self._own = frequency, {loss: coefficient}
        self._before = {site: layer.losses for site, layer in self._layers.items()}
        self.collected = {
            site: torch.zeros(layer.experts.num_experts, layer.experts.num_experts)
            for site, layer in self._layers.items()
        }
        self.due = dict.fromkeys(self._layers, False)
        self._stack = ExitStack()
        self._record = self._stack.enter_context(record_routing(model))
        self._set()

    @torch.no_grad()
    def step(self) -> None:
        """Collect what the passes of this step shared, and decide about the next step."""
        for site in self._layers:
            for routing in self._record[site]:
                self.collected[site] += shared_tokens(routing).cpu()
            full = self.collected[site] > self._frequency
            self.collected[site][full] = 0.0
            self.due[site] = bool(full.any())
        self._record.clear()
        self._set()

    def close(self) -> None:
        """Give every layer the losses it had, and stop listening."""
        for site, layer in self._layers.items():
            layer.losses = self._before[site]
        self._stack.close()

    def _set(self) -> None:
        for site, layer in self._layers.items():
            layer.losses = {**self._before[site], **(self._own if self.due[site] else {})}


def shared_tokens(routing: Routing) -> Float[Tensor, "experts experts"]:
    """Share of the real tokens that go to both experts of a pair, above the diagonal."""
    if not isinstance(routing, SparseRouting):
        experts = routing.num_experts
        return torch.zeros(experts, experts, device=routing.rows_per_expert.device)
    counted = counted_rows(routing).to(routing.weight_of_row.dtype)
    chosen = routing.by_pair(counted).flatten(0, 1).float()
    real = routing.num_tokens if routing.mask is None else routing.mask.sum().clamp_min(1)
    return (chosen.t() @ chosen).triu(1) / max(int(real), 1)
