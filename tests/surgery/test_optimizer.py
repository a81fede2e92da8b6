"""The optimiser's state after surgery, against an optimiser that had the experts all along."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import Adafactor as TorchAdafactor
from transformers import (
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
    Trainer,
    TrainingArguments,
)
from transformers.optimization import Adafactor as TheirAdafactor

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery.births import BIRTHS
from tests.surgery.conftest import tiny_config

CONFIG = UpcycleConfig(
    moe=MoEConfig(
        num_experts=4, router=routers.config("token-choice", k=2, renormalize=True), losses={}
    ),
    sites="last:1",
)


def bert() -> Any:
    """Plain MLPs with biases, in two modules."""
    return BertModel(tiny_config(num_hidden_layers=2))


def llama() -> Any:
    """Gated MLPs in three matrices."""
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24}
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaModel(LlamaConfig(**sizes, **heads, mlp_bias=True))


def phi3() -> Any:
    """Gated MLPs with both halves in one matrix."""
    sizes: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "pad_token_id": 0,
    }
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return Phi3Model(Phi3Config(**sizes, **heads))


def gpt2() -> Any:
    """Plain MLPs of Conv1D, whose weights are [in, out]."""
    return GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_inner=24, n_layer=2, n_head=2))


MODELS = [bert, llama, phi3, gpt2]


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


def adam_amsgrad(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=1e-3, amsgrad=True)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=1e-3, momentum=0.9)


def adafactor(parameters: Any) -> Optimizer:
    return TorchAdafactor(parameters, lr=1e-3)


def their_adafactor(parameters: Any) -> Optimizer:
    return TheirAdafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


OPTIMISERS = [adamw, adam_amsgrad, sgd, adafactor, their_adafactor]
Make = Callable[[Any], Optimizer]


def as_of_experts(model: Any, name: str, of: dict[str, Tensor]) -> Tensor | None:
    """By the definition of an expert: what holds of each of its maps, in its place."""
    layer, _, place = name.rpartition(".moe.experts.")
    form = model.get_submodule(layer)._moefold_form
    kind = "bias" if place.endswith("_bias") else "weight"
    paths = [form.down] if place.startswith("down") else [form.gate, form.up]
    parts = [of[f"{layer}.{path}.{kind}"] for path in paths if path is not None]
    if isinstance(model, GPT2Model):
        parts = [part.t() if part.dim() == 2 else part for part in parts]
    return torch.stack([torch.cat(parts)] * CONFIG.moe.num_experts)


def step_both(dense: Any, upcycled: Any, make: Make, steps: int) -> list[Optimizer]:
    """Optimisers that made the same steps: every expert got the gradient of the MLP."""
    optimisers = [make(model.parameters()) for model in (dense, upcycled)]
    for _ in range(steps):
        drawn = {name: torch.randn_like(p) for name, p in dense.named_parameters()}
        for name, parameter in dense.named_parameters():
            parameter.grad = drawn[name].clone()
        for name, parameter in upcycled.named_parameters():
            if ".experts." in name:
                parameter.grad = as_of_experts(upcycled, name, drawn)
            elif ".router." not in name:
                parameter.grad = drawn[name].clone()
        for optimiser in optimisers:
            optimiser.step()
    return optimisers


def states(model: Any, optimiser: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in model.named_parameters():
        yield name, dict(optimiser.state.get(parameter, {}))


@pytest.mark.parametrize("make", OPTIMISERS)
@pytest.mark.parametrize("build", MODELS)
def test_the_tiled_state_is_that_of_an_optimiser_that_had_the_experts_all_along(build, make):
    dense = build().double()
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG, inputs=False)
    ran, wanted = step_both(dense, upcycled, make, steps=3)
    fresh = make(upcycled.parameters())
    carried = moefold.carry_optimizer(ran.state_dict(), upcycled, fresh)
    assert carried.fresh == (next(n for n, _ in upcycled.named_parameters() if "router" in n),)
    assert set(carried.tiled) == {n for n, _ in upcycled.named_parameters() if ".experts." in n}
    expected = dict(states(upcycled, wanted))
    for name, found in states(upcycled, fresh):
        assert set(found) == set(expected[name]), name
        for key, value in found.items():
            if key == "RMS":
                continue  # of the weights, computed anew in every step
            # float64 means of up to 48 squares about 1, summed in another order.
            torch.testing.assert_close(
                torch.as_tensor(value), torch.as_tensor(expected[name][key]), rtol=1e-12, atol=0.0
            )


def test_adafactor_with_a_first_moment_tiles_it_too(tiny):
    def make(parameters):
        settings: dict[str, Any] = {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
        return TheirAdafactor(parameters, beta1=0.9, clip_threshold=1e9, **settings)

    dense = tiny(num_hidden_layers=2).double()
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG, inputs=False)
    ran, wanted = step_both(dense, upcycled, make, steps=3)
    fresh = make(upcycled.parameters())
    moefold.carry_optimizer(ran.state_dict(), upcycled, fresh)
    for name, parameter in upcycled.named_parameters():
        if name.endswith("experts.up_proj"):
            # float64; updates of up to 1e-3, summed in another order.
            found, expected = fresh.state[parameter], wanted.state[parameter]
            torch.testing.assert_close(
                found["exp_avg"], expected["exp_avg"], rtol=1e-12, atol=1e-16
            )


def trained(model: Any, batches: list[dict], make: Make = adamw) -> Optimizer:
    """A bare loop."""
    optimiser = make(model.parameters())
    for batch in batches:
        backward(model, batch)
        optimiser.step()
    return optimiser


def backward(model: Any, batch: dict) -> None:
    model.zero_grad()
    real = batch["attention_mask"].bool()
    model(**batch)[0][real].pow(3).mean().backward()


def without_pooler(model: Any) -> Any:
    model.pooler = None
    return model


def test_the_run_goes_on_as_the_dense_one_would_have(tiny, batch):
    dense = without_pooler(tiny(num_hidden_layers=2)).double().train()
    ran = trained(dense, [batch] * 3)
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG)
    optimiser = adamw(upcycled.parameters())
    moefold.carry_optimizer(ran.state_dict(), upcycled, optimiser)
    backward(dense, batch)
    backward(upcycled, batch)
    before = dict(dense.named_parameters())
    shared = {n: p for n, p in upcycled.named_parameters() if n in before}
    assert len(shared) == len(before) - 4  # one MLP became experts
    for name, parameter in shared.items():
        assert parameter.grad is not None
        # The same function at birth, so the same gradients: float64, of up to about 1.
        assert (parameter.grad - before[name].grad).abs().max() < 1e-12
        parameter.grad = before[name].grad.clone()
    ran.step()
    optimiser.step()
    # With equal gradients nothing is left that could differ.
    assert all(torch.equal(parameter, before[name]) for name, parameter in shared.items())
    steps = {n: float(optimiser.state[p]["step"]) for n, p in upcycled.named_parameters()}
    assert {steps.pop("encoder.layer.1.moe.router.weight")} == {1.0}
    assert set(steps.values()) == {4.0}


def test_gradients_of_experts_add_up_to_that_of_the_mlp(tiny, batch):
    # What `gradient_share` is about: with weights that sum to one the mean share is 1 / experts.
    dense = without_pooler(tiny(num_hidden_layers=2)).double().train()
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG)
    backward(dense, batch)
    backward(upcycled, batch)
    experts = upcycled.encoder.layer[1].moe.experts
    whole = dense.encoder.layer[1].intermediate.dense.weight.grad
    # float64, gradients of up to about 1.
    assert (experts.up_proj.grad.sum(0) - whole).abs().max() < 1e-12


def test_an_optimiser_without_the_state_takes_another_step(tiny, batch):
    # The sibling of the test above: it could fail.
    dense = without_pooler(tiny(num_hidden_layers=2)).double().train()
    trained(dense, [batch] * 3)
    twin = copy.deepcopy(dense)
    backward(twin, batch)
    before = {name: p.clone() for name, p in twin.named_parameters()}
    adamw(twin.parameters()).step()
    moefold.upcycle(dense, CONFIG)
    optimiser = adamw(dense.parameters())
    carried = moefold.carry_optimizer({}, dense, optimiser, policy="reset-all")
    assert carried.kept == carried.tiled == ()
    backward(dense, batch)
    optimiser.step()
    name = "encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(dense.get_parameter(name), before[name])
    # A first step of AdamW is the sign of the gradient times the rate, but for weight decay.
    change = (dense.get_parameter(name) - before[name]).abs().median()
    assert 0.9e-3 < change < 1.1e-3


def test_reset_experts_keeps_the_others_and_starts_experts_at_step_zero(tiny, batch):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch] * 2)
    kept = copy.deepcopy(ran.state[model.get_parameter("encoder.layer.0.output.dense.weight")])
    moefold.upcycle(model, CONFIG)
    optimiser = adamw(model.parameters())
    carried = moefold.carry_optimizer(ran.state_dict(), model, optimiser, policy="reset-experts")
    assert carried.tiled == ()
    assert len(carried.fresh) == 5  # four of experts, one of the router
    assert str(carried) == (
        f"optimiser state, reset-experts: {len(carried.kept)} parameters keep theirs, "
        f"0 of experts are tiled, 5 start at step 0"
    )
    for name, state in states(model, optimiser):
        assert (len(state) == 0) == (".moe." in name)
    found = optimiser.state[model.get_parameter("encoder.layer.0.output.dense.weight")]
    assert all(torch.equal(found[key], kept[key]) for key in kept)


@pytest.mark.parametrize("policy", ["reset-experts", "reset-all"])
def test_what_the_optimiser_knew_before_is_gone(tiny, batch, policy):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch])
    moefold.upcycle(model, CONFIG)
    optimiser = trained(model, [batch])
    carried = moefold.carry_optimizer(ran.state_dict(), model, optimiser, policy=policy)
    assert {name for name, state in states(model, optimiser) if not state} == set(carried.fresh)


def test_nothing_is_shared_with_the_dense_runs_optimiser(tiny, batch):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch])
    before = copy.deepcopy(ran.state_dict()["state"])
    moefold.upcycle(model, CONFIG)
    optimiser = adamw(model.parameters())
    moefold.carry_optimizer(ran.state_dict(), model, optimiser)
    for state in optimiser.state.values():
        for value in state.values():
            value.fill_(7.0)
    experts = optimiser.state[model.encoder.layer[1].moe.experts.up_proj]["exp_avg"]
    experts[0] = 8.0
    assert bool((experts[1] == 7.0).all())  # nor between experts
    for number, state in ran.state_dict()["state"].items():
        assert all(torch.equal(value, before[number][key]) for key, value in state.items())


def test_settings_are_those_of_the_new_optimiser(tiny, batch):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch])
    moefold.upcycle(model, CONFIG)
    optimiser = AdamW(model.parameters(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3)
    moefold.carry_optimizer(ran.state_dict(), model, optimiser)
    (group,) = optimiser.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3)


@pytest.mark.parametrize("make", [adamw, sgd, adafactor, their_adafactor])
def test_a_gradient_share_is_as_if_the_experts_had_always_had_it(make):
    dense = bert().double()
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG, inputs=False)
    ran, _ = step_both(dense, upcycled, make, steps=2)
    whole, part = make(upcycled.parameters()), make(upcycled.parameters())
    moefold.carry_optimizer(ran.state_dict(), upcycled, whole)
    moefold.carry_optimizer(ran.state_dict(), upcycled, part, gradient_share=0.25)
    seen = set()
    for name, parameter in upcycled.named_parameters():
        for key, value in whole.state.get(parameter, {}).items():
            first = key in ("exp_avg", "momentum_buffer")
            same = ".experts." not in name or key in ("step", "RMS")
            scale = 1.0 if same else 0.25 if first else 0.0625
            # Powers of two are exact.
            assert torch.equal(
                torch.as_tensor(part.state[parameter][key]), torch.as_tensor(value * scale)
            )
            seen.add(scale)
    assert seen >= ({1.0, 0.25} if make is sgd else {1.0, 0.0625})


def test_what_the_dense_run_did_not_train_starts_anew(tiny, batch):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    model.embeddings.requires_grad_(False)
    model.encoder.layer[1].output.dense.requires_grad_(False)
    ran = adamw([p for p in model.parameters() if p.requires_grad])
    backward(model, batch)
    ran.step()
    moefold.upcycle(model, CONFIG)
    carried = moefold.carry_optimizer(
        ran.state_dict(), model, adamw(p for p in model.parameters() if p.requires_grad)
    )
    assert carried.fresh == ("encoder.layer.1.moe.router.weight",)
    prefix = "encoder.layer.1.moe.experts."
    assert carried.tiled == (f"{prefix}up_proj", f"{prefix}up_proj_bias")
    optimiser = adamw(model.parameters())
    carried = moefold.carry_optimizer(ran.state_dict(), model, optimiser)
    assert f"{prefix}down_proj" in carried.fresh
    assert "embeddings.word_embeddings.weight" in carried.fresh


def test_halves_of_a_gated_map_that_were_not_stepped_alike():
    dense = llama()
    upcycled = copy.deepcopy(dense)
    moefold.upcycle(upcycled, CONFIG, inputs=False)
    ran, _ = step_both(dense, upcycled, adamw, steps=3)
    gate = dense.layers[1].mlp.gate_proj.weight
    experts = upcycled.layers[1].moe.experts.gate_up_proj
    # The younger half decides how much bias of young moments Adam corrects.
    ran.state[gate]["step"].fill_(2.0)
    optimiser = adamw(upcycled.parameters())
    moefold.carry_optimizer(ran.state_dict(), upcycled, optimiser)
    assert float(optimiser.state[experts]["step"]) == 2.0
    ran.state[gate]["step"].fill_(4.0)
    moefold.carry_optimizer(ran.state_dict(), upcycled, optimiser)
    assert float(optimiser.state[experts]["step"]) == 3.0
    # A half that was never stepped: there is no state for the whole.
    del ran.state[gate]
    carried = moefold.carry_optimizer(ran.state_dict(), upcycled, optimiser)
    assert "layers.1.moe.experts.gate_up_proj" in carried.fresh
    assert "layers.1.moe.experts.down_proj" in carried.tiled


@pytest.mark.parametrize("shown", ["file", "names in the groups", "names as keys"])
def test_a_state_dict_in_other_forms(tiny, batch, tmp_path, shown):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    backwards = list(model.named_parameters())[::-1]
    ran = AdamW(backwards if shown == "names in the groups" else model.parameters(), lr=1e-3)
    backward(model, batch)
    ran.step()
    wanted = {name: ran.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    state: Any = ran.state_dict()
    if shown == "file":
        state = tmp_path / "adamw.pt"
        torch.save(ran.state_dict(), state)
    elif shown == "names as keys":
        names = [name for name, _ in model.named_parameters()]
        (group,) = state["param_groups"]
        state = {
            "state": {names[number]: entry for number, entry in state["state"].items()},
            "param_groups": [{**group, "params": names}],
        }
    moefold.upcycle(model, CONFIG)
    optimiser = adamw(model.parameters())
    carried = moefold.carry_optimizer(state, model, optimiser)
    for name in carried.kept:
        moment = optimiser.state[model.get_parameter(name)]["exp_avg"]
        assert torch.equal(moment, wanted[name])
    tiled = optimiser.state[model.encoder.layer[1].moe.experts.down_proj]["exp_avg"]
    for expert in range(4):
        assert torch.equal(tiled[expert], wanted["encoder.layer.1.output.dense.weight"])


def test_a_loaded_model_takes_the_names_of_a_dense_one(tiny, batch, tmp_path):
    model = tiny(num_hidden_layers=2).train()
    ran = trained(model, [batch])
    moefold.upcycle(model, CONFIG)
    first = adamw(model.parameters())
    moefold.carry_optimizer(ran.state_dict(), model, first)
    moefold.save(model, tmp_path / "moe")
    loaded: Any = moefold.load(tmp_path / "moe")
    second = adamw(loaded.parameters())
    with pytest.raises(ValueError, match=r"does not hold the dense modules .* as `dense`"):
        moefold.carry_optimizer(ran.state_dict(), loaded, second)
    with torch.device("meta"):
        dense = tiny(num_hidden_layers=2)
    moefold.carry_optimizer(ran.state_dict(), loaded, second, dense=dense)
    wanted = dict(states(model, first))
    for name, found in states(loaded, second):
        assert set(found) == set(wanted[name])
        assert all(torch.equal(value, wanted[name][key]) for key, value in found.items())


def training(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
    }
    quiet: dict[str, Any] = {
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "per_device_train_batch_size": 2,
    }
    return TrainingArguments(
        output_dir=str(folder), **{**settings, **quiet, "learning_rate": 1e-3, **changes}
    )


def examples() -> Any:
    rows = torch.randint(60, (8, 6))
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize(
    ("optim", "momentum"), [("adamw_torch", "exp_avg"), ("adafactor", "exp_avg_sq_row")]
)
def test_a_checkpoint_of_trainer_goes_on_in_a_trainer(tmp_path, optim, momentum):
    dense = BertForMaskedLM(tiny_config(num_hidden_layers=2))
    arguments = training(tmp_path / "dense", optim=optim, weight_decay=0.1)
    run = Trainer(model=dense, args=arguments, train_dataset=examples())
    run.train()
    inner: Any = run.optimizer
    wanted = {n: dict(inner.state[p]) for n, p in dense.named_parameters()}
    checkpoint = tmp_path / "dense" / "checkpoint-2"

    model: Any = BertForMaskedLM.from_pretrained(checkpoint)
    moefold.upcycle(model, CONFIG)
    again = Trainer(
        model=model,
        args=training(tmp_path / "moe", optim=optim, max_steps=1, save_strategy="no"),
        train_dataset=examples(),
    )
    optimiser = again.create_optimizer()
    carried = moefold.carry_optimizer(checkpoint, model, optimiser)
    assert carried.fresh == ("bert.encoder.layer.1.moe.router.weight",)
    for name in carried.kept:
        found = optimiser.state[model.get_parameter(name)]
        assert set(found) == set(wanted[name])
        for key, value in found.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(wanted[name][key])), name
    up = "bert.encoder.layer.1.intermediate.dense.weight"
    tiled = optimiser.state[model.get_parameter("bert.encoder.layer.1.moe.experts.up_proj")]
    for expert in range(4):
        assert torch.equal(tiled[momentum][expert], wanted[up][momentum])

    again.train()
    inner = again.optimizer
    steps = {n: float(inner.state[p]["step"]) for n, p in model.named_parameters()}
    assert {steps.pop("bert.encoder.layer.1.moe.router.weight")} == {1.0}
    assert set(steps.values()) == {3.0}


# What is refused, and what it says.


@pytest.fixture
def ready(tiny, batch):
    """An upcycled model, the dense run's optimiser, and a new one."""
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch])
    moefold.upcycle(model, CONFIG)
    return model, ran, adamw(model.parameters())


