"""The layer and its configuration, by hand; what every router keeps is in test_contracts.py."""

import json
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefold import (
    Experts,
    MoE,
    MoEConfig,
    name_sites,
    record_routing,
    routers,
    set_loss_scale,
)
from moefold.losses import balance
from moefold.routing import SparseRouting
from moefold.testing.probe import untyped


def small(**settings) -> MoE:
    return MoEConfig(**{"num_experts": 4, "expert_width": 8, **settings}).build(6, site="layer.3")


def weight_of(layer: MoE) -> Tensor:
    return layer.router.get_parameter("weight")


def test_a_layer_worked_by_hand():
    # Two experts that multiply by 10 and by 20, a router that compares the two numbers of a token.
    #
    #   token    logits        softmax      expert      result
    #   [1, 0]   [ln 3, 0]     [3/4, 1/4]   0           3/4 * 10 * [1, 0] = [7.5, 0]
    #   [0, 1]   [0, ln 3]     [1/4, 3/4]   1           3/4 * 20 * [0, 1] = [0, 15]
    #   [1, 1]   [ln 3, ln 3]  [1/2, 1/2]   0 (a tie)   1/2 * 10 * [1, 1] = [5, 5]
    layer = MoEConfig(
        num_experts=2,
        expert_width=2,
        router=routers.config("token-choice", k=1),
        activation="identity",
    ).build(2)
    with torch.no_grad():
        weight_of(layer).copy_(math.log(3) * torch.eye(2))
        layer.experts.get_parameter("up_proj").copy_(torch.eye(2).expand(2, 2, 2))
        layer.experts.down_proj.copy_(torch.tensor([10.0, 20.0])[:, None, None] * torch.eye(2))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    want = torch.tensor([[7.5, 0.0], [0.0, 15.0], [5.0, 5.0]])
    # Float32: the softmax of ln 3 is 3/4 up to a few roundings.
    assert torch.allclose(layer(x), want, rtol=1e-6)


def test_all_experts_normalised_are_the_softmax_ensemble():
    layer = small(router=routers.config("mixtral", k=4), activation="tanh").double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    share = (x @ weight_of(layer).double().t()).softmax(-1)
    hidden = torch.tanh(torch.einsum("btd,ewd->btew", x, layer.experts.up_proj))
    each = torch.einsum("btew,edw->bted", hidden, layer.experts.down_proj)
    assert torch.allclose(layer(x), torch.einsum("bte,bted->btd", share, each), atol=1e-12)


def test_the_shared_expert_is_added_for_real_tokens_only():
    layer = small(shared_width=5)
    mask = torch.tensor([[True, True, False]])
    x = torch.randn(1, 3, 6)
    y = layer(x, mask)
    with torch.no_grad():
        assert layer.shared is not None
        layer.shared.down_proj.zero_()
    without = layer(x, mask)
    assert (y[:, 2] == 0).all()
    assert (y[:, :2] != without[:, :2]).all()


# Configuration.

EVERYTHING = MoEConfig(
    num_experts=6,
    expert_width=12,
    router=routers.config("bias-balanced", k=2, expert_groups=3, top_groups=2, scale=2.5),
    gated=True,
    bias=True,
    activation="silu",
    shared_width=4,
    backend="reference",
    losses={"sequence-balance": 0.001},
)


def test_a_configuration_goes_through_json_and_back():
    read = MoEConfig.from_dict(json.loads(json.dumps(EVERYTHING.to_dict())))
    assert read == EVERYTHING
    assert read.to_dict() == EVERYTHING.to_dict()
    assert EVERYTHING.to_dict()["router"] == {
        "name": "bias-balanced",
        "settings": {"k": 2, "expert_groups": 3, "top_groups": 2, "scale": 2.5},
    }


