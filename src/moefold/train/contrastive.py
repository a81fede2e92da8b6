"""Fine-tune a sentence encoder on pairs: a text, and the text that should be found with it.

The loop is `SentenceTransformerTrainer` with `MultipleNegativesRankingLoss` (van den Oord et al.,
*Representation Learning with Contrastive Predictive Coding*, 2018; Henderson et al., *Efficient
Natural Language Response Suggestion for Smart Reply*, 2017): within a batch, every other pair's
second text is a wrong answer. What is added is what a comparison of models needs:

* **one order of the data** for all models with the same seed, the shorter run's order being the
  beginning of the longer one's;
* **one schedule**: linear warm-up, then constant. At any number of examples a run stands exactly
  where a run of that length would have ended, so a continuation is honest: it is the same run,
  going on. (A rate that decays to zero would favour whichever run had just finished its decay.)
* **a budget** in examples or in floating-point operations.

Balance losses ride on the graph of an upcycled encoder and need nothing here; what routers adapt
without a gradient (biases, thresholds) is updated after every step.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from moefold.moe import set_loss_scale
from moefold.record import AbstractRouted, Record, record_routing
from moefold.train.flops import training_flops

Texts = tuple[str, str]
_BATCHES_SORTED_TOGETHER = 8
_PAIRS_COUNTED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """How to fine-tune.

    Attributes:
        examples: the budget in pairs, rounded up to whole batches; or
        flops: the budget in floating-point operations of training, forward and backward.
        batch_size: pairs per step.
        learning_rate: of AdamW, after the warm-up.
        warmup_examples: pairs over which the rate grows from zero, rounded up to whole batches.
        weight_decay: of AdamW.
        scale: what cosines are multiplied by before the softmax, the inverse temperature.
        precision: `"bf16"` runs the model under autocast.
        device: `"cpu"` or an accelerator torch knows.
        seed: of the order, of dropout, and of a router's noise.
    """

    examples: int | None = None
    flops: float | None = None
    batch_size: int = 32
    learning_rate: float = 2e-5
    warmup_examples: int = 320
    weight_decay: float = 0.01
    scale: float = 20.0
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.examples is None) == (self.flops is None):
            raise ValueError(
                f"the budget is examples={self.examples}, flops={self.flops}; give exactly one"
            )
        for name in ("examples", "flops", "learning_rate", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; the other pairs of a batch are the wrong "
                "answers, so it must be at least 2"
            )
        if self.warmup_examples < 0 or self.weight_decay < 0:
            raise ValueError(
                f"warmup_examples is {self.warmup_examples} and weight_decay {self.weight_decay}; "
                "neither can be negative"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; it must be 'fp32' or 'bf16'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a run did.

    Attributes:
        examples: pairs seen after each step.
        loss: contrastive loss of each step, before its update. Losses that ride on the graph of
            the model are not part of it.
        seconds: spent training, pauses left out.
    """

    examples: tuple[int, ...]
    loss: tuple[float, ...]
    seconds: float


