"""Training of a preference model by `transformers.Trainer`: progress, evaluation, resuming.

    fit(model, groups, FitConfig(epochs=8), held_out=other, folder="run", resume=True)

A batch is so many groups, taken together by their numbers: nothing is padded and nothing collated.
To the trainer the whole run is one pass, whose order the seed fixes: epoch after epoch, each in an
order of its own. So a run that goes on from a checkpoint sees what it would have seen, and ends
with the very weights of one that was not interrupted.

Shapes: `groups`, as in `Groups`.
"""

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moefold.preference.diagnostics import agreement, regret
from moefold.preference.groups import Groups
from moefold.preference.model import PreferenceModel, mean_loss
from moefold.record import AbstractRouted, Record, record_routing

_POINTS = 200
"""Losses that a curve has, about."""

_SAVES = 10
"""Checkpoints of a run, about."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: passes over the groups.
        batch_size: groups of a step.
        learning_rate: of AdamW, at its highest.
        warmup: share of the steps over which the rate grows from zero; it then falls as a cosine.
        weight_decay: of AdamW.
        evaluate_every: steps between evaluations on held-out groups; once an epoch if None.
        save_every: steps between checkpoints, rounded up to whole points of the curve; ten times in
            all if None.
        device: "cpu" or an accelerator torch knows.
        seed: of the order of the data, and of whatever the model draws.

    Raises:
        ValueError: names the value that cannot be.
    """

    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    evaluate_every: int | None = None
    save_every: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "evaluate_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise ValueError(
                f"warmup is {self.warmup} and weight_decay {self.weight_decay}; warmup is a share "
                f"from 0 to below 1, weight_decay not negative"
            )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """How a run went, from its first step on, also where it was interrupted.

    Attributes:
        steps: at which losses were noted.
        loss: mean over the steps since the one before.
        evaluated: steps after which held-out groups were looked at.
        held_out: `loss`, `agreement` and, where utilities are known, `regret` at each of them.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    evaluated: tuple[int, ...] = ()
    held_out: Mapping[str, tuple[float, ...]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def steps_of(groups: int, config: FitConfig) -> int:
    """How many steps a run over that many groups takes."""
    return math.ceil(config.epochs * groups / config.batch_size)


def fit(
    model: nn.Module,
    train: Groups,
    config: FitConfig | None = None,
    *,
    held_out: Groups | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    advance: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> History:
    """Trains a model in place; it comes back in evaluation mode, on the CPU.

    Random numbers of the caller are as they were afterwards.

    Args:
        model: what is trained: a `PreferenceModel`, or what takes the parts of `Groups` by their
            names and returns a `loss` among others.
        train: groups of which something is known.
        config: how; the defaults if None.
        held_out: groups to evaluate a `PreferenceModel` on meanwhile.
        folder: for checkpoints, of which the last two stay; none are made if None. Those of earlier
            runs go, unless this one resumes.
        resume: go on from the last whole checkpoint in the folder, if there is one.
        advance: called after every step with the number of the step, for a progress bar.
        say: called with a line for every evaluation.

    Raises:
        ValueError: there is nothing to learn, a package is missing, the loss stops being finite, or
            the checkpoint is of another run.
    """
    config = FitConfig() if config is None else config
    _check(model, train, held_out)
    place = None if folder is None else Path(folder)
    run = "" if place is None else fingerprint(model, train, config)
    checkpoint = None if place is None else _beginning(place, run, resume=resume)
    with _own_random_numbers(), _record_if_routed(model) as record, _output(place) as output:
        watch = _watch(record, run or None, checkpoint, advance)
        trainer = _trainer(model, train, held_out, config, output, watch, say)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        history = _history(trainer.state.log_history)
    model.to("cpu").eval()
    return history


def fingerprint(model: nn.Module, train: Groups, config: FitConfig) -> str:
    """A hash of what decides how a run ends: the model's form, the groups, and how to train.

    Where weights start is not in it: a run that goes on has them from its checkpoint.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "device"}
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    loss = [getattr(model, "loss", None), str(getattr(model, "loss_settings", None))]
    sha = hashlib.sha256(json.dumps([settings, shapes, loss], sort_keys=True).encode())
    for name, value in train.as_inputs().items():
        sha.update(name.encode())
        if isinstance(value, Tensor):
            sha.update(np.ascontiguousarray(value.detach().cpu().numpy()).data)
        else:
            sha.update(json.dumps(value).encode())
    return sha.hexdigest()