def test_every_field_reaches_the_layer():
    layer = EVERYTHING.build(10, site="here")
    assert (layer.router.num_experts, layer.router.dim) == (6, 10)
    assert layer.experts.gate_up_proj.shape == (6, 24, 10)
    assert layer.experts.get_parameter("down_proj_bias").shape == (6, 10)
    assert layer.shared is not None
    assert layer.shared.gate_up_proj.shape == (1, 8, 10)
    assert (layer.backend, layer.site, layer.router.site) == ("reference", "here", "here")
    assert layer.losses == {"sequence-balance": 0.001}
    assert layer.experts.activation == layer.shared.activation == "silu"


def test_names_of_parameters_are_a_promise():
    # Checkpoints have these names.
    assert set(EVERYTHING.build(10).state_dict()) == {
        "router.weight",
        "router.state",
        *(
            f"{part}.{name}"
            for part in ("experts", "shared")
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        ),
    }
    assert set(MoEConfig().build(10).state_dict()) == {
        "router.weight",
        "experts.up_proj",
        "experts.down_proj",
    }


def test_experts_are_four_times_as_wide_as_tokens_by_default():
    assert MoEConfig(num_experts=2).build(6).experts.width == 24


def test_losses_default_to_those_of_the_router():
    assert small().losses == {"balance": 0.01}
    assert small(router=routers.config("relu")).losses == {"l1": 1.0}
    assert small(losses={}).losses == {}


def test_a_configuration_is_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        EVERYTHING.num_experts = 3  # pyright: ignore[reportAttributeAccessIssue]
    with untyped(), pytest.raises(TypeError, match="positional"):
        MoEConfig(8)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0; it must be a positive whole number"),
        ({"expert_width": 0}, "expert_width is 0; it must be a positive whole number"),
        ({"shared_width": -1}, "shared_width is -1; it must be"),
        ({"losses": {"balanc": 0.1}}, "unknown loss 'balanc'; did you mean 'balance'"),
        ({"losses": {"Z": 0.1}}, "unknown loss 'Z'; "),
    ],
    ids=["experts", "width", "shared", "loss", "loss-case"],
)
def test_a_bad_configuration_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_what_does_not_fit_is_refused_when_built():
    with pytest.raises(ValueError, match="k is 9, but there are only 8 experts"):
        MoEConfig(router=routers.config("token-choice", k=9)).build(6)
    with pytest.raises(ValueError, match=r"unknown activation 'gelo'; did you mean 'gelu'\?"):
        MoEConfig(activation="gelo").build(6)
    with pytest.raises(ValueError, match="a later token would change an earlier one"):
        MoEConfig(router=routers.config("expert-choice")).build(6, causal=True)


def test_a_router_may_be_given_by_its_name():
    config = MoEConfig(router="expert-choice")  # pyright: ignore[reportArgumentType]
    assert config.router == routers.config("expert-choice")
    with pytest.raises(ValueError, match=r"unknown router 'expert-choise'; did you mean 'expert-c"):
        MoEConfig(router="expert-choise")  # pyright: ignore[reportArgumentType]


# Bad input. The first four are seen before the layer where types are checked.


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (
            torch.randn(6),
            None,
            r"x has shape \(6,\), rank 1; a router needs \[batch, tokens, dim\]",
        ),
        (torch.randn(1, 2, 3, 6), None, r"x has shape \(1, 2, 3, 6\), rank 4"),
        (torch.randn(2, 3, 5), None, "x has width 5, the router was built for dim=6"),
        (torch.ones(2, 3, 6).long(), None, "x has dtype torch.int64; a router needs floating"),
        (
            torch.randn(2, 3, 6),
            torch.ones(2, 4).bool(),
            r"mask has shape \(2, 4\), but x has \[batch, tokens\] = \(2, 3\)",
        ),
        (torch.randn(2, 3, 6), torch.ones(2, 3), "mask has dtype torch.float32; it must be bool"),
    ],
    ids=["vector", "rank-4", "width", "integers", "mask-shape", "mask-dtype"],
)
def test_bad_input_is_refused_in_the_name_of_the_site(x: Tensor, mask: Tensor | None, message: str):
    with untyped(), pytest.raises(ValueError, match=f"layer.3: {message}"):
        small()(x, mask)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("router", ["token-choice", "unified", "soft"])
