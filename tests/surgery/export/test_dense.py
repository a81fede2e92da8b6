"""The mixture as a graph of fixed shape computes what the mixture computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moefold import MoE, MoEConfig, routers
from moefold.routers import AbstractRouter
from moefold.surgery.export.dense import DenseMixture, reasons_against

DIM = 8


def mixture(router: str, *, settings: dict[str, Any] | None = None, **config: Any) -> MoE:
    """In float64; biases and the soft router's scale are not at a value that hides a mistake."""
    torch.manual_seed(1)
    made = routers.config(router, **(settings or {}))
    moe = MoEConfig(num_experts=4, expert_width=12, router=made, **config).build(DIM)
    for name, parameter in moe.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter)
    return moe.double().eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences of 6, 4 and 0 real tokens; what padding holds must not matter."""
    mask = torch.arange(6) < torch.tensor([[6], [4], [0]])
    x = torch.randn(3, 6, DIM, dtype=torch.float64)
    return x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask


def test_every_expert_on_every_token_by_hand():
    # Two experts that multiply by 2 and by 3, and a router that sees which half is larger:
    #     x = (4, 1): expert 0, weight softmax(4, 1)[0];  x = (0, 2): expert 1, softmax(0, 2)[1]
    config = routers.config("token-choice", k=1)
    made = MoEConfig(num_experts=2, expert_width=2, router=config, activation="identity").build(2)
    with torch.no_grad():
        made.router.get_parameter("weight").copy_(torch.eye(2))
        made.experts.get_parameter("up_proj").copy_(torch.eye(2).expand(2, 2, 2))
        made.experts.down_proj.copy_(torch.stack([2 * torch.eye(2), 3 * torch.eye(2)]))
    x = torch.tensor([[[4.0, 1.0], [0.0, 2.0]]])
    weights = torch.tensor([[4.0, 1.0], [0.0, 2.0]]).softmax(-1)
    wanted = torch.stack([weights[0, 0] * 2 * x[0, 0], weights[1, 1] * 3 * x[0, 1]])
    torch.testing.assert_close(DenseMixture(made)(x)[0], wanted)


@pytest.mark.parametrize("router", routers.names())
def test_it_is_the_mixture(router):
    moe = mixture(router, settings={"by": "position"} if router == "hash" else None)
    if reasons_against(moe):
        assert router in ("hash", "random"), "refused, see test_refusals"
        return
    x, mask = batch()
    with torch.no_grad():
        found, wanted = DenseMixture(moe)(x, mask), moe(x, mask)
        real = x[:2, :4]  # without a mask, all are real
        torch.testing.assert_close(DenseMixture(moe)(real), moe(real), rtol=1e-12, atol=1e-12)
    assert found[~mask].eq(0).all()
    # Two orders of summing about a dozen products of order 1 in float64.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["token-choice", "soft"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_expert(router, gated, bias):
    moe = mixture(router, gated=gated, bias=bias, activation="silu", shared_width=5)
    x, mask = batch()
    with torch.no_grad():
        found, wanted = DenseMixture(moe)(x, mask), moe(x, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_an_expert_that_overflows_on_others_tokens_adds_nothing():
    moe = mixture("token-choice", settings={"k": 1})
    x, _ = batch()
    x = x[:1]
    with torch.no_grad():
        moe.router.get_parameter("weight")[3] = -1e3 * x[0].sum(0)  # nobody's first choice
        chosen = moe.router(x).chosen
        unused = ~chosen.flatten(0, 1).any(0)
        moe.experts.down_proj[unused] = float("inf")
        found = DenseMixture(moe)(x)
    assert unused.any()
    torch.testing.assert_close(found, moe(x), rtol=1e-12, atol=1e-12)


def test_nothing_is_copied():
    moe = mixture("token-choice", shared_width=5)
    ours = {id(parameter) for parameter in moe.parameters()}
    assert {id(parameter) for parameter in DenseMixture(moe).parameters()} == ours


def test_pairs_are_what_the_routing_is_made_of():
    moe = mixture("token-choice")
    x, mask = batch()
    assert isinstance(moe.router, AbstractRouter)
    pairs: Callable[..., dict[str, Any]] = moe.router.pairs  # pyright: ignore
    made, routing = pairs(x, mask), moe.router(x, mask)
    assert torch.equal(made["chosen"], routing.chosen)
    assert torch.equal(made["weights"].masked_fill(~made["chosen"], 0.0), routing.weights)
