"""A schedule that goes on where it was, and a warning where none can."""

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    BertForMaskedLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
)

from moefold.surgery import inverse_square_root, warn_if_cooled_down
from tests.surgery.conftest import tiny_config


def optimizer(rate: float = 1.0) -> SGD:
    return SGD([torch.zeros(1, requires_grad=True)], lr=rate)


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    """The learning rates of the next steps."""
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_a_schedule_written_out():
    # Warm-up over 2 steps to 8, timescale 1, cooldown over the last 2 of 8.
    #       0  1  2  3            4            5            6             7      8
    #       0  4  8  8 / sqrt(2)  8 / sqrt(3)  8 / sqrt(4)  8 / sqrt(5)   half   0
    wanted = [0.0, 4.0, 8.0, 8 / 2**0.5, 8 / 3**0.5, 4.0, 8 / 5**0.5, 4 / 5**0.5, 0.0]
    scheduler = inverse_square_root(optimizer(8.0), warmup=2, timescale=1, steps=8, cooldown=2)
    assert rates(scheduler, 10) == pytest.approx([*wanted, 0.0], rel=1e-15)


@pytest.mark.parametrize(("warmup", "timescale"), [(0, 10), (7, 10), (7, 7), (7, 3)])
@pytest.mark.parametrize("start", [0, 3, 7, 20])
def test_the_dense_schedule_goes_on_without_a_jump(warmup, timescale, start):
    settings: dict[str, Any] = {"warmup": warmup, "timescale": timescale}
    settings.update(steps=50, cooldown=10)
    whole = rates(inverse_square_root(optimizer(0.3), **settings), 52)
    rest = rates(inverse_square_root(optimizer(0.3), **settings, start_step=start), 52 - start)
    assert rest == whole[start:]  # the same numbers from the same formula


def test_it_is_that_of_transformers_and_with_timescale_equal_to_warmup_that_of_t5():
    theirs = get_inverse_sqrt_schedule(optimizer(), num_warmup_steps=4, timescale=9)
    ours = inverse_square_root(optimizer(), warmup=4, timescale=9)
    # The same formula, put differently: a few roundings of float64.
    assert rates(ours, 30) == pytest.approx(rates(theirs, 30), rel=1e-15)
    t5 = [min(step / 4, math.sqrt(4 / max(step, 4))) for step in range(30)]
    assert rates(inverse_square_root(optimizer(), warmup=4, timescale=4), 30) == pytest.approx(
        t5, rel=1e-15
    )


def test_every_group_keeps_its_own_peak():
    two = SGD([{"params": [torch.zeros(1)], "lr": 4.0}, {"params": [torch.zeros(1)], "lr": 6.0}])
    scheduler = inverse_square_root(two, timescale=5, start_step=15)
    assert scheduler.get_last_lr() == [2.0, 3.0]  # 1 / sqrt(1 + 15 / 5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"timescale": 0}, r"timescale is 0; it must be at least 1"),
        ({"warmup": -1}, r"warmup is -1; it must be zero or more"),
        ({"start_step": -5}, r"start_step is -5; it must be zero or more"),
        ({"cooldown": 5}, r"cooldown is 5, but the last step is not known; pass `steps`"),
        (
            {"warmup": 6, "cooldown": 5, "steps": 10},
            r"steps is 10, which is less than warmup \+ cooldown = 11",
        ),
        (
            {"cooldown": 5, "steps": 10, "start_step": 6},
            r"start_step is 6, after the cooldown begins at 5; give more steps, counted from",
        ),
    ],
)
def test_what_no_schedule_can_be(changes, match):
    with pytest.raises(ValueError, match=match):
        inverse_square_root(optimizer(), **{"timescale": 10, **changes})


def test_a_run_that_was_cooled_down():
    match = (
        r"the dense run was cooled down: its last learning rate is 1e-05 \(number 3\), 0.5% of the "
        r"peak of 0.002 \(number 1\)\. .* Upcycle a checkpoint from before the cooldown, or warm"
    )
    with pytest.warns(UserWarning, match=match):
        assert warn_if_cooled_down([0.001, 0.002, 0.001, 1e-5])


def through(make: Any, steps: int) -> Sequence[float]:
    return rates(make(optimizer(1e-3)), steps)


@pytest.mark.parametrize(
    ("made", "cold"),
    [
        pytest.param([1e-3] * 9, False, id="constant"),
        pytest.param([1e-4, 5e-4, 1e-3], False, id="still warming up"),
        pytest.param([0.0, 0.0], False, id="never trained"),
        pytest.param(
            through(lambda o: inverse_square_root(o, warmup=5, timescale=5), 200),
            False,
            id="inverse square root after 40 timescales",
        ),
        pytest.param(
            through(
                lambda o: inverse_square_root(o, warmup=5, timescale=5, steps=100, cooldown=20), 100
            ),
            True,
            id="inverse square root, cooled down",
        ),
        pytest.param(
            through(lambda o: get_cosine_schedule_with_warmup(o, 5, 100), 60),
            False,
            id="mid-cosine",
        ),
        pytest.param(
            through(lambda o: get_cosine_schedule_with_warmup(o, 5, 100), 100), True, id="cosine"
        ),
        pytest.param([1e-3, 5.5e-4, 1e-4], True, id="to a tenth, the floor of many cosines"),
    ],
)
def test_who_is_warned(made, cold):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert warn_if_cooled_down(made) is cold
    assert len(caught) == cold


def test_the_threshold_can_be_moved():
    assert not warn_if_cooled_down([1.0, 0.1], below=0.05)
    with pytest.warns(UserWarning, match=r"10\.0% of the peak"):
        warn_if_cooled_down([1.0, 0.1], below=0.5)


def test_the_log_of_a_trainer(tmp_path):
    rows = torch.randint(60, (8, 6))
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=1,
    )
    model = BertForMaskedLM(tiny_config(num_hidden_layers=1))
    Trainer(model=model, args=arguments, train_dataset=data).train()
    assert not warn_if_cooled_down(tmp_path / "checkpoint-6")
    # The twelfth step of twelve is made with a twelfth of the peak.
    match = r"last learning rate is 8.33e-05 \(step 12\), 8.3% of the peak of 0.001 \(step 1\)"
    with pytest.warns(UserWarning, match=match):
        assert warn_if_cooled_down(tmp_path / "checkpoint-12")
    with pytest.warns(UserWarning, match=match):
        assert warn_if_cooled_down(str(tmp_path / "checkpoint-12" / "trainer_state.json"))


@pytest.mark.parametrize(
    ("given", "settings", "match"),
    [
        ([], {}, r"there are no learning rates; pass those of the dense run, in order"),
        ([1.0, -1.0], {}, r"a learning rate is -1.0; all must be finite, zero or more"),
        ([1.0, math.nan], {}, r"a learning rate is nan; all must be finite"),
        ([1.0], {"below": 0.0}, r"below is 0.0; it must be between 0 and 1"),
        ([1.0], {"below": 1.0}, r"below is 1.0; it must be between 0 and 1"),
    ],
)
def test_rates_that_say_nothing(given, settings, match):
    with pytest.raises(ValueError, match=match):
        warn_if_cooled_down(given, **settings)


def test_logs_that_say_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*trainer_state.json; pass a checkpoint"):
        warn_if_cooled_down(tmp_path)
    state = {"global_step": 2, "log_history": [{"step": 2, "train_runtime": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    match = r"trainer_state.json has no learning rate in its log_history of 1 entries \(the run"
    with pytest.raises(ValueError, match=match):
        warn_if_cooled_down(tmp_path)
