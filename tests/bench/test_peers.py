"""Peers: each runs where it can and then computes what the reference computes, or says why not."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from moefold.bench.agreement import TOLERANCE, disagreement, draw_inputs, gradients_of, outcome
from moefold.bench.layers import After, reference
from moefold.bench.peers import PEERS, Given, peers_named, sparse
from moefold.bench.peers import from_transformers as transformers_peer
from moefold.bench.variants import Entrance
from tests.bench.common import EXPERTS, SOFT, TINY, TOKENS

HOME = {
    "transformers eager": TOKENS,
    "transformers grouped_mm": TOKENS,
    "transformers batched_mm": TOKENS,
    "st-moe-pytorch": TOKENS,
    "mixture-of-experts": TOKENS,
    "soft-moe-pytorch": SOFT,
    "soft-moe": SOFT,
}
"""Peers that compute a function of ours, and where."""

RATES = {"soft-mixture-of-experts": SOFT, "sinkhorn-router-pytorch": EXPERTS}
"""Peers that compute another one."""

NEVER = {
    "transformers sonicmoe": "it needs a GPU of compute capability 9.0 (Hopper) or newer",
    "ScatterMoE": "it needs a GPU, and this is cpu",
    "SonicMoE": "it needs a GPU, and this is cpu",
    "MegaBlocks": "asks for a GPU when it is built",
    "FastMoE": "has to be compiled",
    "Tutel": "has to be compiled",
    "V-MoE": "it is JAX",
    "CoLT5-attention": "no experts",
}
"""Peers that do not run on a CPU."""


def test_every_peer_has_a_case():
    assert {*HOME, *RATES, *NEVER} == set(PEERS)


def skip_unless_installed(name: str) -> None:
    reasons = PEERS[name].reasons_against({**HOME, **RATES}[name], torch.float32, "cpu")
    missing = [reason for reason in reasons if "installed" in reason]
    if missing:
        pytest.skip(missing[0])
    assert reasons == []


@pytest.mark.parametrize("name", HOME)
def test_it_computes_what_the_reference_computes(name):
    skip_unless_installed(name)
    shape, peer = HOME[name], PEERS[name]
    master = reference(shape, "cpu", torch.float32)
    inputs = draw_inputs(shape, master, 2, torch.float32, "cpu")
    back = torch.randn_like(inputs[0])
    given = Given(
        shape=shape,
        master=master,
        most_rows=Entrance(shape, "fp32", "cpu", master, inputs, back).most_rows,
        device="cpu",
        dtype=torch.float32,
    )
    built = peer.build(given)
    found = outcome(built.layer, inputs[0], back, built.gradients)
    layer = master if built.before is None else After(built.before, master)
    wanted = outcome(layer, inputs[0], back, lambda: gradients_of(master))
    assert disagreement(found, wanted).error <= TOLERANCE["fp32"]
    # Value, input, router and both products: nothing that matters is left out.
    up = "experts.gate_up_proj" if shape.gated else "experts.up_proj"
    assert {"y", "x", up, "experts.down_proj"} <= found.keys() <= wanted.keys()
    assert any(key.startswith("router.") for key in found)


@pytest.mark.parametrize("name", RATES)
def test_it_computes_something_else_and_says_so(name):
    skip_unless_installed(name)
    master = reference(RATES[name], "cpu", torch.float32)
    inputs = draw_inputs(RATES[name], master, 1, torch.float32, "cpu")
    entrance = Entrance(RATES[name], "fp32", "cpu", master, inputs, torch.randn_like(inputs[0]))
    timed, (_, record) = entrance.all((), [PEERS[name]])
    assert record["not_compared"]
    assert timed[name].flops > 0  # counted


@pytest.mark.parametrize("name", NEVER)
def test_it_does_not_run_here_and_says_why(name):
    for shape in TINY:
        assert PEERS[name].reasons_against(shape, torch.float32, "cpu")
    (reason, *_) = PEERS[name].reasons_against(TOKENS, torch.float32, "cpu")
    assert NEVER[name] in reason


@pytest.mark.parametrize("name", PEERS)
def test_other_routers_are_refused(name):
    home = {**HOME, **RATES}.get(name, TOKENS)
    for shape in TINY:
        if shape is not home:
            assert PEERS[name].reasons_against(shape, torch.float32, "cpu")


def test_experts_of_another_kind_are_refused():
    plain, gated = replace(TOKENS, gated=False), replace(SOFT, gated=True)
    assert PEERS["transformers eager"].reasons_against(plain, torch.float32, "cpu") == [
        "the experts of its block are gated; this shape's are plain"
    ]
    reasons = PEERS["soft-moe-pytorch"].reasons_against(gated, torch.float32, "cpu")
    assert "its gated experts are GEGLU, ours SwiGLU" in reasons


def test_the_number_of_experts_of_a_token():
    one, three = replace(TOKENS, k=1), replace(TOKENS, k=3)
    reasons = PEERS["st-moe-pytorch"].reasons_against(one, torch.float32, "cpu")
    assert "it needs k of 2 or more" in reasons
    reasons = PEERS["mixture-of-experts"].reasons_against(three, torch.float32, "cpu")
    assert "it has k of 2 only, not 3" in reasons


def test_what_does_not_fit_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(transformers_peer, "available_bytes", lambda device: 10**9)
    big = replace(TOKENS, tokens=2048, dim=512, width=1024)
    (reason,) = PEERS["transformers batched_mm"].reasons_against(big, torch.float32, "cpu")
    # 4096 rows, 3 matrices of 512 by 1024 each, 4 bytes, and a gradient: 2 * 25.8 GB.
    assert reason == (
        "it copies an expert's weights for each row: 52 GB with their gradients, and 1 GB are "
        "available"
    )
    monkeypatch.setattr(sparse, "available_bytes", lambda device: 10**5)
    monkeypatch.setattr(sparse, "not_installed", lambda *names: [])
    (reason,) = PEERS["st-moe-pytorch"].reasons_against(TOKENS, torch.float32, "cpu")
    assert "matrices of tokens, experts and capacity would take" in reason


@pytest.mark.skipif(
    importlib.util.find_spec("mixture_of_experts") is None, reason="it is not installed"
)
def test_with_less_capacity_it_would_compute_something_else():
    # So a capacity that does not drop has to be given to it, and the check sees it if not.
    master = reference(TOKENS, "cpu", torch.float32)
    (x,) = draw_inputs(TOKENS, master, 1, torch.float32, "cpu")
    most = int(master.router(x, None).rows_per_expert.max())
    for rows, same in ((most, True), (most - 1, False)):
        given = Given(
            shape=TOKENS, master=master, most_rows=rows, device="cpu", dtype=torch.float32
        )
        y = PEERS["mixture-of-experts"].build(given).layer(x)
        error = disagreement({"y": y}, {"y": master(x)}).error
        assert (error <= TOLERANCE["fp32"]) == same


def test_peers_by_name():
    assert peers_named(["all"]) == list(PEERS.values())
    assert peers_named(["none"]) == []
    assert [p.name for p in peers_named(["Tutel", "soft-moe"])] == ["Tutel", "soft-moe"]
    with pytest.raises(ValueError, match="unknown peer 'tutel'; did you mean 'Tutel'"):
        peers_named(["tutel"])
