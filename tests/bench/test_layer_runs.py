"""What is let in, what is not, and what is said of it."""

import json
from dataclasses import replace

import pytest
import torch

from moefold.bench import layers, variants
from moefold.bench.agreement import (
    SAFE_GAP,
    TOLERANCE,
    disagreement,
    draw_inputs,
    gradients_of,
    outcome,
)
from moefold.bench.decode import run_decode
from moefold.bench.layer_runs import run_layer
from moefold.bench.layers import copy_weights, ours, reference, weights_of
from moefold.bench.peers import AbstractPeer, NeverRuns
from moefold.bench.shapes import Shape
from moefold.bench.variants import Entrance
from tests.bench.common import EXPERTS, QUICK, SOFT, TINY, TOKENS, Backwards, Fake


def let_in(shape: Shape, *peers: AbstractPeer, dtype: str = "fp32", backends=()):
    """Names that are let in, and every record by name."""
    master = reference(shape, "cpu", torch.bfloat16 if dtype == "bf16" else torch.float32)
    inputs = draw_inputs(shape, master, 2, master.experts.down_proj.dtype, "cpu")
    back = torch.randn_like(inputs[0])
    timed, records = Entrance(shape, dtype, "cpu", master, inputs, back).all(backends, peers)
    return set(timed), {record["variant"]: record for record in records}


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_what_computes_the_same_is_let_in(shape):
    names, records = let_in(shape, Fake("same"), backends=("auto", "grouped"))
    assert names == {"dense", "moefold", "moefold grouped", "same"}
    assert records["same"]["error"] == 0
    assert records["moefold grouped"]["error"] <= TOLERANCE["fp32"]


WRONG = {
    "value": (lambda y: y * 1.0001, ""),
    "one token": (lambda y: torch.cat([y[:, :1] * 1.1, y[:, 1:]], dim=1), "y"),
    "gradient": (Backwards.apply, "experts"),
    "nan": (lambda y: y * float("nan"), ""),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_computes_something_else_is_not(wrong):
    change, where = WRONG[wrong]
    names, records = let_in(TOKENS, Fake("wrong", change))
    assert names == {"dense"}
    record = records["wrong"]
    assert record["differs"]
    assert "it differs from the reference by" in record["refused"]
    if where == "y":
        assert record["error_in"] == "y"
    if wrong == "nan":
        assert record["error"] is None
    else:
        assert record["error"] > TOLERANCE["fp32"]
    json.dumps(record, allow_nan=False)


def test_a_gradient_that_is_wrong_alone_is_seen():
    def without_router(layer):
        return {**gradients_of(layer), "router.weight": torch.zeros_like(layer.router.weight)}

    names, records = let_in(TOKENS, Fake("wrong", gradients=without_router))
    assert names == {"dense"}
    assert records["wrong"]["error_in"] == "router.weight"
    assert records["wrong"]["error"] == pytest.approx(1.0)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_nan_is_the_largest_error(names):
    wanted = {name: torch.ones(3) for name in names}
    found = {"a": torch.full((3,), float("nan")), "b": torch.full((3,), 100.0)}
    worst = disagreement({name: found[name] for name in names}, wanted)
    assert worst.where == "a"
    assert worst.error != worst.error


def test_another_shape_is_no_agreement():
    assert disagreement({"a": torch.ones(2)}, {"a": torch.ones(3)}).error == float("inf")


def test_a_single_number_is_judged_with_its_module():
    wanted = {"y": torch.ones(1), "router.scale": torch.tensor(1e-3), "router.phi": torch.ones(100)}
    found = {**wanted, "router.scale": torch.tensor(2e-3)}
    assert disagreement(found, wanted).where == "router.scale"
    assert disagreement(found, wanted).error == pytest.approx(1e-4)  # of a norm of 10
    # Nothing else is let off: neither another module nor a vector.
    assert disagreement({**wanted, "y": torch.ones(1) * 1.5}, wanted).error == pytest.approx(0.5)
    assert disagreement({**wanted, "router.phi": torch.ones(100) * 2}, wanted).error == 1


def test_one_wrong_expert_in_200_tokens_is_seen_even_in_bf16():
    # What the tolerance of bf16 promises.
    shape = Shape(name="tokens", tokens=200, dim=16, width=24, experts=4, k=1)
    master = reference(shape, "cpu", torch.bfloat16)
    (x,) = draw_inputs(shape, master, 1, torch.bfloat16, "cpu")
    y = master(x).detach()
    wrong = y.clone()
    wrong[0, 7] = master.experts(x[0, 7:8], torch.tensor([0, 0, 0, 1])).detach() + y[0, 7]
    assert disagreement({"y": wrong}, {"y": y}).error > TOLERANCE["bf16"]


def test_what_raises_is_reported_with_its_words():
    def fails(y):
        raise RuntimeError("no kernel\nfor this")

    names, records = let_in(TOKENS, Fake("fails", fails))
    assert names == {"dense"}
    assert records["fails"]["refused"] == "it raised RuntimeError: no kernel"
    assert "differs" not in records["fails"]


def test_a_backend_that_cannot_run_is_reported():
    _, records = let_in(TOKENS, backends=("transformers-nothing",))
    assert "unknown backend" in records["moefold transformers-nothing"]["refused"]


def test_a_backend_says_why_it_cannot_run():
    from moefold.experts.backends.fused import FusedBackend

    names, records = let_in(TOKENS, backends=("fused",))
    assert "moefold fused" in names
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBackend, "reasons_against", lambda *given: ["it rains", "it is Monday"])
        names, records = let_in(TOKENS, backends=("fused",))
    assert names == {"dense"}
    assert records["moefold fused"]["refused"] == "it rains; it is Monday"