def refused(ready: tuple, match: str, **arguments: Any) -> None:
    """Checks the message, and that the optimiser is as it was."""
    model, ran, optimiser = ready
    state = arguments.pop("state", ran.state_dict())
    optimiser = arguments.pop("optimizer", optimiser)
    with pytest.raises(ValueError, match=match):
        moefold.carry_optimizer(state, model, optimiser, **arguments)
    assert not optimiser.state


def test_an_unknown_policy(ready):
    match = r"policy is 'tiles'; allowed: 'tile', 'reset-experts', 'reset-all'. Did you mean 'tile'"
    refused(ready, match, policy="tiles")


@pytest.mark.parametrize("share", [0.0, -1.0, float("inf"), float("nan")])
def test_a_gradient_share_that_is_none(ready, share):
    refused(ready, r"gradient_share is .*; it must be a number above zero", gradient_share=share)


def test_a_model_that_is_dense(tiny, ready):
    dense = tiny(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"BertModel is not upcycled: no layer of it is a mixture"):
        moefold.carry_optimizer(ready[1].state_dict(), dense, adamw(dense.parameters()))


def test_an_optimiser_made_before_surgery(ready):
    model, ran, _ = ready
    match = (
        r"the optimiser holds 4 parameters that are not in the upcycled BertModel \(the first is "
        r"\[24, 16\]\); make it after surgery"
    )
    with pytest.raises(ValueError, match=match):
        moefold.carry_optimizer(ran.state_dict(), model, ran)


