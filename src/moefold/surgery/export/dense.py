"""A mixture as a graph of fixed shape: every expert computes every token.

    y[t] = sum over experts e of w[t, e] * expert_e(x[t])        w[t, e] = 0 where e was not chosen

This is the definition of a sparse mixture, in operations every runtime knows: batched products and
a weighted sum, no list of rows whose length depends on the data, no loop over the experts that
happen to have one. A trace cannot lose an expert that its example did not use. The price is that of
all experts: `experts / k` times the products of the mixture, and `experts * tokens * width` numbers
for what is between them. A soft mixture has fixed shapes as it is, and costs what it did.

Shapes: `batch tokens dim` in and out; `experts rows dim` for the experts.
"""

from typing import final

from jaxtyping import Bool, Float
from torch import Tensor

from moefold.experts import Experts, activations
from moefold.moe import MoE
from moefold.record import AbstractRouted
from moefold.routers import SoftRouter, SparseRouter
from moefold.routing import SoftRouting


@final
class DenseMixture(AbstractRouted):
    """What an `MoE` computes in evaluation mode, as a graph of fixed shape.

    Its parameters are the mixture's own.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__(moe.router)
        self.experts = moe.experts
        self.shared = moe.shared
        self.site = moe.site

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Mix; padding comes back as zero."""
        real = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)
        y = (
            _soft(self, x, mask)
            if isinstance(self.router, SoftRouter)
            else _sparse(self, real, mask)
        )
        if self.shared is not None:
            y = y + apply_experts(self.shared, real.flatten(0, 1).unsqueeze(0)).reshape(x.shape)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)


def reasons_against(moe: MoE) -> list[str]:
    """Why a mixture has no graph of fixed shape; empty if it has."""
    router = moe.router
    if not isinstance(router, SparseRouter | SoftRouter):
        return [f"its router, a {type(router).__name__}, gives no matrix of weights"]
    if isinstance(router.group, int):
        return [f"its groups of {router.group} tokens fix the number of tokens"]
    return []


def apply_experts(
    experts: Experts, rows: Float[Tensor, "experts rows dim"]
) -> Float[Tensor, "experts rows dim"]:
    """Every expert on its rows, of which all have equally many."""
    weights, activate = experts.weights, activations.get(experts.activation)
    hidden = rows @ weights.up.transpose(1, 2)
    if weights.up_bias is not None:
        hidden = hidden + weights.up_bias.unsqueeze(1)
    if experts.gated:
        gate, up = hidden.chunk(2, -1)
        hidden = activate(gate) * up
    else:
        hidden = activate(hidden)
    out = hidden @ weights.down.transpose(1, 2)
    return out if weights.down_bias is None else out + weights.down_bias.unsqueeze(1)


def _sparse(mixture: DenseMixture, x: Tensor, mask: Tensor | None) -> Tensor:
    assert isinstance(mixture.router, SparseRouter)
    pairs = mixture.router.pairs(x, mask)
    chosen = pairs["chosen"].flatten(0, 1)
    weights = pairs["weights"].flatten(0, 1).masked_fill(~chosen, 0.0).to(x.dtype)
    rows = x.flatten(0, 1).unsqueeze(0).expand(mixture.experts.num_experts, -1, -1)
    computed = apply_experts(mixture.experts, rows).transpose(0, 1)
    # An expert may overflow on a token it was not chosen for, and zero times infinity is not zero.
    computed = computed.masked_fill(~chosen.unsqueeze(-1), 0.0)
    return (weights.unsqueeze(1) @ computed).squeeze(1).reshape(x.shape)


def _soft(mixture: DenseMixture, x: Tensor, mask: Tensor | None) -> Tensor:
    routing = mixture.router(x, mask)
    assert isinstance(routing, SoftRouting)
    rows = routing.dispatch(x).unflatten(0, (mixture.experts.num_experts, -1))
    return routing.combine(apply_experts(mixture.experts, rows).flatten(0, 1))