def test_who_cannot_run_says_why():
    names, records = let_in(TOKENS, NeverRuns("Other", "other", "it is JAX"))
    assert names == {"dense"}
    assert records["Other"] == {
        "variant": "Other",
        "kind": "peer",
        "version": None,
        "refused": "it is JAX",
    }


def test_another_function_is_timed_as_a_rate_only():
    other = Fake("other", lambda y: y * 2, another="it doubles")
    found = run_layer(TOKENS, "fp32", QUICK, [other])
    record = found["records"][-1]
    assert record["not_compared"] == "it doubles"
    assert record["both_gflops"][1] > 0
    assert "both_of_dense" not in record
    assert "both_ours_faster" not in record


def test_a_layer_is_measured_whole():
    # Of three rounds the median is a round, and a rate is of that round.
    found = run_layer(TOKENS, "fp32", replace(QUICK, rounds=3), [Fake("same")])
    json.dumps(found, allow_nan=False)
    assert found["shape"]["active_width"] == 48
    dense, mine, same = found["records"]
    assert dense["both_of_dense"] == [1.0, 1.0, 1.0]
    for record in (dense, mine, same):
        assert record["rounds"] == 3
        for part in ("forward", "backward", "both"):
            low, middle, high = record[f"{part}_ms"]
            assert 0 < low <= middle <= high
            # Operations that had to be done: 3 products of 96 rows, twice as many backward.
            work = {"forward": 1, "backward": 2, "both": 3}[part] * 2 * 3 * 96 * 16 * 24
            assert record[f"{part}_gflops"][1] == pytest.approx(work / middle / 1e6)
    assert dense["memory"]["of_dense"] == 1
    assert dense["memory"]["weights"] == 4 * 3 * 16 * 48
    more = 2 * (mine["memory"]["weights"] - dense["memory"]["weights"])
    assert mine["memory"]["of_dense"] == pytest.approx(
        (mine["memory"]["peak"] - more) / dense["memory"]["peak"]
    )
    assert mine["empty_us"].keys() == {"forward", "both", "inference"}
    assert found["product"]["gflops"][1] > 0


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_mixed_precision_is_float32_under_autocast(shape):
    seen = []

    def look(y):
        seen.append((torch.is_autocast_enabled("cpu"), y.dtype))
        return y

    found = run_layer(shape, "amp", QUICK, [Fake("same", look)])
    dense, mine, same = found["records"]
    assert set(seen) == {(True, torch.bfloat16)}
    assert found["dtype"] == "amp"
    assert found["tolerance"] == TOLERANCE["amp"]
    assert dense["memory"]["weights"] == 4 * sum(
        p.numel() for p in layers.dense(shape).parameters()
    )
    for record in (mine, same):
        assert record["error"] <= TOLERANCE["amp"]
        assert record["both_ms"][1] > 0
        assert "remark" not in record
    assert mine["empty_us"]["inference"][1] > 0
    decoded = run_decode(shape, "amp", QUICK, [])["points"]
    assert all(record["us"][1] > 0 for point in decoded for record in point["records"])


