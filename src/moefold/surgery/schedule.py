"""Learning rates that go on where the dense run was.

    rate = peak * step / warmup                                   until the warm-up is over
    rate = peak / sqrt(1 + (step - warmup) / timescale)           then
    rate = the rate before the cooldown * (steps - step) / cooldown   in the last `cooldown` steps

An inverse square root has no end that must be known beforehand: a run can be taken up at any step
before its cooldown: *Sparse Upcycling* (Komatsuzaki et al., 2023, section 2) continues it with no
new warm-up and no jump. After a cooldown the rate is too small to learn with, and any larger one is
a jump: such a checkpoint is warned of.
"""

import functools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TRAINER_STATE = "trainer_state.json"

COOLED_DOWN = 0.125
"""A run ended cooled down if its last rate is at most this share of its peak.

Cosine schedules commonly end at a tenth of the peak, linear ones at zero; an inverse square root
comes down to an eighth after 63 timescales.
"""


def inverse_square_root(
    optimizer: Optimizer,
    *,
    timescale: int,
    warmup: int = 0,
    start_step: int = 0,
    steps: int | None = None,
    cooldown: int = 0,
) -> LambdaLR:
    """An inverse square root that continues at a step, peaking at the optimiser's learning rate.

    That of vmoe (`big_vision_rsqrt`), after Zhai et al., *Scaling Vision Transformers*, 2022. With
    `timescale=warmup` it is that of T5, `peak * sqrt(warmup / step)`.

    Args:
        optimizer: with the peak as its learning rate: that of the dense run, as it was given to the
            dense run's optimiser.
        timescale: steps after which the rate has come down to `1 / sqrt(2)` of its peak.
        warmup: steps over which it grows from zero; zero for none.
        start_step: steps that the dense run made; 0 for a new run.
        steps: the last step of all, those of the dense run included; needed for a cooldown.
        cooldown: steps over which the rate goes to zero at the end.

    Returns:
        A scheduler to be stepped once for each step of the optimiser, counting its own from zero.

    Raises:
        ValueError: a number that is out of range; phases that do not fit into `steps`; a start in
            the cooldown.
    """
    if timescale < 1:
        raise ValueError(f"timescale is {timescale}; it must be at least 1")
    for name, value in (("warmup", warmup), ("start_step", start_step), ("cooldown", cooldown)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be zero or more")
    if steps is None and cooldown:
        raise ValueError(
            f"cooldown is {cooldown}, but the last step is not known; pass `steps`, counted from "
            f"the beginning of the dense run"
        )
    if steps is not None and steps < warmup + cooldown:
        raise ValueError(
            f"steps is {steps}, which is less than warmup + cooldown = {warmup + cooldown}; give "
            f"more steps, counted from the beginning of the dense run"
        )
    if steps is not None and start_step > steps - cooldown:
        raise ValueError(
            f"start_step is {start_step}, after the cooldown begins at {steps - cooldown}; give "
            f"more steps, counted from the beginning of the dense run"
        )
    factor = functools.partial(
        _factor,
        timescale=timescale,
        warmup=warmup,
        start_step=start_step,
        steps=steps,
        cooldown=cooldown,
    )
    return LambdaLR(optimizer, factor)


def _factor(
    done: int, *, timescale: int, warmup: int, start_step: int, steps: int | None, cooldown: int
) -> float:
    """The share of the peak after `done` steps of this run."""
    step = start_step + done
    if step < warmup:
        return step / warmup
    if steps is None or step <= steps - cooldown:
        return 1 / math.sqrt(1 + (step - warmup) / timescale)
    before = 1 / math.sqrt(1 + (steps - cooldown - warmup) / timescale)
    return before * max(0.0, (steps - step) / max(1, cooldown))


def warn_if_cooled_down(rates: Sequence[float] | str | Path, *, below: float = COOLED_DOWN) -> bool:
    """Warns if a dense run ended with a learning rate far below its peak.

    Args:
        rates: the learning rates of the run in order; or a `trainer_state.json`, or a checkpoint
            folder of `transformers.Trainer` that has one.
        below: the share of the peak from which down the last rate counts as cooled down.

    Returns:
        Whether it warned.

    Raises:
        ValueError: no learning rate is known; a rate is below zero or not finite; `below` is not
            between 0 and 1.
    """
    if not 0 < below < 1:
        raise ValueError(f"below is {below}; it must be between 0 and 1, a share of the peak")
    if isinstance(rates, str | Path):
        logged = _logged_rates(Path(rates))
        found, steps = [rate for _, rate in logged], [f"step {step}" for step, _ in logged]
    else:
        found = [float(rate) for rate in rates]
        steps = [f"number {number}" for number in range(len(found))]
    if not found:
        raise ValueError("there are no learning rates; pass those of the dense run, in order")
    wrong = [rate for rate in found if not (math.isfinite(rate) and rate >= 0)]
    if wrong:
        raise ValueError(f"a learning rate is {wrong[0]}; all must be finite, zero or more")
    peak, last = max(found), found[-1]
    if last > below * peak or peak == 0:
        return False
    warnings.warn(
        f"the dense run was cooled down: its last learning rate is {last:.3g} ({steps[-1]}), "
        f"{last / peak:.1%} of the peak of {peak:.3g} ({steps[found.index(peak)]}). Going on from "
        f"there it hardly learns, and at a larger rate it jumps. Upcycle a checkpoint from before "
        f"the cooldown, or warm the rate up again over some hundred steps",
        stacklevel=2,
    )
    return True


def _logged_rates(path: Path) -> list[tuple[int, float]]:
    """Step and learning rate of every entry of a Trainer's log that has one."""
    file = path / TRAINER_STATE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"there is no {file}; pass a checkpoint folder of transformers.Trainer, its "
            f"{TRAINER_STATE}, or the learning rates themselves"
        )
    history = json.loads(file.read_text(encoding="utf-8")).get("log_history", [])
    rates = [(e.get("step", 0), float(e["learning_rate"])) for e in history if "learning_rate" in e]
    if not rates:
        raise ValueError(
            f"{file} has no learning rate in its log_history of {len(history)} entries (the run "
            f"ended before it logged, or logging was off); pass the learning rates themselves"
        )
    return rates
