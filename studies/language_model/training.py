"""Training: the Trainer of transformers, with the routers' own learning once a step.

Whatever the router, a seed has the same initial weights, the same sequences in the same order and
the same number of experts for each token on average. Token choice is the model untouched, with its
own balance loss; the other routers are put in before training by `moefold.reroute`.

A run that was killed is begun again. The Trainer's checkpoints would not help: transformers writes
the experts of this class one by one and its Trainer reads them back without noticing that the
stacked ones are missing, so that a resumed run goes on with fresh experts.
"""

import math
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerCallback

import moefold
from moefold.record import Record
from moefold.routing import SparseRouting
from studies.files import write_json
from studies.language_model.data import Data
from studies.language_model.model import new_model, save_trained
from studies.language_model.settings import Settings, training_router

WEIGHTS, RUN = "model.safetensors", "run.json"
POINTS = 60
"""Of the loss curve."""


def train(settings: Settings, data: Data, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains one model and leaves its weights and its story in a folder.

    Returns:
        What `run.json` holds.
    """
    model = new_model(settings, seed)
    router = training_router(settings, arm)
    model.config.output_router_logits = router is None  # the balance loss asks for them
    if router is not None:
        moefold.reroute(model, router)
    sequences = torch.from_numpy(data.order(seed).astype("int64"))
    steps = math.floor(settings.passes * len(sequences) / settings.batch)
    rows = [{"input_ids": row, "labels": row} for row in sequences]
    rows = rows * math.ceil(settings.passes)
    with (
        tempfile.TemporaryDirectory() as scratch,
        nullcontext() if router is None else moefold.record_routing(model) as record,
    ):
        story = _Story(f"{arm}, seed {seed}", record, steps)
        trainer = Trainer(
            model=model,
            args=_arguments(settings, steps, seed, scratch),
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            callbacks=[story],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    save_trained(model, folder / WEIGHTS)
    tokens = steps * settings.batch * settings.length
    told: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "router": "the model's own" if router is None else str(router),
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "threads": torch.get_num_threads(),
        "experts_per_token": settings.budget if record is None else story.experts_per_token,
        "curve": story.curve,
    }
    write_json(folder / RUN, told)
    return told


def _arguments(settings: Settings, steps: int, seed: int, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        use_cpu=True,
        seed=seed,
        train_sampling_strategy="sequential",  # the order is the seed's, made before
        logging_steps=max(1, steps // POINTS),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class _Story(TrainerCallback):
    """Lets routers learn from each step, and keeps what is told of a run."""

    def __init__(self, name: str, record: Record | None, steps: int) -> None:
        self.name, self.record, self.steps = name, record, steps
        self.curve: list[dict[str, float]] = []
        self.rows = self.tokens = 0

    @property
    def experts_per_token(self) -> float:
        """On average over all steps and layers."""
        return self.rows / max(1, self.tokens)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.record is None:
            return
        for routings in self.record.values():
            for routing in routings:
                assert isinstance(routing, SparseRouting)
                self.rows += int(routing.rows_per_expert.sum())
                self.tokens += routing.num_tokens
        self.record.update()
        self.record.clear()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise ValueError(
                f"{self.name}: the loss is {loss} after {state.global_step} steps; lower "
                f"learning_rate, now {args.learning_rate}"
            )
        self.curve.append({"step": state.global_step, "loss": loss})
        if len(self.curve) % 10 == 0:
            print(
                f"{self.name}: step {state.global_step} of {self.steps}, loss {loss:.3f}",
                flush=True,
            )
