"""The runs of the demo: for each seed one MoE and one dense twin, trained and evaluated.

A run is finished when its file is written, and a finished run with the same fingerprint is used
again instead of run again. The dense twin is one run with two results: after as many examples as
the MoE, and, going on, after as many floating-point operations of training.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer

import moefold
from moefold.demo.bars import Bars
from moefold.demo.look import look
from moefold.demo.pairs import Pair
from moefold.demo.settings import DemoSettings
from moefold.evaluate import encode, rank, retrieval_metrics
from moefold.surgery import Plan, pretrained_encoder
from moefold.train import Curve, FineTuning, fine_tune

Kind = Literal["moe", "dense"]
UNTOUCHED, DENSE, CONTINUED, MOE = "untouched", "dense", "dense-continued", "moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What all runs share.

    Attributes:
        settings: with the precision resolved.
        train: pairs to train on.
        heldout: pairs to evaluate on.
        flops: training operations per pair, of `"dense"` and of `"moe"`.
        fingerprint: what a finished run must carry to be used again.
        own_tokens: how many tokens the encoder reads when nobody cuts its texts shorter.
        out: the demo's folder.
    """

    settings: DemoSettings
    train: Sequence[Pair]
    heldout: Sequence[Pair]
    flops: dict[str, float]
    fingerprint: str
    own_tokens: int | None
    out: Path

    @property
    def continued_examples(self) -> int:
        """Pairs the dense twin can be trained on for what the MoE's training costs.

        Rounded up to whole batches, so the rounding is in favour of the dense twin.
        """
        batch = self.settings.batch_size
        ratio = max(1.0, self.flops["moe"] / self.flops["dense"])
        return -int(-self.settings.examples * ratio // batch) * batch

    def evaluation_flops(self, kind: Kind) -> float:
        """What one evaluation costs: forward passes only, a third of forward and backward."""
        return self.flops[kind] / 3 * len(self.heldout)

    def run_flops(self, kind: Kind) -> float:
        """What one run costs, with its evaluations."""
        if kind == "moe":
            return self.settings.examples * self.flops["moe"] + self.evaluation_flops("moe")
        return self.continued_examples * self.flops["dense"] + 2 * self.evaluation_flops("dense")


def open_dense(settings: DemoSettings) -> SentenceTransformer:
    """The dense encoder, reading as many tokens as the demo does, on its device."""
    encoder = pretrained_encoder(settings.model)
    encoder.max_seq_length = settings.max_tokens
    return encoder.to(settings.device)


def open_upcycled(settings: DemoSettings, seed: int) -> tuple[SentenceTransformer, Plan]:
    """The same encoder as a mixture, its routers started from `seed`."""
    encoder = open_dense(settings)
    torch.manual_seed(seed)
    plan = moefold.upcycle(encoder, settings.upcycle)
    return encoder.to(settings.device), plan


def evaluate(
    encoder: SentenceTransformer, materials: Materials, kind: Kind, bars: Bars
) -> dict[str, list[float]]:
    """Retrieval on the held-out pairs, query by query, by the name of the measure."""
    bars.step(f"evaluating, {len(materials.heldout)} queries", materials.evaluation_flops(kind))
    share = materials.evaluation_flops(kind) / (2 * len(materials.heldout))

    def advance(texts: int) -> None:
        bars.advance(texts * share)

    with autocast(materials.settings):
        batch = materials.settings.batch_size
        queries = encode(
            encoder, [pair.query for pair in materials.heldout], batch_size=batch, advance=advance
        )
        documents = encode(
            encoder, [pair.code for pair in materials.heldout], batch_size=batch, advance=advance
        )
    relevant = [(i,) for i in range(len(materials.heldout))]
    values = retrieval_metrics(rank(queries, documents), relevant)
    return {name: value.tolist() for name, value in values.items()}


def autocast(settings: DemoSettings) -> torch.autocast:
    """The precision of the settings as a context."""
    device = torch.device(settings.device).type
    return torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16")


def run_or_reuse(kind: Kind, seed: int, materials: Materials, bars: Bars) -> dict[str, Any]:
    """A run's results, from its file if it is finished, otherwise by running it."""
    file = materials.out / "runs" / f"seed-{seed}-{kind}.json"
    done = finished(file, materials.fingerprint)
    if done is not None and (kind != "moe" or seed > 0 or (materials.out / "moe").is_dir()):
        bars.say(f"  {_name(kind)}, seed {seed}: finished before, used again")
        bars.advance(materials.run_flops(kind))
        return done | {"reused": True}
    # A file of other settings must not outlive the mixture in `moe/` that belongs to it.
    file.unlink(missing_ok=True)
    run = _run_moe if kind == "moe" else _run_dense
    started = time.perf_counter()
    result = {"fingerprint": materials.fingerprint, "kind": kind, "seed": seed}
    result |= run(seed, materials, bars)
    result["wall_seconds"] = time.perf_counter() - started
    write_json(file, result)
    for name, one in result["results"].items():
        score = sum(one["values"]["ndcg@10"]) / len(materials.heldout)
        bars.say(
            f"  {name}, seed {seed}: nDCG@10 {score:.4f} after {one['examples']} examples "
            f"({one['seconds']:.0f} s of training)"
        )
    return result


def finished(file: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a finished run left, or None if there is none with this fingerprint."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # not there, or half of a file from elsewhere
        return None
    matches = isinstance(found, dict) and found.get("fingerprint") == fingerprint
    return found if matches else None


def write_json(file: Path, data: Any) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    scratch.replace(file)


def _run_moe(seed: int, materials: Materials, bars: Bars) -> dict[str, Any]:
    settings = materials.settings
    encoder, _ = open_upcycled(settings, seed)
    curve = _train(encoder, "moe", settings.examples, seed, materials, bars)
    values = evaluate(encoder, materials, "moe", bars)
    result: dict[str, Any] = {
        "results": {MOE: _result(values, settings.examples, curve.seconds, materials.flops["moe"])},
        "curve": {"examples": curve.examples, "loss": curve.loss},
    }
    if seed == 0:  # the one that is looked into, and kept
        bars.step("looking who chooses whom")
        result["look"] = look(encoder, materials.heldout, settings.batch_size)
        encoder.max_seq_length = materials.own_tokens
        moefold.save(encoder.to("cpu"), materials.out / "moe")
    return result


def _run_dense(seed: int, materials: Materials, bars: Bars) -> dict[str, Any]:
    settings = materials.settings
    encoder = open_dense(settings)
    at_equal_examples: dict[str, list[float]] = {}

    def pause() -> None:
        at_equal_examples.update(evaluate(encoder, materials, "dense", bars))
        rest = materials.continued_examples - settings.examples
        bars.step(f"continuing the dense twin, seed {seed}", rest * materials.flops["dense"])

    examples = materials.continued_examples
    curve = _train(
        encoder, "dense", examples, seed, materials, bars, pauses={settings.examples: pause}
    )
    values = evaluate(encoder, materials, "dense", bars)
    per_pair = materials.flops["dense"]
    seconds = curve.seconds * settings.examples / examples
    return {
        "results": {
            DENSE: _result(at_equal_examples, settings.examples, seconds, per_pair),
            CONTINUED: _result(values, examples, curve.seconds, per_pair),
        },
        "curve": {"examples": curve.examples, "loss": curve.loss},
    }


def _train(
    encoder: SentenceTransformer,
    kind: Kind,
    examples: int,
    seed: int,
    materials: Materials,
    bars: Bars,
    **pauses: Any,
) -> Curve:
    settings, per_pair = materials.settings, materials.flops[kind]
    bars.step(f"training the {_name(kind)}, seed {seed}", settings.examples * per_pair)
    return fine_tune(
        encoder,
        [(pair.query, pair.code) for pair in materials.train],
        FineTuning(
            examples=examples,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_examples=settings.warmup_examples,
            precision=settings.precision,
            device=settings.device,
            seed=seed,
        ),
        advance=lambda pairs: bars.advance(pairs * per_pair),
        **pauses,
    )


def _result(
    values: dict[str, list[float]], examples: int, seconds: float, per_pair: float
) -> dict[str, Any]:
    return {
        "values": dict(values),
        "examples": examples,
        "seconds": seconds,
        "flops": examples * per_pair,
    }


def _name(kind: Kind) -> str:
    return "MoE" if kind == "moe" else "dense twin"
