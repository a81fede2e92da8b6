"""Drop-Upcycling: which neurons are redrawn, from what, and that the others are untouched."""

from typing import Any

import pytest
import torch

import moefold
from moefold import DropUpcycle, MoEConfig, UpcycleConfig
from tests.routers.common import untyped
from tests.surgery.births.test_groups import llama

MATRICES = ("gate", "up", "down")


def changed(model: Any, dense: Any, experts: int) -> list[dict[str, set[int]]]:
    """For each expert and matrix, the neurons that are no longer those of the dense MLP."""
    moe = model.model.layers[1].moe
    gate, up = moe.experts.gate_up_proj.chunk(2, 1)
    stacks = {"gate": gate, "up": up, "down": moe.experts.down_proj.transpose(1, 2)}
    old = {name: getattr(dense, f"{name}_proj").weight for name in MATRICES}
    old["down"] = old["down"].t()
    return [
        {
            name: set((stacks[name][one] != old[name]).any(1).nonzero().flatten().tolist())
            for name in MATRICES
        }
        for one in range(experts)
    ]


def upcycled(birth: DropUpcycle, experts: int = 4, **changes: int):
    model = llama(**changes)
    dense = model.model.layers[1].mlp
    moe = MoEConfig(num_experts=experts)
    made = moefold.upcycle(model, UpcycleConfig(moe=moe, birth=birth), inputs=False)
    return model, dense, made


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_shared_indices_drop_whole_neurons(fraction):
    model, dense, _ = upcycled(DropUpcycle(fraction=fraction))
    found = changed(model, dense, 4)
    for one in found:
        assert one["gate"] == one["up"] == one["down"]
        assert len(one["gate"]) == fraction * 48
    if fraction < 1:  # other neurons for every expert: one of 48 choose 12 or 24 alike
        assert len({frozenset(one["up"]) for one in found}) == 4


def test_indices_per_matrix_hit_more_neurons():
    # Three matrices that each lose one half lose a part of 1 - 1/8 of the neurons: of 4 * 480
    # that is 1680, give or take sqrt(1920 * 7 / 64) = 15 and less, as halves are exact.
    model, dense, _ = upcycled(DropUpcycle(indices="per-matrix"), intermediate_size=480)
    found = changed(model, dense, 4)
    assert all(len(one[name]) == 240 for one in found for name in MATRICES)
    hit = sum(len(one["gate"] | one["up"] | one["down"]) for one in found)
    assert abs(hit - 1680) < 5 * 15


def test_what_is_drawn_is_like_what_was_dropped():
    # One matrix is shifted, one is wide: what is drawn has the mean and deviation of its own.
    model = llama(hidden_size=32, intermediate_size=400)
    dense = model.model.layers[1].mlp
    with torch.no_grad():
        dense.up_proj.weight.normal_(mean=3.0, std=0.1)
        dense.down_proj.weight.normal_(mean=-1.0, std=2.0)
    moefold.upcycle(
        model, UpcycleConfig(moe=MoEConfig(num_experts=2), birth=DropUpcycle()), inputs=False
    )
    experts = model.model.layers[1].moe.experts.requires_grad_(False)
    for stack, old, mean, std in (
        (experts.gate_up_proj.chunk(2, 1)[1], dense.up_proj.weight, 3.0, 0.1),
        (experts.down_proj, dense.down_proj.weight, -1.0, 2.0),
    ):
        drawn = stack[stack != old.expand_as(stack)]
        assert drawn.numel() == 2 * 200 * 32
        # Means and deviations of 12800 numbers, drawn and dropped: each within 5 times
        # std / sqrt(6400), the number that one expert's come from.
        assert abs(float(drawn.mean()) - mean) < 5 * std / 80
        assert abs(float(drawn.std()) - std) < 5 * std / 80


def test_biases_go_with_their_neurons(tiny):
    model = tiny()
    mlp = model.encoder.layer[1]
    for linear in (mlp.intermediate.dense, mlp.output.dense):
        linear.bias.data.normal_()
    up, up_bias = mlp.intermediate.dense.weight, mlp.intermediate.dense.bias
    down_bias = mlp.output.dense.bias
    birth = DropUpcycle(fraction=0.25)
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=4), birth=birth), inputs=False)
    experts = model.encoder.layer[1].moe.experts
    rows = (experts.up_proj != up).any(2)
    assert torch.equal(rows, experts.up_proj_bias != up_bias)
    assert rows.sum(1).tolist() == [6] * 4
    assert torch.equal(experts.down_proj_bias, down_bias.expand(4, -1))


def test_one_neuron_can_be_dropped(tiny):
    # The deviation of a single bias is zero, not NaN.
    model = tiny()
    birth = DropUpcycle(fraction=1 / 24)
    moefold.upcycle(model, UpcycleConfig(moe=MoEConfig(num_experts=4), birth=birth))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_router_starts_uniform():
    model, _, _ = upcycled(DropUpcycle(), hidden_size=64, experts=16)
    weight = model.model.layers[1].moe.router.weight.detach()
    edge = 0.02 * 3**0.5
    assert float(weight.abs().max()) <= edge
    # The largest of 1024 uniform numbers is below 0.98 of the edge once in 1e9 draws; a normal
    # one of this deviation would go beyond the edge.
    assert float(weight.abs().max()) > 0.98 * edge


@pytest.mark.parametrize(("fraction", "kept"), [(0.0, True), (0.01, True), (0.03, False)])
def test_a_fraction_of_no_neuron_drops_none(tiny, fraction, kept):
    # 0.01 * 24 rounds to no neuron, 0.03 * 24 to one.
    made = moefold.plan(
        tiny(), UpcycleConfig(moe=MoEConfig(num_experts=4), birth=DropUpcycle(fraction=fraction))
    )
    assert made.kept_at_birth == kept
    assert ("nothing is dropped" if kept else "1 of 24 neurons of every expert") in made.why


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.5}, "fraction is 1.5; it must be a share of the neurons, from 0 to 1"),
        ({"fraction": float("nan")}, "fraction is nan; it must be a share"),
        ({"indices": "same"}, "indices is 'same'; allowed: 'shared', 'per-matrix'"),
    ],
    ids=str,
)
def test_settings_that_are_refused(settings, message):
    with untyped(), pytest.raises(ValueError, match=message):
        DropUpcycle(**settings)