def _beginning(folder: Path, run: str, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any; others are taken away.

    Raises:
        ValueError: it is of another run.
    """
    from moefold.preference import checkpoints

    found = checkpoints.last(folder) if resume else None
    if found is not None:
        checkpoints.refuse_other_run(found, run)
    checkpoints.clear(folder, whole=not resume)
    return found


@final
class _Run(Dataset[Mapping[str, Any]]):
    """Every group in the order that the run sees it, taken a batch at a time."""

    def __init__(self, groups: Groups, config: FitConfig) -> None:
        # Texts that no model is shown would be copied for every batch.
        groups = replace(groups, split=None, category=None)
        if groups.weights is not None:
            # Of weight 0 there is nothing to learn, and a batch of them has no mean.
            groups = groups.take((groups.weights > 0).nonzero().squeeze(1))
            assert groups.weights is not None
            groups = replace(groups, weights=groups.weights / groups.weights.mean())
        self.groups, self.starts = groups, groups.starts
        draw = torch.Generator().manual_seed(config.seed)
        epochs = [torch.randperm(len(groups), generator=draw) for _ in range(config.epochs)]
        self.order = torch.cat(epochs)

    def __len__(self) -> int:
        return len(self.order)

    def __getitems__(self, places: Sequence[int]) -> Mapping[str, Any]:
        index = self.order[torch.as_tensor(places)]
        return self.groups.take(index, starts=self.starts).as_inputs()


def _as_it_is(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    return batch


def _trainer(
    model: nn.Module,
    train: Groups,
    held_out: Groups | None,
    config: FitConfig,
    output: Path,
    watch: Any,
    say: Callable[[str], None] | None,
) -> Any:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class PreferenceTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            """The mean loss of a batch, which counts by the weight of its groups."""
            loss = model(**inputs)["loss"]
            return loss if "weights" not in inputs else loss * inputs["weights"].mean()

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """The diagnostics of held-out groups, as the whole package computes them."""
            assert held_out is not None
            assert isinstance(model, PreferenceModel)
            metrics = {f"eval_{k}": v for k, v in measured(model, held_out).items()}
            if say is not None:
                words = ", ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.items())
                say(f"step {self.state.global_step} of {total}: held-out {words}")
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    run = _Run(train, config)
    total = steps_of(len(run.groups), config)
    every = max(1, total // _POINTS)
    saves = config.save_every or max(1, total // _SAVES)
    trainer = PreferenceTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=1,
            per_device_train_batch_size=config.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(config.warmup * total),
            weight_decay=config.weight_decay,
            max_grad_norm=0.0,
            use_cpu=torch.device(config.device).type == "cpu",
            seed=config.seed,
            logging_steps=every,
            logging_nan_inf_filter=False,
            eval_strategy="no" if held_out is None else "steps",
            eval_steps=config.evaluate_every or max(1, total // config.epochs),
            save_strategy="steps" if watch.saves else "no",
            # Where a loss is noted, or the mean since the last note would be lost with the process.
            save_steps=math.ceil(saves / every) * every,
            save_only_model=True,
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=run,
        eval_dataset=None if held_out is None else _Run(held_out, FitConfig(epochs=1)),
        data_collator=_as_it_is,  # pyright: ignore[reportArgumentType] - it is made already
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measured(model: PreferenceModel, groups: Groups) -> dict[str, float]:
    """Loss and agreement on labelled groups, and regret where utilities are known."""
    values = model.values(groups)
    found = {
        "loss": mean_loss(model, groups, values),
        "agreement": float(agreement(values, groups).mean()),
    }
    if groups.utilities is not None:
        found["regret"] = float(regret(values, groups).mean())
    return found


def _watch(
    record: Record | None,
    run: str | None,
    checkpoint: Path | None,
    advance: Callable[[int], None] | None,
) -> Any:
    """What happens between steps: routers adapt, the bar advances, the rest of the state is kept.

    All through the trainer's public calls; only its files of pickles are taken away.
    """
    from transformers import TrainerCallback

    from moefold.preference.checkpoints import keep, restore, restore_random

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.saves = run is not None
            self.random: Mapping[str, Tensor] | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            if checkpoint is not None:
                self.random = restore(checkpoint, parts["optimizer"], parts["lr_scheduler"])

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.random is not None:  # not before: the loader draws a number when it begins
                restore_random(self.random)
                self.random = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if record is not None:
                record.update()
                record.clear()
            if advance is not None:
                advance(state.global_step)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if record is not None:
                record.clear()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not math.isfinite(logs.get("loss", 0.0)):
                raise ValueError(
                    f"the loss is {logs['loss']} after {state.global_step} steps; lower the "
                    f"learning rate, now {args.learning_rate}, or standardize the features"
                )

        def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
            assert run is not None
            made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            keep(made, run, parts["optimizer"], parts["lr_scheduler"])

    return Watch()


def _history(log: Sequence[Mapping[str, float]]) -> History:
    losses = [entry for entry in log if "loss" in entry]
    looks = [entry for entry in log if "eval_loss" in entry]
    names = [
        name for name in ("loss", "agreement", "regret") if looks and f"eval_{name}" in looks[0]
    ]
    return History(
        steps=tuple(int(entry["step"]) for entry in losses),
        loss=tuple(float(entry["loss"]) for entry in losses),
        evaluated=tuple(int(entry["step"]) for entry in looks),
        held_out={name: tuple(float(e[f"eval_{name}"]) for e in looks) for name in names} or None,
    )


def _record_if_routed(model: nn.Module) -> AbstractContextManager[Record | None]:
    routed = any(isinstance(module, AbstractRouted) for module in model.modules())
    return record_routing(model) if routed else nullcontext()


@contextmanager
def _output(folder: Path | None) -> Iterator[Path]:
    """The folder, or one that goes away: the trainer wants one."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """The trainer seeds every generator there is; afterwards they are the caller's again."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002 - it seeds this one
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002


def _check(model: nn.Module, train: Groups, held_out: Groups | None) -> None:
    """Refuses what could not be trained, before anything is done.

    Raises:
        ValueError: says what is missing.
    """
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"training needs {' and '.join(missing)}, not installed here; run "
            f"`pip install 'moefold[prefer]'` or `pip install {' '.join(missing)}`"
        )
    for name, groups in (("train", train), ("held_out", held_out)):
        if groups is not None and not len(groups):
            raise ValueError(f"{name} has no groups; give at least one")
        if groups is not None and not groups.is_labelled:
            raise ValueError(
                f"{name} has no choice, ranks or utilities; there is nothing to learn from"
            )
        if groups is not None and groups.weights is not None and not groups.weights.any():
            raise ValueError(f"{name} has weights that are all 0; give some group a weight")
    if held_out is not None and not isinstance(model, PreferenceModel):
        raise ValueError(
            f"held_out is measured by what a PreferenceModel chooses, and a {type(model).__name__} "
            f"is none; leave held_out out"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameters that are trained; set requires_grad of some")


__all__ = ["FitConfig", "History", "fingerprint", "fit", "measured", "steps_of"]
