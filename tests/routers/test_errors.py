"""What routers refuse: settings out of range, input of the wrong kind, logits that are no numbers.

Messages are matched on the values that are computed into them. Rank and dtype are checked without
the typing hook, as users meet them.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold import routers
from tests.routers.common import DIM, EXPERTS, LEARNT, NAMES, batch, build, exact, route, untyped

WITH_K = [name for name in NAMES if "k" in (routers.known_settings(name) or ())]
WITH_CAPACITY = [name for name in NAMES if "capacity" in (routers.known_settings(name) or ())]
WITH_GROUP = [name for name in NAMES if "group" in (routers.known_settings(name) or ())]
WITH_LOGITS = (*LEARNT, "soft")


# Settings


@pytest.mark.parametrize("name", [*WITH_K, "custom"])
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (5, r"k is 5, but there are only 4 experts; use k <= 4 or more experts"),
        (0, r"k is 0; it must be a positive whole number"),
        (-1, r"k is -1; it must be a positive whole number"),
        (2.0, r"k is 2.0; it must be a positive whole number"),
        (True, r"k is True; it must be a positive whole number"),
    ],
    ids=repr,
)
def test_k_out_of_range_is_refused(name, k, message):
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build(name, dim=DIM, num_experts=EXPERTS, k=k)


@pytest.mark.parametrize("name", [*WITH_CAPACITY, "custom"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "capacity is 0; it must be a positive whole number"),
        ({"capacity": -2}, "capacity is -2; it must be a positive whole number"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; it must be a positive finite number"),
        ({"capacity_factor": -0.5}, "capacity_factor is -0.5; it must be a positive finite number"),
        ({"capacity": 2, "capacity_factor": 1.5}, "capacity is 2 and capacity_factor is 1.5; give"),
        (
            {"capacity_factor": 1.5, "convention": "vmeo"},
            "convention is 'vmeo'; allowed: 'moefold', 'vmoe', 'flaxformer'",
        ),
    ],
    ids=str,
)
def test_capacity_out_of_range_is_refused(name, settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build(name, dim=DIM, num_experts=EXPERTS, **settings)


@pytest.mark.parametrize("name", WITH_GROUP)
@pytest.mark.parametrize("group", [0, -4, "sequences", 2.5, True], ids=repr)
def test_an_unknown_group_is_refused(name, group):
    message = rf"group is {group!r}; it must be 'sequence', 'batch'"
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build(name, dim=DIM, num_experts=EXPERTS, group=group)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "switch",
            {"capacity_factor": 0.0},
            "capacity_factor is 0.0; it must be a positive finite number",
        ),
        ("token-choice", {"priority": "score"}, "priority is 'score'; allowed: 'order', 'gate'"),
        ("token-choice", {"noise_std": -1.0}, "noise_std is -1.0; it must be zero or more"),
        ("token-choice", {"jitter": -0.1}, "jitter is -0.1; it must be zero or more"),
        ("token-choice", {"jitter": 1.0}, "jitter is 1.0; it must be smaller than 1"),
        ("token-choice", {"noise_std": float("nan")}, "noise_std is nan; it must be zero or more"),
        ("soft", {"slots": 0}, "slots is 0; it must be a positive whole number"),
        ("soft", {"noise_std": -1.0}, "noise_std is -1.0; it must be zero or more"),
        (
            "sinkhorn-token-choice",
            {"iterations": 0},
            "iterations is 0; it must be a positive whole",
        ),
        (
            "sinkhorn-expert-choice",
            {"epsilon": 0.0},
            "epsilon is 0.0; it must be a positive finite",
        ),
        (
            "sparse-transport-expert-choice",
            {"gamma": -1.0},
            "gamma is -1.0; it must be a positive finite number",
        ),
        (
            "sparse-transport-expert-choice",
            {"learning_rate": 0.0},
            "learning_rate is 0.0; it must be a positive finite number",
        ),
        (
            "sparse-transport-expert-choice",
            {"iterations": -1},
            "iterations is -1; it must be a positive whole number",
        ),
        ("unified", {"alpha": -0.1}, "alpha is -0.1; it must be zero or more"),
        ("unified", {"alpha": 1.1}, "alpha is 1.1; it must lie between 0 .* and 1"),
        ("threshold", {"alpha": 1.1}, "alpha is 1.1; it must lie between 0 .* and 1"),
        ("unified", {"budget": 0.0}, "budget is 0.0; it must be a positive finite number"),
        (
            "unified",
            {"budget": 4.5},
            "budget is 4.5 experts a token, but there are only 4 experts; use .* at most 4",
        ),
        (
            "unified",
            {"expert_score": "softmax"},
            "expert_score is 'softmax'; allowed: 'sigmoid', 'token-softmax'",
        ),
        (
            "unified",
            {"combine": "sum"},
            "combine is 'sum'; allowed: 'unified', 'softmax', 'renormalized', 'row-normalized'",
        ),
        ("unified", {"min_experts": -1}, "min_experts is -1; it must be a whole number, zero or"),
        ("unified", {"min_experts": 0.5}, "min_experts is 0.5; it must be a whole number, zero"),
        ("unified", {"max_experts": 0}, "max_experts is 0; it must be a positive whole number"),
        ("unified", {"min_experts": 3}, "min_experts is 3, more than the budget of 2.0 experts"),
        ("unified", {"max_experts": 1}, "max_experts is 1, less than the budget of 2.0 experts"),
        (
            "bias-balanced",
            {"expert_groups": 3},
            "expert_groups is 3, which does not divide 4 experts; use a divisor",
        ),
        (
            "bias-balanced",
            {"expert_groups": 2, "top_groups": 3},
            "top_groups is 3, but there are only 2 expert_groups",
        ),
        (
            "bias-balanced",
            {"expert_groups": 4, "k": 2},
            "k is 2, but top_groups=1 leaves a token only 1 experts; raise top_groups or lower k",
        ),
        ("bias-balanced", {"top_groups": 0}, "top_groups is 0; it must be a positive whole number"),
        ("bias-balanced", {"scale": 0.0}, "scale is 0.0; it must be a positive finite number"),
        ("cosine", {"width": 0}, "width is 0; it must be a positive whole number"),
        ("cosine", {"temperature": 0.0}, "temperature is 0.0; it must be a positive finite number"),
        ("hash", {"by": "token"}, "by is 'token'; allowed: 'id', 'position'"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused(name, settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build(name, dim=DIM, num_experts=EXPERTS, **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 0}, "dim is 0; it must be a positive whole number"),
        ({"num_experts": 0}, "num_experts is 0; it must be a positive whole number"),
        ({"num_experts": -1}, "num_experts is -1; it must be a positive whole number"),
    ],
    ids=str,
)
def test_sizes_of_nothing_are_refused(name, sizes, message):
    known = routers.known_settings(name) or ()
    # Settings that would fit a single expert: it is the size that is wrong.
    settings: dict[str, Any] = {
        key: value for key, value in {"k": 1, "budget": 1.0}.items() if key in known
    }
    build = partial(routers.build, name, dim=DIM, num_experts=EXPERTS, **settings)
    with untyped(), pytest.raises(ValueError, match=message):
        build(**sizes)


# Causal hosts


@pytest.mark.parametrize("name", NAMES)
def test_a_router_that_looks_ahead_is_refused_to_causal_hosts(name):
    router = routers.build(name, dim=DIM, num_experts=EXPERTS)
    if router.reach in ("token", "past"):
        assert routers.build(name, dim=DIM, num_experts=EXPERTS, causal=True).is_causal
        return
    message = (
        rf"router '{name}' looks at the whole {router.reach}, so a later token would change an "
        rf"earlier one; .*Causal routers: .*token-choice, .*threshold.*group='position'"
    )
    with pytest.raises(ValueError, match=message) as caught:
        routers.config(name).build(DIM, EXPERTS, causal=True)
    listed = str(caught.value).partition("Causal routers: ")[2].partition(" (or")[0].split(", ")
    assert tuple(listed) == routers.causal_names()
    for stand_in in listed:
        assert routers.build(stand_in, dim=DIM, num_experts=EXPERTS, causal=True).is_causal


@pytest.mark.parametrize("name", WITH_GROUP)
def test_groups_of_one_position_are_causal(name):
    router = routers.build(name, dim=DIM, num_experts=EXPERTS, group="position", causal=True)
    assert router.is_causal


def test_capacity_makes_token_choice_look_ahead():
    with pytest.raises(ValueError, match="router 'token-choice' looks at the whole group"):
        routers.build("token-choice", dim=4, num_experts=4, capacity_factor=1.5, causal=True)
    # Room by arrival, fixed beforehand, and no second choices: only the past matters.
    past = routers.build("token-choice", dim=4, num_experts=4, k=1, capacity=2, causal=True)
    assert past.reach == "past"


# Input


def calls(name: str) -> list[tuple[Tensor, Tensor | None, Tensor | None, str]]:
    x = torch.randn(2, 5, DIM)
    ids = torch.zeros(2, 5, dtype=torch.long)
    real = torch.ones(2, 5, dtype=torch.bool)
    return [
        (torch.zeros(2, 5, dtype=torch.long), None, ids, "x has dtype torch.int64; .* embed them"),
        (x.long(), None, ids, "x has dtype torch.int64; a router needs floating point"),
        (x[0], None, ids, r"x has shape \(5, 6\), rank 2; a router needs \[batch, tokens, dim\]"),
        (x[None], None, ids, r"x has shape \(1, 2, 5, 6\), rank 4; a router needs"),
        (x[..., :4], None, ids, "x has width 4, the router was built for dim=6"),
        (x, real[:, :3], ids, r"mask has shape \(2, 3\), but x has \[batch, tokens\] = \(2, 5\)"),
        (x, real[..., None], ids, r"mask has shape \(2, 5, 1\), but x has .* \(2, 5\)"),
        (x, real.t(), ids, r"mask has shape \(5, 2\), but x has .* = \(2, 5\)"),
        (
            x,
            real.long(),
            ids,
            r"mask has dtype torch.int64; it must be bool, .* pass mask.bool\(\)",
        ),
        (x, real.float(), ids, "mask has dtype torch.float32; it must be bool"),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(10))
def test_input_of_the_wrong_kind_is_refused_by_site(name, case):
    router = routers.build(name, dim=DIM, num_experts=EXPERTS)
    router.site = "encoder.layer.3.mlp"
    x, mask, ids, message = calls(name)[case]
    with untyped(), pytest.raises(ValueError, match=rf"^encoder\.layer\.3\.mlp: {message}"):
        router(x, mask, ids)


@pytest.mark.parametrize("name", WITH_GROUP)
def test_a_group_that_does_not_divide_is_refused(name):
    router = build(name, group=4)
    with pytest.raises(
        ValueError, match=r"group size 4 does not divide the 10 tokens .*\(2 .* x 5"
    ):
        router(torch.randn(2, 5, DIM, dtype=torch.float64))
    route(router, batch(2, 6))  # 12 tokens are three groups


@pytest.mark.parametrize("name", WITH_LOGITS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_that_are_no_numbers_are_refused_by_site(name, junk, training):
    router = build(name).train(training)
    router.site = "decoder.block.7"
    given = batch()
    assert given.mask is not None
    given.x[~given.mask] = junk  # padding may hold anything
    route(router, given)
    given.x[2, 1, 4] = junk
    assert given.mask[2, 1]
    with pytest.raises(ValueError, match=r"^decoder\.block\.7: router logits are NaN or infinite"):
        route(router, given)


def test_logits_of_padding_may_be_anything():
    # For routers that do not clear their padding first.
    router = build("token-choice")
    logits = torch.zeros(1, 2, EXPERTS)
    logits[0, 1, 3] = float("nan")
    router.check_finite(logits, torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="router logits are NaN or infinite"):
        router.check_finite(logits, torch.tensor([[False, True]]))


def test_large_logits_are_fine_though_their_sum_is_infinite():
    router, largest = build("token-choice"), torch.finfo(torch.float32).max
    logits = torch.full((1, 2, EXPERTS), largest)
    router.check_finite(logits, None)
    for junk in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="router logits are NaN or infinite"):
            router.check_finite(logits.index_fill(2, torch.tensor(1), junk), None)


@pytest.mark.parametrize("name", ["token-choice", "soft"])
def test_where_the_host_does_not_wait_the_device_refuses(name, monkeypatch):
    # On a GPU and in a compiled graph: an assertion of the device, with the same text.
    router = routers.build(name, dim=DIM, num_experts=EXPERTS)
    router.site = "decoder.block.7"
    x = torch.randn(1, 3, DIM)
    x[0, 1, 2] = float("nan")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"decoder\.block\.7: router logits are NaN or infinite"):
        router(x)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_parameters_that_are_no_numbers_are_refused(name):
    # A router whose own weights diverged says so as well, though its input is fine.
    router = build(name)
    with torch.no_grad():
        next(router.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="router logits are NaN or infinite"):
        route(router, batch())


def test_half_precision_that_overflows_is_refused():
    # 300 * 300 is more than float16 holds; the logits are float32, so this passes; an input that
    # has overflowed already does not.
    router = exact("token-choice", 2).half()
    assert torch.isfinite(router(torch.full((1, 1, 2), 300.0).half()).logits).all()
    with pytest.raises(ValueError, match="overflow in half precision"):
        router(torch.full((1, 1, 2), 300.0).half() * 300)


def test_hash_without_ids_is_refused():
    router = routers.build("hash", dim=DIM, num_experts=EXPERTS)
    router.site = "block.0"
    x = torch.randn(2, 5, DIM)
    with pytest.raises(ValueError, match=r"^block\.0: the hash router needs token ids; pass ids="):
        router(x)
    with (
        untyped(),
        pytest.raises(
            ValueError, match=r"^block\.0: ids have shape \(2, 4\), but x has .* = \(2, 5\)"
        ),
    ):
        router(x, None, torch.zeros(2, 4, dtype=torch.long))
    routers.build("hash", dim=DIM, num_experts=EXPERTS, by="position")(x)


def test_balanced_assignment_does_not_compile(monkeypatch):
    router = routers.build("base", dim=DIM, num_experts=EXPERTS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="solved on the host and cannot be compiled for training"):
        router(torch.randn(1, 3, DIM))
    router.eval()(torch.randn(1, 3, DIM))


def test_the_refusal_of_a_router_survives_members_that_cannot_be_built(monkeypatch):
    def needy(dim, num_experts, *, needed):
        raise AssertionError("must not be called")

    registry = copy.deepcopy(routers.routers)
    registry.register("needy", needy, summary="needs a setting")
    monkeypatch.setattr(routers, "routers", registry)
    with pytest.raises(ValueError, match="Causal routers: token-choice"):
        routers.build("expert-choice", dim=4, num_experts=2, causal=True)


@pytest.mark.parametrize("name", ["hash", "random"])
def test_routers_without_logits_refuse_nan_too(name):
    router = routers.build(name, dim=4, num_experts=2)
    router.site = "layers.7"
    x = torch.ones(1, 3, 4)
    x[0, 1, 2] = torch.nan
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"layers\.7: hidden states are NaN or infinite"):
        router(x, None, ids)


def test_a_group_that_does_not_divide_names_the_layer():
    router = routers.build("unified", dim=4, num_experts=2, group=5)
    router.site = "layers.7"
    with pytest.raises(ValueError, match=r"layers\.7: group size 5 does not divide the 6 tokens"):
        router(torch.ones(2, 3, 4))


def test_renormalize_is_yes_or_no():
    message = "renormalize is 'no'; allowed: False, True"
    with untyped(), pytest.raises(ValueError, match=message):
        routers.build("token-choice", dim=4, num_experts=2, renormalize="no")