def test_logits_that_are_not_finite_are_refused(router: str, value: float):
    layer = small(router=routers.config(router))
    x = torch.randn(2, 3, 6)
    x[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"layer\.3: router logits are NaN or infinite"):
        layer(x)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    assert torch.isfinite(layer(x, mask)).all(), "in padding it is nobody's business"


def test_a_hash_router_needs_ids():
    layer = small(router=routers.config("hash"))
    x = torch.randn(2, 3, 6)
    with pytest.raises(ValueError, match=r"layer\.3: the hash router needs token ids; pass ids="):
        layer(x)
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]])
    with record_routing(layer) as record:
        layer(x, ids=ids)
    routing = record[""][0]
    assert isinstance(routing, SparseRouting)
    chosen = routing.chosen
    assert torch.equal(chosen[0], chosen[1].flip(0)), "the same id has the same expert"


def test_another_dtype_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"rows are torch.float64, but the experts torch.float32"):
        small()(torch.randn(2, 3, 6, dtype=torch.float64))


# Losses that ride. That they equal added losses is in the contract.


def test_a_loop_that_knows_nothing_of_losses_balances_the_router():
    # All tokens start at expert 0. The task has no gradient at all, so that only the loss that
    # rides can move anything.
    layer = small(router=routers.config("token-choice", k=1), losses={"balance": 1.0})
    x = torch.randn(4, 16, 6) + 1.0
    with torch.no_grad():
        weight_of(layer).zero_()
        weight_of(layer)[0] += 0.2
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    values = []
    for _ in range(60):
        with record_routing(layer) as record:
            (layer(x) * 0.0).sum().backward()
        values.append(balance(record[""][0]).item())
        optimizer.step()
        optimizer.zero_grad()
    assert values[0] > 1.5
    assert values[-1] < 1.1  # 1 is perfect balance


def test_a_gradient_scaler_scales_the_losses_too():
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def gradient(scale: float) -> Tensor:
        torch.manual_seed(0)
        layer = small(losses={"balance": 0.3}).double()
        set_loss_scale(nn.Sequential(layer), scale)
        (layer(x).square().sum() * scale).backward()
        gradient = weight_of(layer).grad
        assert gradient is not None
        return gradient / scale

    # A power of two scales without rounding.
    assert torch.equal(gradient(1024.0), gradient(1.0))


def test_a_negative_loss_scale_is_refused():
    with pytest.raises(ValueError, match=r"loss_scale is -1\.0; it must be zero or more"):
        set_loss_scale(small(), -1.0)


def test_losses_ride_under_reentrant_checkpointing():
    # The first pass runs without gradient, the repeated one with: the loss must ride exactly once.
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        layer = small(losses={"balance": 0.3, "z": 0.1}).double()
        inside = x.clone().requires_grad_()
        y = checkpoint(layer, inside, use_reentrant=True) if again else layer(inside)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        gradient = weight_of(layer).grad
        assert gradient is not None
        gradients.append(gradient)
    # Float64, and the same operations.
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)


def test_a_layer_that_only_its_loss_trains_still_trains():
    # Frozen experts and an input without gradient: the output needs one for the loss alone.
    layer = small(router=routers.config("token-choice", k=1, renormalize=True))
    layer.experts.requires_grad_(False)
    layer(torch.randn(2, 5, 6)).sum().backward()
    gradient = weight_of(layer).grad
    assert gradient is not None
    assert gradient.abs().max() > 0


# In company.