def test_who_is_asked_is_asked_under_autocast(monkeypatch):
    asked, peer = [], Fake("wide", lambda y: y.float())

    def reasons_against(shape, dtype, device):
        asked.append(torch.is_autocast_enabled(device))
        return []

    monkeypatch.setattr(peer, "reasons_against", reasons_against)
    for dtype in ("fp32", "amp"):
        found = run_layer(TOKENS, dtype, QUICK, [peer])
        remark = found["records"][-1].get("remark")
        assert remark == ("its result is float32" if dtype == "amp" else None)
    assert asked == [False, True]


@pytest.mark.parametrize("shape", [TOKENS], ids=str)
def test_no_choice_hangs_on_rounding_under_autocast(shape):
    entrance = Entrance.of_run(shape, "amp", QUICK)
    for x in entrance.inputs:
        logits = x.detach().flatten(0, 1) @ weights_of(entrance.master)["router.weight"].t()
        best = logits.topk(3).values
        assert (best[:, 1] - best[:, 2] > 2 * SAFE_GAP).all()


def test_a_pass_that_takes_too_long_is_not_repeated():
    found = run_layer(TOKENS, "fp32", replace(QUICK, most_seconds=0.0), [Fake("same")])
    dense, mine, same = found["records"]
    assert "both_ms" in dense  # the yardstick always runs
    assert "more than the 0 s that a pass may take" in mine["refused"]
    assert "both_ms" not in same


@pytest.mark.parametrize("shape", [TOKENS], ids=str)
def test_no_choice_hangs_on_rounding(shape):
    master = reference(shape, "cpu", torch.bfloat16)
    for x in draw_inputs(shape, master, 3, torch.bfloat16, "cpu"):
        logits = x.detach().float().flatten(0, 1) @ weights_of(master)["router.weight"].float().t()
        best = logits.topk(3).values
        assert (best[:, 1] - best[:, 2] > SAFE_GAP).all()


def test_hopeless_routers_are_refused():
    shape = Shape(name="own", tokens=16, dim=4, width=4, experts=4, k=2)
    master = reference(shape, "cpu", torch.float32)
    torch.nn.init.zeros_(weights_of(master)["router.weight"])
    with pytest.raises(ValueError, match="only 0 of 256 tokens choose clearly among 4 experts"):
        draw_inputs(shape, master, 1, torch.float32, "cpu")


def test_nothing_is_left_behind_by_a_check():
    layer = ours(SOFT, "auto")
    x = torch.randn(2, 24, 16, requires_grad=True)
    outcome(layer, x, torch.ones(2, 24, 16), lambda: gradients_of(layer))
    assert x.grad is None
    assert all(p.grad is None for p in layer.parameters())


def test_the_capacity_is_what_the_fullest_expert_needs():
    master = reference(TOKENS, "cpu", torch.float32)
    inputs = draw_inputs(TOKENS, master, 3, torch.float32, "cpu")
    want = max(int(master.router(x, None).rows_per_expert.max()) for x in inputs)
    assert variants._most_rows(master, inputs) == want
    soft = reference(SOFT, "cpu", torch.float32)
    assert variants._most_rows(soft, draw_inputs(SOFT, soft, 1, torch.float32, "cpu")) == 1


def test_copies_of_other_shapes_are_a_mistake_of_ours():
    with pytest.raises((AssertionError, ValueError)):
        copy_weights(ours(TOKENS, "auto"), ours(EXPERTS, "auto"))


def test_few_tokens():
    found = run_decode(TOKENS, "fp32", QUICK, [Fake("same")])
    json.dumps(found, allow_nan=False)
    assert [point["tokens"] for point in found["points"]] == [1, 3]
    for point in found["points"]:
        assert [record["variant"] for record in point["records"]] == ["dense", "moefold", "same"]
        for record in point["records"]:
            assert record["us"][1] > 0
        assert point["records"][0]["of_dense"] == [1.0, 1.0, 1.0]


def test_few_tokens_are_compared_by_their_results():
    peers = [Fake("value", lambda y: y * 1.0001), Fake("gradient", Backwards.apply)]
    for point in run_decode(TOKENS, "fp32", QUICK, peers)["points"]:
        records = {record["variant"]: record for record in point["records"]}
        assert records["value"]["differs"]
        assert records["value"]["error_in"] == "y"
        assert "us" not in records["value"]
        assert records["gradient"]["error"] == 0
        assert records["gradient"]["us"]