def test_an_optimiser_without_the_experts(ready):
    model = ready[0]
    some = adamw(p for n, p in model.named_parameters() if ".moe." not in n)
    match = (
        r"the optimiser lacks 5 parameters of mixtures \(encoder.layer.1.moe.router.weight, ...\), "
        r"which would never learn"
    )
    refused(ready, match, optimizer=some)
    model.encoder.layer[1].moe.requires_grad_(False)
    assert moefold.carry_optimizer(ready[1].state_dict(), model, some).tiled == ()


def test_an_optimiser_of_a_kind_that_is_not_known(ready):
    other = torch.optim.Adagrad(ready[0].parameters())
    match = r"torch.optim.adagrad.Adagrad, whose state is not known here; states of Adam or AdamW, "
    with pytest.raises(ValueError, match=match):
        moefold.carry_optimizer(ready[1].state_dict(), ready[0], other)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (sgd, r"not one of SGD: parameter 0 has exp_avg, exp_avg_sq, step; make an optimiser of"),
        (adafactor, r"not one of torch's Adafactor: parameter 0 has exp_avg, exp_avg_sq;"),
        (their_adafactor, r"not one of transformers' Adafactor: parameter 0 lacks RMS;"),
    ],
)
def test_the_state_of_another_optimiser(ready, make, match):
    refused(ready, match, optimizer=make(ready[0].parameters()))


