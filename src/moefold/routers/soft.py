"""The soft router: nobody chooses, every slot mixes tokens and every token mixes slots.

Shapes: `groups members dim` tokens, `experts slots` rows for each group.

Puigcerver et al., *From Sparse to Soft Mixtures of Experts*, 2024, section 2.1 and algorithm 2.
"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moefold.ops import kernels
from moefold.ops.precise import in_full_precision, inverse_length, over_length
from moefold.ops.soft import KernelMaps, TorchMaps
from moefold.routers.base import (
    AbstractRouter,
    check_at_least_zero,
    check_positive,
)
from moefold.routing import Group, Routing, SoftRouting


@final
class SoftRouter(AbstractRouter):
    """Soft mixture: logits are cosines of tokens and slots, times a learnt scale.

    The normalised tokens make the logits only; what is mixed into the slots are the tokens as they
    came. `noise_std` is, in training, the standard deviation of noise on the logits as they are
    (sparse routers divide theirs by the number of experts).

    Attributes:
        phi: `[dim, experts, slots]`, one direction for each slot.
        scale: sharpness of both softmaxes, 1 at the start.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        slots: int = 1,
        noise_std: float = 0.0,
        group: Group = "sequence",
    ) -> None:
        super().__init__(dim, num_experts, reach="group", group=group)
        check_positive("slots", slots)
        check_at_least_zero("noise_std", noise_std)
        self.slots = slots
        self.noise_std = noise_std
        self.phi = nn.Parameter(torch.empty(dim, num_experts, slots))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal directions (their length does not matter), a scale of 1."""
        nn.init.normal_(self.phi, std=self.dim**-0.5)
        nn.init.ones_(self.scale)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ids: Int[Tensor, "batch tokens"] | None = None,
    ) -> Routing:
        """Route the tokens; see `AbstractRouter.forward`."""
        self.check(x, mask)
        grouping, _ = self.as_groups(x, mask)
        with in_full_precision(x.device):
            # Padding may hold NaN, and zero times NaN would reach the router's gradient.
            tokens = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
            logits = self._logits(grouping.split(tokens))
            self.check_finite(logits.flatten(1), None)
            if self.noise_std and self.training:
                logits = logits + torch.randn_like(logits) * self.noise_std
            maps = KernelMaps() if kernels.serve(logits) else TorchMaps()
            return SoftRouting(logits=logits, maps=maps, grouping=grouping, mask=mask)

    def _logits(self, tokens: Float[Tensor, "groups members dim"]) -> Tensor:
        """Cosines times the scale; in float32 or better, whatever the tokens are."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        phi, (groups, members) = self.phi.to(dtype), tokens.shape[:2]
        if not members:  # slots with nothing to mix would pass the experts all the same
            nothing = tokens.to(dtype) @ phi[..., :0].flatten(1)
            return nothing.reshape(groups, members, self.num_experts, 0)
        phi = phi * (self.scale.to(dtype) * inverse_length(phi, 0))
        logits = over_length(tokens.flatten(0, 1), phi.flatten(1))
        return logits.reshape(groups, members, self.num_experts, self.slots)