@pytest.mark.parametrize("router", ["token-choice", "expert-choice", "soft", "unified"])
def test_a_layer_without_memory_has_shapes(router):
    # as planning and counting do, forward and backward
    layer = MoEConfig(num_experts=3, expert_width=5, router=router).build(4).to("meta")
    y = layer(torch.randn(2, 6, 4, device="meta"))
    assert (y.shape, y.dtype, y.is_meta) == ((2, 6, 4), torch.float32, True)
    (grad,) = torch.autograd.grad(y.sum(), layer.experts.down_proj)
    assert grad.shape == layer.experts.down_proj.shape


@pytest.mark.parametrize("router", ["token-choice", "expert-choice", "soft", "unified"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)], ids=["no tokens", "no sequences"])
def test_without_tokens_no_expert_computes_and_every_gradient_is_zero(router, shape):
    layer = MoEConfig(num_experts=3, expert_width=5, router=router).build(4)
    with record_routing(layer) as record:
        y = layer(torch.randn(*shape, 4))
    assert y.shape == (*shape, 4)
    (routing,) = record[""]
    assert routing.rows_per_expert.tolist() == [0, 0, 0]
    y.sum().backward()
    for name, parameter in layer.experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_autocast_trains_float32_parameters():
    x = torch.randn(8, 32, 6)

    def gradients(low: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = small(gated=True, bias=True, shared_width=8, activation="silu")
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if low else torch.float32)
        y.float().square().mean().backward()
        return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}

    exact, low = gradients(False), gradients(True)
    assert set(exact) == set(low)
    for name, want in exact.items():
        assert low[name].dtype == torch.float32
        # bfloat16 rounds at 2^-9; a handful of such roundings, averaged over hundreds of rows.
        assert (low[name] - want).norm() < 0.02 * want.norm(), name


def test_a_layer_survives_pickling():
    layer = small(shared_width=3).eval()
    x = torch.randn(2, 3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_parts_put_together_by_hand():
    router = routers.build("expert-choice", dim=6, num_experts=4, capacity=2)
    layer = MoE(router, Experts(4, 6, 8), site="by hand")
    assert layer.losses == {}
    assert router.site == "by hand"
    layer.site = "elsewhere"
    assert router.site == "elsewhere"
    with record_routing(layer) as record:
        layer(torch.randn(1, 5, 6))
    assert record[""][0].rows_per_expert.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gleu"}, "gleu"),
        ({"backend": "grouper"}, "grouped"),
        ({"losses": {"balance": -1.0}}, "coefficient of loss 'balance' is -1.0"),
        ({"losses": {"balance": float("nan")}}, "coefficient of loss 'balance' is nan"),
    ],
)
def test_a_config_is_checked_when_it_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_data_that_is_no_config_is_refused():
    with pytest.raises(ValueError, match="MoEConfig has no setting 'foo'; it has activation"):
        MoEConfig.from_dict({"foo": 1})
    with pytest.raises(ValueError, match=r"not a router configuration: \{'k': 2\}"):
        MoEConfig.from_dict({"router": {"k": 2}})
    assert MoEConfig.from_dict({}) == MoEConfig()


def test_sites_are_named_by_their_place():
    model = torch.nn.Sequential(MoEConfig(num_experts=2, expert_width=4).build(dim=4))
    name_sites(model)
    with pytest.raises(ValueError, match=r"^0: router logits are NaN or infinite"):
        model(torch.full((1, 2, 4), torch.nan))


def test_a_hook_on_the_layer_runs_once_for_one_sequence():
    layer = MoEConfig(num_experts=2, expert_width=4).build(dim=4)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, 4))
    assert calls == [1]
    message = r"mask has shape \(2,\), but x has \[tokens\] = \(3,\)"
    with untyped(), pytest.raises(ValueError, match=message):
        layer(torch.randn(3, 4), torch.ones(2, dtype=torch.bool))


def test_an_activation_with_parameters_keeps_them():
    activation = nn.PReLU(init=0.25)
    Experts(2, 4, 4, activation=activation)
    assert activation.weight.item() == 0.25
