"""What the layer checks share: layers, and the same layers written out slowly.

Shapes: `batch tokens dim` in and out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moefold.experts import Experts, activations
from moefold.moe import MoE, MoEConfig
from moefold.record import record_routing
from moefold.routers import AbstractRouter
from moefold.routing import Routing
from moefold.testing.contract import from_seed
from moefold.testing.probe import Batch, RouterCase, assert_close


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCase:
    """A layer to be checked, and where its tokens come from."""

    config: MoEConfig
    dim: int
    tokens: RouterCase

    def layer(
        self, *, training: bool = False, dtype: torch.dtype = torch.float64, **changes: Any
    ) -> MoE:
        """A new layer, the same on every call except for the changes to its configuration."""
        with from_seed(0):
            layer = replace(self.config, **changes).build(self.dim, site="encoder.layer.3")
        return layer.to(self.tokens.device, dtype).train(training)

    def batches(self) -> Iterator[Batch]:
        """Without and with padding; see `RouterCase.batches`."""
        return self.tokens.batches()


def layer_case(
    config: MoEConfig,
    *,
    dim: int = 7,
    ids: bool = False,
    compile: bool = False,
    device: str = "cpu",
) -> LayerCase:
    """A case for a configuration; settings that do not fit raise here, by themselves."""
    with from_seed(0):
        router = config.build(dim).router
    assert isinstance(router, AbstractRouter), "configurations build nothing else"
    tokens = RouterCase(
        make=config.router.build,
        dim=dim,
        num_experts=config.num_experts,
        group=router.group,
        ids=ids,
        compile=compile,
        device=device,
    )
    return LayerCase(config=config, dim=dim, tokens=tokens)


def forward(layer: Callable[..., Tensor], batch: Batch, *, seed: int = 0) -> Tensor:
    """Run a layer from a fixed random state."""
    with from_seed(seed):
        return layer(batch.x, batch.mask, batch.ids)


def recorded(layer: MoE, batch: Batch) -> tuple[Tensor, Routing]:
    """What a layer returns, and the routing that it used."""
    with record_routing(layer) as record:
        y = forward(layer, batch)
    assert len(record[""]) == 1, f"one pass left {len(record[''])} routings in the record"
    return y, record[""][0]


def mlp(experts: Experts, expert: int, x: Tensor) -> Tensor:
    """One expert on some rows, written out."""
    weights = experts.weights
    hidden = x @ weights.up[expert].t()
    if weights.up_bias is not None:
        hidden = hidden + weights.up_bias[expert]
    activate = activations.get(weights.activation)
    if weights.gated:
        width = weights.down.shape[2]
        hidden = activate(hidden[..., :width]) * hidden[..., width:]
    else:
        hidden = activate(hidden)
    out = hidden @ weights.down[expert].t()
    return out if weights.down_bias is None else out + weights.down_bias[expert]


def by_definition(layer: MoE, routing: Routing, batch: Batch) -> Tensor:
    """The layer as two matrices and a loop: `C @ experts(D @ x)`, plus the shared expert."""
    mask = torch.ones_like(batch.x[..., 0], dtype=torch.bool) if batch.mask is None else batch.mask
    x = batch.x.masked_fill(~mask.unsqueeze(-1), 0.0)
    dispatch, combine = routing.as_matrices()
    rows = (dispatch @ x.flatten(0, 1)).split(routing.rows_per_expert.tolist())
    out = torch.cat([mlp(layer.experts, expert, own) for expert, own in enumerate(rows)])
    y = (combine @ out).reshape(x.shape)
    return y + shared(layer, batch.x, mask)


def shared(layer: MoE, x: Tensor, mask: Tensor) -> Tensor:
    """What the shared expert adds; zero without one."""
    if layer.shared is None:
        return torch.zeros_like(x)
    return mlp(layer.shared, 0, x).masked_fill(~mask.unsqueeze(-1), 0.0)


def gradients(layer: MoE, *others: Tensor) -> dict[str, Tensor]:
    """Every gradient by name; what has none is left out."""
    named = [*layer.named_parameters(), *((f"input {i}", t) for i, t in enumerate(others))]
    return {name: tensor.grad for name, tensor in named if tensor.grad is not None}


def same_gradients(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str, tolerance: float = 1e-9
) -> None:
    """Raise unless the same tensors have the same gradients."""
    lost = sorted(set(want) ^ set(got))
    assert not lost, f"{what}: only one of the two gives a gradient to {', '.join(lost)}"
    for name, gradient in want.items():
        assert_close(got[name], gradient, f"{what}: gradient of {name}", tolerance)


def task(y: Tensor) -> Tensor:
    """A loss that treats every number of the output differently."""
    return (y * torch.linspace(-1, 2, y.shape[-1], device=y.device)).square().sum()
