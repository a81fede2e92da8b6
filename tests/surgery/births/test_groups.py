"""Virtual groups: complete groups of shards are the dense MLP, to rounding, on real models."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moefold
from moefold import MoEConfig, UpcycleConfig, VirtualGroups, routers
from moefold.ops.select import top
from moefold.surgery.births.groups import HOMOGENEOUS, sums_to_one
from moefold.surgery.hosts import find_host

# Two or more products whose terms are summed in another order, in float64, of outputs of about 1:
# the claim is 1e-10, rounding leaves some 1e-15.
EXACT = 1e-10


def llama(**changes: object) -> Any:
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 40,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def groups(expansion: int, granularity: int, top_k: int, router: str = "mixtral", **settings):
    return MoEConfig(
        num_experts=expansion * granularity, router=routers.config(router, k=top_k, **settings)
    )


def change(model: nn.Module, inputs: dict[str, torch.Tensor], config: UpcycleConfig):
    """The largest change of an output of a real token, and the plan; biases are drawn first."""
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_()  # a fresh model has zeros, which show nothing
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs)[0][real]
        made = moefold.upcycle(model, config)
        return float((model(**inputs)[0][real] - before).abs().max()), made


# An expert of each group by hand: dim 1, width 2, G = 2, E = 2, two groups of two shards.
#
#     up      [a, b]              expert 0   a      1  b      2  a      3  b
#     down    [c, d]                         c         d         c         d     each times 2
#     router  rows r, s                      r         r         s         s
def test_four_experts_by_hand(tiny):
    model = tiny(hidden_act="relu").double()
    mlp = model.encoder.layer[1]
    up, down = mlp.intermediate.dense.weight.clone(), mlp.output.dense.weight.clone()
    bias = mlp.output.dense.bias.data.normal_().clone()
    moefold.upcycle(model, UpcycleConfig(moe=groups(2, 2, 2), birth=VirtualGroups(granularity=2)))
    moe = model.encoder.layer[1].moe
    root = 2**0.5
    for expert, neurons in enumerate([slice(0, 12), slice(12, 24)] * 2):
        # Products with a square root that is rounded: relative 1e-15.
        assert torch.allclose(moe.experts.up_proj[expert], up[neurons] * root, rtol=1e-14, atol=0)
        torch.testing.assert_close(
            moe.experts.down_proj[expert], down[:, neurons] * root, rtol=1e-14, atol=0
        )
        assert torch.equal(moe.experts.down_proj_bias[expert], bias)
    rows = moe.router.weight
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    assert not torch.equal(rows[0], rows[2])


PUBLISHED = [(8, 1, 1), (8, 1, 2), (8, 8, 8), (8, 8, 16), (2, 2, 2)]


@pytest.mark.parametrize("std", [0.0, 0.02, 30.0])
@pytest.mark.parametrize("sizes", PUBLISHED, ids=lambda s: "E{}G{}T{}".format(*s))
@pytest.mark.parametrize("host", ["bert", "llama"])
def test_complete_groups_keep_the_function(tiny, batch, host, sizes, std):
    # BERT: gelu, biases in both maps. Llama: gated, silu, causal, no biases.
    model = (tiny(num_hidden_layers=2) if host == "bert" else llama()).double()
    birth = VirtualGroups(granularity=sizes[1], router_std=std)
    found, made = change(model, batch, UpcycleConfig(moe=groups(*sizes), sites="all", birth=birth))
    assert found < EXACT
    assert made.kept_at_birth
    assert f"complete groups of {sizes[1]}" in made.why


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("spread", ["exact", "published"])
@pytest.mark.parametrize("host", ["bert", "llama"])
def test_where_the_scale_may_go(tiny, batch, host, activation, spread):
    # Published: exponent 1/2 on both maps of a plain expert, 1/3 for relu2 or where there is a
    # gate. That is exact for relu and its leaky kin, and for plain relu2, and for no others.
    make = tiny if host == "bert" else llama
    model = make(hidden_act=activation, num_hidden_layers=2).double()
    birth = VirtualGroups(granularity=4, spread=spread, router_std=1.0)
    config = UpcycleConfig(moe=groups(2, 4, 4), sites="all", birth=birth)
    found, made = change(model, batch, config)
    fits = activation in ("relu", "leaky_relu") or (activation == "relu2" and host == "bert")
    assert made.kept_at_birth == (found < EXACT) == (spread == "exact" or fits)
    if not made.kept_at_birth:
        assert found > 1e-3
        assert f"published exponent changes what {activation} does" in made.why


def test_homogeneous_activations_are_those_that_are():
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    for name in moefold.experts.activations.names():
        act = moefold.experts.activations.get(name)
        # Two factors: tanh(a z) is no power of a.
        degrees = [
            p for p in (1, 2, 3) if all(torch.allclose(act(a * x), a**p * act(x)) for a in (2, 3))
        ]
        assert degrees == ([HOMOGENEOUS[name]] if name in HOMOGENEOUS else [])


@pytest.mark.parametrize("std", [0.0, 0.02, 1.0])
def test_softmax_before_top_k_is_exact_for_a_uniform_router_only(tiny, batch, std):
    # E G^2 / T = 64 * 8 / 8 = 64 for E8G8T8 and m = T / (E G) = 1/8: G / m = 64.
    config = groups(8, 8, 8, "token-choice")
    birth = VirtualGroups(granularity=8, router_std=std)
    assert birth.factor(config) == 64
    model = tiny(num_hidden_layers=2).double()
    found, made = change(model, batch, UpcycleConfig(moe=config, sites="all", birth=birth))
    assert made.kept_at_birth == (found < EXACT) == (std == 0.0)
    if std:
        # Above one: the chosen groups are those that the softmax prefers.
        assert re.search(r"shards of a token count [1-8]\.\d\d \.\.\. [1-8]\.\d\d times", made.why)


@pytest.mark.parametrize(
    ("scaling", "router", "factor"),
    [
        ("auto", {"name": "mixtral", "k": 4}, 4.0),
        ("auto", {"name": "token-choice", "k": 4, "renormalize": True}, 4.0),
        ("auto", {"name": "token-choice", "k": 4}, 16 * 4 / 4),
        ("auto", {"name": "token-choice", "k": 8}, 16 * 4 / 8),
        ("auto", {"name": "hash", "by": "position", "k": 4}, 4.0),
        ("auto", {"name": "soft"}, 4.0),
        ("pre-softmax", {"name": "mixtral", "k": 4}, 16.0),
        ("post-softmax", {"name": "token-choice", "k": 4}, 4.0),
        ("none", {"name": "token-choice", "k": 4}, 1.0),
        (2.5, {"name": "expert-choice"}, 2.5),
    ],
    ids=str,
)
def test_the_factor(scaling, router, factor):
    config = MoEConfig(num_experts=16, router=routers.config(**router))
    assert VirtualGroups(granularity=4, scaling=scaling).factor(config) == factor


def test_a_factor_that_nothing_says(tiny):
    config = UpcycleConfig(
        moe=MoEConfig(num_experts=4, router=routers.config("expert-choice")),
        birth=VirtualGroups(granularity=2),
    )
    with pytest.raises(ValueError, match=r"router 'expert-choice' do not sum to one.* a number as"):
        moefold.plan(tiny(), config)


def test_trying_the_weights_draws_nothing():
    state = torch.get_rng_state()
    assert sums_to_one(groups(2, 2, 2))
    assert torch.equal(torch.get_rng_state(), state)


# Repeated rows give tied scores, and the lowest index wins a tie: with groups side by side what is
# cut off at k is a group, never a part of one.
#
#     scores   .3 .3 .3 | .5 .5 .5 | .3 .3 .3      k = 6
#     chosen    x  x  x |  x  x  x |
def test_ties_are_cut_between_groups():
    scores = torch.tensor([0.3, 0.5, 0.3]).repeat_interleave(3)
    assert top(scores[None], 6, -1).tolist() == [[True] * 6 + [False] * 3]


@pytest.mark.parametrize("start", ["normal", "zero"])
@pytest.mark.parametrize(("experts", "granularity"), [(6, 2), (12, 3), (40, 5), (64, 8)])
def test_tokens_take_complete_groups(experts, granularity, start):
    # In float32, for many tokens, also where a product is computed in blocks that cut a group, and
    # where all groups are tied.
    config = MoEConfig(num_experts=experts, router=routers.config("mixtral", k=2 * granularity))
    router = config.router.build(33, experts)
    VirtualGroups(granularity=granularity, router_start=start).start_router(router)
    routing = router(torch.randn(4, 500, 33))
    chosen = routing.chosen.unflatten(-1, (-1, granularity))
    assert torch.equal(chosen.any(-1), chosen.all(-1))
    assert torch.equal(chosen.any(-1).sum(-1), torch.full((4, 500), 2))
    if start == "zero":
        assert bool(chosen[..., :2, :].all())


def test_groups_in_part_are_said(tiny, batch):
    config = UpcycleConfig(moe=groups(2, 4, 3), sites="all", birth=VirtualGroups(granularity=4))
    found, made = change(tiny().double(), batch, config)
    assert found > 1e-3
    assert not made.kept_at_birth
    assert made.why == "tokens take groups of 4 experts in part"


def test_orthogonal_rows_are_those_of_groups():
    # 8 experts are more than the 6 dimensions, their 4 groups are not.
    router: Any = routers.build("mixtral", dim=6, num_experts=8)
    VirtualGroups(granularity=2, router_start="orthogonal").start_router(router)
    rows = router.weight.detach()[::2].double()
    # float32 rows of a length of about 0.05.
    assert torch.allclose(rows @ rows.t(), torch.eye(4).double() * 0.02**2 * 6, atol=1e-8)


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        (
            6,
            {"granularity": 4},
            r"num_experts is 6, which granularity=4 does not .* 4, 8, 12",
        ),
        (
            10,
            {"granularity": 5},
            r"encoder.layer.1: the MLP is 24 wide, which granularity=5 does not divide; .* 3, 4, 6",
        ),
    ],
    ids=["experts", "width"],
)
def test_what_does_not_divide(tiny, experts, settings, message):
    moe = MoEConfig(num_experts=experts, router=routers.config("mixtral"))
    with pytest.raises(ValueError, match=message):
        moefold.plan(tiny(), UpcycleConfig(moe=moe, birth=VirtualGroups(**settings)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": 0}, "granularity is 0; it must be a positive whole number"),
        ({"scaling": "presoftmax"}, "scaling is 'presoftmax'; .* Did you mean 'pre-softmax'"),
        ({"scaling": 0.0}, "scaling is 0.0; it must be a positive finite number"),
        ({"spread": "both"}, "spread is 'both'; allowed: 'exact', 'published'"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    from tests.routers.common import untyped

    with untyped(), pytest.raises(ValueError, match=message):
        VirtualGroups(**settings)


def test_another_width_is_refused(tiny):
    moe = MoEConfig(num_experts=4, expert_width=24, router=routers.config("mixtral"))
    with pytest.raises(ValueError, match=r"width 24 in 2 parts makes experts of width 12; leave"):
        moefold.plan(tiny(), UpcycleConfig(moe=moe, birth=VirtualGroups(granularity=2)))
    sites = find_host(tiny()).sites(tiny())
    assert sites[0].width == 24
