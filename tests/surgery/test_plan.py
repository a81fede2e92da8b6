"""The plan: which sites, what it costs, what it keeps; and that planning touches nothing."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM, BertModel

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies
from moefold.surgery.plan import spelled_out
from tests.routers.common import untyped

LAYERS = [f"encoder.layer.{i}" for i in range(4)]


def moe(name: str, **settings: object) -> MoEConfig:
    return MoEConfig(num_experts=4, router=routers.config(name, **settings))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("every-other", [1, 3]),
        ("all", [0, 1, 2, 3]),
        ("last:1", [3]),
        ("last:3", [1, 2, 3]),
        (r"encoder\.layer\.[02]", [0, 2]),
        (r"layer\.2", [2]),  # the end of a name, from a dot on
        (r".*[13]", [1, 3]),
        (("encoder.layer.2", "encoder.layer.0"), [0, 2]),
    ],
)
def test_sites(tiny, spec, expected):
    made = moefold.plan(tiny(), UpcycleConfig(sites=spec))
    assert sorted(made.chosen) == [LAYERS[i] for i in expected]
    assert [site.name for site in made.sites] == LAYERS


def test_a_regex_matches_whole_parts_of_a_name(tiny):
    # Not layer 10 and 11 when layer 1 is meant.
    made = moefold.plan(tiny(num_hidden_layers=12), UpcycleConfig(sites=r"layer\.1"))
    assert made.chosen == ("encoder.layer.1",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("every_other", "'every_other' matches no site; did you mean 'every-other'"),
        ("lastt:N", "did you mean 'last:N'"),
        ("decoder", "matches some of: encoder.layer.0, encoder.layer.1"),
        ("layer.(", r"sites 'layer.\(' is not a regular expression"),
        ("last:0", "'last:0': N must be a whole number from 1 to 4"),
        ("last:5", "'last:5': N must be a whole number from 1 to 4"),
        ("last:two", "'last:two': N must be"),
        (("encoder.layer.7",), "no site 'encoder.layer.7'; did you mean 'encoder.layer."),
        (("nothing alike",), "no site 'nothing alike'; There are: encoder.layer.0, encoder"),
    ],
)
def test_sites_refused(tiny, spec, message):
    with pytest.raises(ValueError, match=message):
        moefold.plan(tiny(), UpcycleConfig(sites=spec))


def test_one_layer_has_no_second(tiny):
    with pytest.raises(ValueError, match=r"encoder.layer.0 is the only one; use sites='all'"):
        moefold.plan(tiny(num_hidden_layers=1))


def test_no_layer_at_all(tiny):
    with pytest.raises(
        ValueError, match=r"no host for a .*BertModel: it has no layer of a known form"
    ):
        moefold.plan(tiny(num_hidden_layers=0))


def test_not_a_host():
    with (
        untyped(),
        pytest.raises(ValueError, match="the model is a str; it must be a torch"),
    ):
        moefold.plan("minilm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError,
        match=r"no host for a torch\.nn\.\S+\.Linear: .* There are: bert, .*describe_layer",
    ):
        moefold.plan(nn.Linear(2, 2))


def test_a_compiled_model_is_not_a_host(tiny):
    with pytest.raises(ValueError, match="is a compiled model; upcycle the model first"):
        moefold.plan(torch.compile(tiny()))  # pyright: ignore[reportArgumentType]


def test_a_model_for_several_devices_is_refused(tiny):
    """The wrapper knows the dense weights, and would average no gradient of an expert."""
    with pytest.raises(ValueError, match=r"the model itself is wrapped in DataParallel, which has"):
        moefold.plan(nn.DataParallel(tiny()))


def test_a_compiled_layer_is_refused(tiny):
    model = tiny()
    model.encoder.layer[1] = torch.compile(model.encoder.layer[1])
    with pytest.raises(ValueError, match=r"encoder.layer.1 is wrapped in OptimizedModule, which"):
        moefold.plan(model)


def test_a_plan_is_the_same_in_inference_mode_and_on_any_default_device(tiny):
    model = tiny()
    expected = str(moefold.plan(model))
    with torch.inference_mode(), torch.device("meta"):
        assert str(moefold.plan(model)) == expected


def test_an_unknown_activation_is_refused_by_name(tiny):
    with pytest.raises(
        ValueError, match=r"layer.1 its activation \(LaplaceActivation\) is none of"
    ):
        moefold.plan(tiny(hidden_act="laplace"))


def test_adapters_are_refused_by_name(tiny):
    class Adapted(nn.Linear):
        pass

    model = tiny()
    model.encoder.layer[1].intermediate.dense = Adapted(16, 24)
    with pytest.raises(
        ValueError, match=r"layer.1 its intermediate.dense is a .*Adapted, whose weights"
    ):
        moefold.plan(model)
    # A site that is not asked for may be anything, and the plan says so.
    made = moefold.plan(model, UpcycleConfig(sites="last:1"))
    assert "Adapted" in made.sites[1].reason


def test_width_of_a_copy_cannot_be_chosen(tiny):
    config = UpcycleConfig(moe=MoEConfig(expert_width=20))
    with pytest.raises(
        ValueError, match=r"layer.1: expert_width is 20, .* MLP of width 24; leave expert_width out"
    ):
        moefold.plan(tiny(), config)
    (mixture, _) = moefold.plan(
        tiny(), UpcycleConfig(moe=MoEConfig(expert_width=24))
    ).mixtures.values()
    assert mixture.moe.bias


@pytest.mark.parametrize("name", ["expert-choice", "soft", "unified"])
def test_a_causal_host_refuses_routers_that_see_later_tokens(tiny, name):
    decoder = tiny(is_decoder=True)
    with pytest.raises(ValueError, match=f"router '{name}' .* a later token would.*token-choice"):
        moefold.plan(decoder, UpcycleConfig(moe=moe(name)))


def test_a_causal_host_takes_token_choice(tiny):
    made = moefold.plan(tiny(is_decoder=True), UpcycleConfig(moe=moe("token-choice")))
    assert all(mixture.trial.causal and mixture.causal for mixture in made.mixtures.values())


def test_planning_touches_nothing(tiny):
    model = tiny()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    state = torch.get_rng_state()
    moefold.plan(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_costs_are_those_of_the_model_that_surgery_makes(tiny):
    model = tiny()
    made = moefold.plan(model, UpcycleConfig(moe=moe("token-choice", renormalize=True)))
    assert made.before.parameters == sum(p.numel() for p in model.parameters())
    moefold.upcycle(model, made.config)
    assert made.after.parameters == sum(p.numel() for p in model.parameters())
    # dim 16, width 24: an MLP has 2 * 16 * 24 + 24 + 16 weights. Two sites take 2 of 4 experts for
    # each token instead of one MLP, and a router of 4 * 16.
    assert made.after.active - made.before.active == 2 * (2 * 16 * 24 + 24 + 16 + 4 * 16)
    # Per layer and token: 4 projections of 16 x 16, attention over 128 tokens twice, the MLP.
    assert made.before.flops == 4 * 2 * (4 * 16 * 16 + 2 * 128 * 16 + 2 * 16 * 24)
    assert made.after.flops - made.before.flops == 2 * 2 * (2 * 16 * 24 + 4 * 16)


BIRTHS = {
    "renormalised": (moe("token-choice", renormalize=True), Copies(), "sum to 1"),
    "top-1": (moe("token-choice", k=1, renormalize=True), Copies(), "sum to 1"),
    "shared": (MoEConfig(num_experts=4, shared_width=8), Copies(), "sum to 1"),
    "not renormalised": (moe("token-choice"), Copies(), "sum to 0.5. ... 0.[5-9]., not to 1"),
    "noise": (moe("mixtral"), Copies(copy_noise_std=0.01), "noise of standard deviation 0.01"),
    "capacity": (
        moe("token-choice", renormalize=True, capacity_factor=0.5),
        Copies(),
        r"no expert takes \d+.\d% of random tokens",
    ),
    "expert choice": (
        moe("expert-choice", renormalize=True, capacity_factor=0.5),
        Copies(),
        r"no expert takes \d+.\d% of random tokens",
    ),
    "expert choice of everything": (
        moe("expert-choice", renormalize=True, capacity_factor=4.0),
        Copies(),
        "sum to 1",
    ),
    "soft": (moe("soft"), Copies(), "experts see mixtures of tokens"),
}


@pytest.mark.parametrize(("config", "birth", "why"), BIRTHS.values(), ids=BIRTHS.keys())
def test_the_verdict_on_birth_is_what_happens(tiny, batch, config, birth, why):
    model = tiny().double()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch)[0][real]
        made = moefold.upcycle(model, UpcycleConfig(moe=config, birth=birth))
        change = (model(**batch)[0][real] - before).abs().max()
    # float64, and outputs of a LayerNorm, so about 1: the sums of two or more equal experts differ
    # from one by rounding alone, or the function is another and the output plainly different. The
    # weights are float64 too here, while the plan's trial router is float32.
    assert made.kept_at_birth == (change < 1e-12)
    assert made.kept_at_birth or change > 1e-3
    assert re.search(why, made.why)


def test_the_verdict_thinks_of_tokens_that_are_alike(tiny):
    # Of 4 experts each takes half of the tokens: of different tokens all are covered, most likely,
    # but of equal ones every expert takes the same half.
    model = tiny().double()
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)
    with torch.no_grad():
        before = model(torch.full((1, 8), 3))[0]
        made = moefold.upcycle(
            model, UpcycleConfig(moe=moe("expert-choice", renormalize=True), sites="last:1")
        )
        change = (model(torch.full((1, 8), 3))[0] - before).abs().amax((0, 2))
    assert not made.kept_at_birth
    assert made.why == "no expert takes 50.0% of tokens that are all alike"
    # Rounding alone, as above; and a change one can see.
    assert (change[:4] < 1e-12).all()
    assert (change[4:] > 1e-3).all()


def test_a_plan_reads_like_this(tiny):
    text = str(moefold.plan(tiny(), UpcycleConfig(moe=moe("mixtral"))))
    first, *sites = text.splitlines()[:5]
    assert first == "BertModel (bert): 2 of 4 MLPs become 4 experts, router mixtral(k=2)"
    assert sites == [
        "    encoder.layer.0  stays dense: not in 'every-other'",
        "  + encoder.layer.1  MLP 16 -> 24 -> 16 (gelu) becomes experts",
        "    encoder.layer.2  stays dense: not in 'every-other'",
        "  + encoder.layer.3  MLP 16 -> 24 -> 16 (gelu) becomes experts",
    ]
    assert "  router looks at        the token, no later token" in text
    assert "  rows per token         2.00" in text
    soft = str(moefold.plan(tiny(), UpcycleConfig(moe=moe("soft", slots=8))))
    assert "  router looks at        the group, later tokens too (not for decoders)" in soft
    assert "  rows per token         0.25" in soft  # 4 experts of 8 slots for 128 tokens


def test_a_head_on_top_keeps_its_names(tiny):
    model = BertForMaskedLM(tiny().config)
    assert moefold.plan(model).chosen == ("bert.encoder.layer.1", "bert.encoder.layer.3")
    assert not isinstance(model, BertModel)


def test_a_mixture_is_not_a_config_of_surgery(tiny):
    model = tiny()
    for verb in (moefold.plan, moefold.upcycle):
        with untyped(), pytest.raises(ValueError, match=r"is a MoEConfig; .*UpcycleConfig\(moe="):
            verb(model, MoEConfig())  # pyright: ignore[reportArgumentType]
        with untyped(), pytest.raises(ValueError, match=r"is a dict; it must be a moefold.Upcycle"):
            verb(model, {"sites": "all"})  # pyright: ignore[reportArgumentType]
    assert type(model) is BertModel


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (routers.config("token-choice"), "token-choice(k=2)"),
        (routers.config("token-choice", renormalize=True), "token-choice(k=2, renormalize=True)"),
        (routers.config("token-choice", renormalize=False, k=1), "token-choice(k=1, renormalize=F"),
        (routers.config("unified", alpha=0.0), "unified(budget=2.0, alpha=0.0)"),
        (routers.config("hash", by="position"), "hash(k=1, by='position')"),
        (routers.config("soft"), "soft(slots=1)"),
    ],
    ids=str,
)
def test_a_router_is_spelled_out(config, text):
    assert spelled_out(config).startswith(text)


def test_a_plug_in_router_is_spelled_out():
    config = routers.config("custom", choice={"kind": "top-experts"})
    assert spelled_out(config) == str(config)


@pytest.mark.parametrize("slots", [1, 8])
def test_operations_of_a_soft_router(tiny, slots):
    # What torch itself counts in a mixture on one sequence of 128 tokens of width 16, against what
    # the plan says: logits, dispatch and combine of 4 x slots rows, and the experts.
    model, tokens = tiny(max_position_embeddings=200), 128
    made = moefold.plan(model, UpcycleConfig(moe=moe("soft", slots=slots), sites="last:1"))
    planned = made.mixtures["encoder.layer.3"].moe
    layer = dataclasses.replace(planned, backend="reference").build(16)  # torch can count it
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, tokens, 16))
    dense = 2 * 2 * 16 * 24
    assert made.after.flops - made.before.flops == counter.get_total_flops() / tokens - dense


NO_GRADIENT = "the router gets no gradient from the task"


@pytest.mark.parametrize(
    ("config", "learns"),
    [
        (moe("token-choice", k=1, renormalize=True), False),
        (moe("token-choice", k=1), True),
        (moe("token-choice", k=2, renormalize=True), True),
        (moe("expert-choice"), True),
        (moe("soft"), True),
        (moe("cosine"), True),
        (moe("bias-balanced"), True),
        (moe("hash", by="position"), True),  # it has nothing to learn
    ],
    ids=lambda value: str(value.router) if isinstance(value, MoEConfig) else "",
)
def test_a_router_that_the_task_cannot_teach(tiny, batch, config, learns):
    model = tiny().double()
    made = moefold.upcycle(model, UpcycleConfig(moe=config, sites="last:1"))
    assert made.mixtures["encoder.layer.3"].trial.learns == learns
    assert (NO_GRADIENT in str(made)) == (not learns)
    # And it is so: without losses that ride along, experts apart, the task's gradient.
    layer = model.encoder.layer[3].moe
    layer.losses = {}
    with torch.no_grad():
        layer.experts.down_proj.add_(torch.randn_like(layer.experts.down_proj))
    parameters = list(layer.router.parameters())
    if parameters:
        output = model(**batch)[0]
        (output * torch.randn_like(output)).sum().backward()
        strongest = max(p.grad.abs().max() for p in parameters if p.grad is not None)
        # float64 and outputs of about 1: rounding, or something one can see.
        assert (strongest > 1e-6) == learns
        assert (strongest < 1e-12) == (not learns)


def test_a_group_need_not_divide_the_tokens_of_the_trial(tiny):
    # 3 divides no power of two, but may divide a batch.
    made = moefold.plan(tiny(), UpcycleConfig(moe=moe("expert-choice", group=3)))
    (mixture, _) = made.mixtures.values()
    # Factor 2: each of 4 experts takes ceil(2 * 3 / 4) = 2 tokens of every 3.
    assert mixture.trial.rows == 4 * 2 / 3


def test_few_slots_are_told(tiny):
    few, enough = (
        str(moefold.plan(tiny(), UpcycleConfig(moe=moe("soft", slots=slots)))) for slots in (8, 32)
    )
    assert "slots                  fewer rows than tokens: 128 tokens share 32; more slots" in few
    assert "fewer rows" not in enough
    assert "fewer rows" not in str(
        moefold.plan(tiny(), UpcycleConfig(moe=moe("expert-choice", capacity_factor=0.5)))
    )