def test_settings_that_need_more_than_was_kept(ready):
    model, ran, _ = ready
    match = (
        r"has amsgrad=True, for which the state needs max_exp_avg_sq, and the dense run did not "
        r"keep it \(embeddings.word_embeddings.weight, ...\); make the optimiser with the amsgrad"
    )
    refused(ready, match, optimizer=AdamW(model.parameters(), amsgrad=True))
    # The other way there is one entry more than is looked for, which does no harm.
    more = {
        n: {**e, "max_exp_avg_sq": e["exp_avg_sq"]} for n, e in ran.state_dict()["state"].items()
    }
    moefold.carry_optimizer({**ran.state_dict(), "state": more}, model, adamw(model.parameters()))


def test_a_first_moment_that_adafactor_did_not_keep(tiny, batch):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch], their_adafactor)
    moefold.upcycle(model, CONFIG)
    new = TheirAdafactor(model.parameters(), beta1=0.9)
    with pytest.raises(ValueError, match=r"has beta1=0.9, for which the state needs exp_avg, and"):
        moefold.carry_optimizer(ran.state_dict(), model, new)


@pytest.mark.parametrize("birth", ["split", "drop-upcycle", "random"])
def test_experts_that_are_no_copies_are_not_tiled(tiny, batch, birth):
    model = without_pooler(tiny(num_hidden_layers=2)).train()
    ran = trained(model, [batch])
    config = UpcycleConfig(moe=CONFIG.moe, sites="last:1", birth=BIRTHS.get(birth)())
    moefold.upcycle(model, config, inputs=False)
    optimiser = adamw(model.parameters())
    match = rf"born by '{birth}' and are no copies of the MLP.* use policy='reset-experts'"
    refused((model, ran, optimiser), match)
    carried = moefold.carry_optimizer(ran.state_dict(), model, optimiser, policy="reset-experts")
    assert len(carried.fresh) == 5  # four of experts, one of the router


def test_a_dense_model_of_another_width(ready, tiny):
    match = (
        r"encoder.layer.1.moe.experts.up_proj is \[4, 24, 16\], and copies of "
        r"encoder.layer.1.intermediate.dense.weight would be \[4, 32, 16\]; pass as `dense`"
    )
    wide = without_pooler(tiny(num_hidden_layers=2))
    wide.encoder.layer[1] = tiny(num_hidden_layers=2, intermediate_size=32).encoder.layer[1]
    refused(ready, match, dense=wide, state=adamw(wide.parameters()).state_dict())
