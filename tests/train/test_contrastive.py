"""Fine-tuning on pairs: the order, the schedule, the budget, and that it learns."""

import collections

import pytest
import torch

import moefold
from moefold.train import FineTuning, contrastive, fine_tune, in_batches, training_flops
from tests.train.tiny import PAIRS, tiny_encoder


def settings(**changes: object) -> FineTuning:
    given = {"examples": 32, "batch_size": 8, "learning_rate": 1e-3, "warmup_examples": 16}
    return FineTuning(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def test_every_pass_has_every_pair_once():
    batches = in_batches(PAIRS, 6, 8, seed=0)  # 24 pairs: three batches a pass
    for start in (0, 3):
        seen = collections.Counter(pair for batch in batches[start : start + 3] for pair in batch)
        assert seen == collections.Counter(PAIRS)
    assert batches[:3] != batches[3:]


def test_an_incomplete_batch_is_left_out_and_no_batch_repeats_a_pair():
    for batch in in_batches(PAIRS[:19], 5, 8, seed=0):
        assert len(set(batch)) == 8


def test_a_shorter_run_is_the_beginning_of_a_longer_one():
    assert in_batches(PAIRS, 7, 4, seed=5) == in_batches(PAIRS, 20, 4, seed=5)[:7]
    assert in_batches(PAIRS, 7, 4, seed=5) != in_batches(PAIRS, 7, 4, seed=6)


def test_texts_of_a_batch_are_about_equally_long():
    # Eight batches are sorted together, so within them lengths do not overlap from batch to batch.
    pairs = [("q", "x" * n) for n in range(64)]
    for batch in in_batches(pairs, 8, 8, seed=0):
        lengths = [len(text) for _, text in batch]
        assert max(lengths) - min(lengths) == 7


def test_it_learns(tmp_path):
    encoder = tiny_encoder(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    before = encoder.encode(["k3"], convert_to_tensor=True)
    done: list[int] = []
    curve = fine_tune(encoder, PAIRS, settings(examples=192), advance=done.append)
    assert curve.examples == tuple(range(8, 200, 8))
    # 24 batches are 8 passes over 24 pairs that a table could hold; at first the loss is that of a
    # random encoder whose cosines are multiplied by 20.
    assert sum(curve.loss[-3:]) < 0.6 * sum(curve.loss[:3])
    assert sum(done) == 192
    assert curve.seconds > 0
    assert not encoder.training
    assert not torch.equal(encoder.encode(["k3"], convert_to_tensor=True), before)


def test_a_run_going_on_is_the_longer_run(tmp_path):
    # With dropout, warm-up past the first step, and a pause that evaluates and draws random
    # numbers: step by step the same losses, bit for bit. A schedule that decays would differ.
    losses = []
    short = None
    seen: list[tuple[bool, torch.Tensor]] = []
    for examples, paused in ((32, False), (64, True)):
        encoder = tiny_encoder(tmp_path / str(examples))

        def pause(encoder=encoder) -> None:
            torch.rand(7)
            seen.append((encoder.training, encoder.encode(["k1"], convert_to_tensor=True)))

        pauses = {32: pause} if paused else {}
        curve = fine_tune(encoder, PAIRS, settings(examples=examples), pauses=pauses)
        losses.append(curve.loss)
        if not paused:
            short = encoder.encode(["k1"], convert_to_tensor=True)
    assert losses[0] == losses[1][:4]
    ((training, at_pause),) = seen
    assert not training
    # The encoder at the pause is the encoder the short run ended with.
    assert short is not None
    assert torch.equal(at_pause, short)
    whole = fine_tune(tiny_encoder(tmp_path / "w"), PAIRS, settings(examples=64))
    assert whole.loss == losses[1]


def test_the_seed_decides(tmp_path):
    one, other = (
        fine_tune(tiny_encoder(tmp_path / str(seed)), PAIRS, settings(seed=seed)).loss
        for seed in (0, 1)
    )
    assert one != other


def test_a_budget_of_operations_is_turned_into_whole_batches(tmp_path):
    encoder = tiny_encoder(tmp_path)
    texts = [text for batch in in_batches(PAIRS, 3, 8, seed=0) for pair in batch for text in pair]
    per_pair = 2 * training_flops(encoder, texts)
    curve = fine_tune(encoder, PAIRS, settings(examples=None, flops=17.5 * per_pair))
    assert curve.examples[-1] == 24  # 17.5 pairs, rounded up to batches of 8


def test_what_a_router_adapts_without_a_gradient_is_adapted(tmp_path):
    encoder = tiny_encoder(tmp_path)
    router = moefold.routers.config("bias-balanced", k=1)
    config = moefold.MoEConfig(num_experts=4, router=router)
    moefold.upcycle(encoder, moefold.UpcycleConfig(moe=config, sites="last:1"))
    (moe,) = [m for m in encoder.modules() if isinstance(m, moefold.MoE)]
    before = {name: value.clone() for name, value in moe.router.named_buffers()}
    fine_tune(encoder, PAIRS, settings())
    changed = [n for n, v in moe.router.named_buffers() if not torch.equal(v, before[n])]
    assert changed
    assert moe.sinks == ()  # nobody listens any more


def test_bf16_is_used_where_asked(tmp_path):
    fp32, bf16 = (
        fine_tune(tiny_encoder(tmp_path / p), PAIRS, settings(precision=p)).loss
        for p in ("fp32", "bf16")
    )
    assert fp32 != bf16
    # Cosines to 2^-8, times a scale of 20: a few hundredths per logit; ten times that is a bug.
    assert bf16[0] == pytest.approx(fp32[0], abs=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": 1e9}, "examples=32, flops=1000000000.0; give exactly one"),
        ({"examples": None}, "examples=None, flops=None"),
        ({"examples": 0}, "examples is 0; it must be positive"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001"),
        ({"batch_size": 1}, "batch_size is 1; .* at least 2"),
        ({"warmup_examples": -1}, "warmup_examples is -1"),
        ({"precision": "fp16"}, "precision is 'fp16'; it must be 'fp32' or 'bf16'"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_bad_input(tmp_path, monkeypatch):
    encoder = tiny_encoder(tmp_path)
    with pytest.raises(ValueError, match="5 pairs do not fill a batch of 8"):
        fine_tune(encoder, PAIRS[:5], settings())
    with pytest.raises(ValueError, match=r"pause at 12 examples: .* multiple of .* 8"):
        fine_tune(encoder, PAIRS, settings(), pauses={12: lambda: None})
    with pytest.raises(ValueError, match=r"pause at 40 examples: .* at most 32"):
        fine_tune(encoder, PAIRS, settings(), pauses={40: lambda: None})
    monkeypatch.setattr(contrastive, "find_spec", lambda name: None if name == "accelerate" else 1)
    with pytest.raises(ValueError, match=r"needs accelerate, .* `pip install 'moefold\[demo\]'`"):
        fine_tune(encoder, PAIRS, settings())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    encoder = tiny_encoder(tmp_path)
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan after 1 steps; lower the learning rate"):
        fine_tune(encoder, PAIRS, settings())