def fine_tune(
    encoder: Any,
    pairs: Sequence[Texts],
    settings: FineTuning,
    *,
    pauses: Mapping[int, Callable[[], None]] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Curve:
    """Fine-tune an encoder in place and return its loss curve.

    Args:
        encoder: a `SentenceTransformer`. It comes back in evaluation mode.
        pairs: two texts each; repeated, in another order, where the budget asks for more.
        settings: the budget and the rest.
        pauses: what to call once that many examples have been seen, such as an evaluation half
            way; the encoder is in evaluation mode meanwhile, and random numbers drawn there do
            not change the run.
        advance: called after every step with the number of examples in it, for a progress bar.

    Raises:
        ValueError: if there are fewer pairs than one batch, a pause lies beyond the end or inside a
            batch, a package is missing, or the loss stops being finite.
    """
    _check_packages()
    steps = math.ceil(_examples(encoder, pairs, settings) / settings.batch_size)
    pauses = dict(pauses or {})
    for at in pauses:
        if at % settings.batch_size or not 0 < at <= steps * settings.batch_size:
            raise ValueError(
                f"a pause at {at} examples: it must be a multiple of the batch size "
                f"{settings.batch_size}, at most {steps * settings.batch_size}"
            )
    batches = in_batches(pairs, steps, settings.batch_size, seed=settings.seed)
    # A step passes both texts of a pair, and a loss that rides counts once for each pass.
    set_loss_scale(encoder, 1 / 2)
    with tempfile.TemporaryDirectory() as scratch, _record_if_routed(encoder) as record:
        progress = _progress(settings.batch_size, pauses, advance, record)
        trainer = _trainer(encoder, batches, settings, scratch, progress)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started - progress.paused
    encoder.eval()
    set_loss_scale(encoder, 1.0)
    return Curve(
        examples=tuple(settings.batch_size * (i + 1) for i in range(len(progress.losses))),
        loss=tuple(progress.losses),
        seconds=seconds,
    )


def in_batches(
    pairs: Sequence[Texts], steps: int, batch_size: int, *, seed: int
) -> list[list[Texts]]:
    """The first `steps` batches of the order a seed stands for.

    Each pass goes over a fresh permutation, of which the incomplete last batch is left out. Eight
    batches at a time are sorted by the length of their second texts, cut, and shuffled, so that
    texts of a batch are about equally long and little of it is padding.

    Raises:
        ValueError: if there are fewer pairs than `batch_size`.
    """
    if len(pairs) < batch_size:
        raise ValueError(
            f"{len(pairs)} pairs do not fill a batch of {batch_size}; give more pairs or a smaller "
            "batch_size"
        )
    draw = np.random.default_rng(seed)
    batches: list[list[Texts]] = []
    while len(batches) < steps:
        order = draw.permutation(len(pairs))
        order = order[: len(pairs) // batch_size * batch_size]
        for start in range(0, len(order), batch_size * _BATCHES_SORTED_TOGETHER):
            together = order[start : start + batch_size * _BATCHES_SORTED_TOGETHER].tolist()
            together.sort(key=lambda i: len(pairs[i][1]))
            cut = [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
            batches.extend([pairs[i] for i in cut[j]] for j in draw.permutation(len(cut)))
    return batches[:steps]


def _examples(encoder: Any, pairs: Sequence[Texts], settings: FineTuning) -> int:
    if settings.examples is not None:
        return settings.examples
    assert settings.flops is not None
    # The first pairs of the order, so that the count is of what the run will see.
    steps = math.ceil(min(_PAIRS_COUNTED, len(pairs)) / settings.batch_size)
    batches = in_batches(pairs, steps, settings.batch_size, seed=settings.seed)
    texts = [text for batch in batches for pair in batch for text in pair]
    return math.ceil(settings.flops / (2 * training_flops(encoder, texts)))


def _check_packages() -> None:
    present = {name: find_spec(name) is not None for name in ("accelerate", "datasets")}
    missing = [name for name, here in present.items() if not here]
    if missing:
        raise ValueError(
            f"fine-tuning needs {' and '.join(missing)}, not installed here; "
            f"run `pip install 'moefold[demo]'` or `pip install {' '.join(missing)}`"
        )


def _record_if_routed(encoder: Any) -> AbstractContextManager[Record | None]:
    routed = any(isinstance(module, AbstractRouted) for module in encoder.modules())
    return record_routing(encoder) if routed else nullcontext()


def _trainer(
    encoder: Any,
    batches: list[list[Texts]],
    settings: FineTuning,
    scratch: str,
    progress: Any,
) -> Any:
    """The trainer of `sentence-transformers`, silent, offline, and taking the data as it comes."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            """No model card: it describes the data by asking the hub."""

        def get_batch_sampler(self, dataset: Any, batch_size: int, *_: Any, **__: Any) -> Any:
            return DefaultBatchSampler(
                SequentialSampler(dataset),  # pyright: ignore[reportArgumentType]
                batch_size=batch_size,
                drop_last=True,
            )

    pairs = [pair for batch in batches for pair in batch]
    columns = {"text": [a for a, _ in pairs], "wanted": [b for _, b in pairs]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size,
        max_steps=len(batches),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=math.ceil(settings.warmup_examples / settings.batch_size),
        weight_decay=settings.weight_decay,
        bf16=settings.precision == "bf16",
        use_cpu=torch.device(settings.device).type == "cpu",
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=encoder,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=MultipleNegativesRankingLoss(encoder, scale=settings.scale),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _progress(
    batch_size: int,
    pauses: Mapping[int, Callable[[], None]],
    advance: Callable[[int], None] | None,
    record: Record | None,
) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.paused = 0.0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            self.losses.append(float(logs["loss"]))
            if not math.isfinite(self.losses[-1]):
                raise ValueError(
                    f"the loss is {self.losses[-1]} after {len(self.losses)} steps; lower the "
                    f"learning rate, now {args.learning_rate}"
                )

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if record is not None:
                record.update()
                record.clear()
            if advance is not None:
                advance(batch_size)
            pause = pauses.get(state.global_step * batch_size)
            if pause is None:
                return
            started = time.perf_counter()
            model.eval()
            with torch.random.fork_rng():
                pause()
            model.train()
            if record is not None:
                record.clear()
            self.paused += time.perf_counter() - started

    return Progress()
