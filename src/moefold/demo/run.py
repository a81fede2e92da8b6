"""The main job from beginning to end.

An encoder is upcycled, the change of its output at birth is measured, the mixture and its dense
twin are trained on the same pairs in the same order and evaluated on modules neither has seen, and
a page says what came of it. Whatever wins is what is printed.
"""

import hashlib
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

from moefold.demo.bars import Bars
from moefold.demo.folder import claim, forget
from moefold.demo.pairs import Split, mine, sample, split, standard_library
from moefold.demo.report import write_report
from moefold.demo.results import lines, summarise, verdicts
from moefold.demo.settings import DemoSettings
from moefold.demo.twins import (
    UNTOUCHED,
    Materials,
    evaluate,
    finished,
    open_dense,
    open_upcycled,
    run_or_reuse,
    write_json,
)
from moefold.evaluate import encode
from moefold.surgery import pretrained_encoder
from moefold.train import training_flops

SCHEMA = 1
_BIRTH_PAIRS = 64
_COUNTED_PAIRS = 8
_LIBRARIES = ("moefold", "torch", "transformers", "sentence-transformers", "accelerate", "numpy")


def run(
    settings: DemoSettings,
    out: Path,
    *,
    console: Console | None = None,
    library: Path | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run the demo and write `report.html`, `results.json`, `moe/` and `runs/` into a folder.

    Runs that an earlier call with the same settings finished in this folder are used again.

    Args:
        settings: what to do.
        out: the folder; created if it is not there.
        console: where to print; the terminal if None.
        library: folder to mine pairs from; the standard library of this Python if None.
        fresh: run everything again, even what an earlier call finished.

    Returns:
        What `results.json` holds.

    Raises:
        ValueError: a setting, the model or the router does not fit; there are too few pairs.
    """
    console = console or Console()
    settings = settings.resolved()
    started = time.perf_counter()
    _quieten_libraries()
    claim(out)
    with Bars(console) as bars:
        data = _mine(settings, library or standard_library(), bars)
        dense, birth, plan, flops = _birth(settings, data, bars)
        if fresh:
            forget(out)
        materials = Materials(
            settings=settings,
            train=data.train,
            heldout=data.heldout,
            flops=flops,
            fingerprint=settings.fingerprint(data.digest(), _digest(dense), *_versions().values()),
            own_tokens=pretrained_encoder(settings.model).max_seq_length,
            out=out,
        )
        runs = _all_runs(materials, dense, bars)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": _versions(),
        "machine": _machine(),
        "settings": settings.to_dict(),
        "data": _describe(data),
        "plan": plan,
        "birth": birth,
        "flops_per_pair": flops,
        **summarise(runs),
        "runs": [_without_values(one) for one in runs],
        "look": next(one["look"] for one in runs if "look" in one),
        # What was finished before took its time then.
        "seconds": time.perf_counter()
        - started
        + sum(one["wall_seconds"] for one in runs if one.get("reused")),
    }
    results["verdicts"] = verdicts(results)
    write_json(out / "results.json", results)
    write_report(results, out / "report.html")
    _print_results(results, out, console)
    return results


def _mine(settings: DemoSettings, library: Path, bars: Bars) -> Split:
    bars.step("reading the standard library", 1.0)
    found = mine(library)
    whole = split(found, fold=settings.fold)
    if settings.heldout is not None:
        whole = replace(whole, heldout=sample(whole.heldout, settings.heldout))
    if len(whole.train) < settings.batch_size:
        raise ValueError(
            f"{library} yields {len(whole.train)} pairs to train on, fewer than one batch of "
            f"{settings.batch_size}; use a Python whose standard library has its sources"
        )
    bars.say(
        f"pairs: {len(whole.train)} (docstring, code) to train on, {len(whole.heldout)} held out, "
        f"from {len({p.module for p in whole.heldout})} modules that training never sees"
    )
    return whole


def _birth(
    settings: DemoSettings, data: Split, bars: Bars
) -> tuple[SentenceTransformer, dict[str, float], str, dict[str, float]]:
    """Upcycle once to see what changes, and count what training will cost."""
    bars.step(f"opening {settings.model} and its mixture")
    dense = open_dense(settings)
    mixture, plan = open_upcycled(settings, seed=0)
    bars.say(str(plan))
    pairs = data.heldout[:_BIRTH_PAIRS]
    texts = [text for pair in pairs for text in (pair.query, pair.code)]
    before, after = (encode(m, texts).double() for m in (dense, mixture))
    relative = (after - before).norm(dim=1) / before.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=1)
    birth = {
        "texts": float(len(texts)),
        "relative_error_mean": float(relative.mean()),
        "relative_error_max": float(relative.max()),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
    }
    bars.say(
        f"at birth, over {len(texts)} held-out texts in fp32: the output changes by "
        f"{birth['relative_error_mean']:.1e} of its length (at most "
        f"{birth['relative_error_max']:.1e}); cosine at least {birth['cosine_min']:.7f}"
    )
    bars.step("counting the operations of training")
    counted = [text for p in sample(data.train, _COUNTED_PAIRS) for text in (p.query, p.code)]
    flops = {
        "dense": 2 * training_flops(dense, counted),
        "moe": 2 * training_flops(mixture, counted),
    }
    bars.say(
        f"training compute per pair: dense {flops['dense'] / 1e9:.2f} GFLOP, MoE "
        f"{flops['moe'] / 1e9:.2f} GFLOP ({flops['moe'] / flops['dense']:.2f}x)"
    )
    return dense, birth, str(plan), flops


def _all_runs(materials: Materials, dense: SentenceTransformer, bars: Bars) -> list[dict[str, Any]]:
    settings = materials.settings
    seeds = range(settings.seeds)
    bars.expect(
        materials.evaluation_flops("dense")
        + settings.seeds * (materials.run_flops("moe") + materials.run_flops("dense"))
    )
    bars.say(
        f"training on {settings.examples} pairs for {_count(settings.seeds, 'seed')} in "
        f"{settings.precision}; the dense twin goes on to {materials.continued_examples}"
    )
    runs = [_untouched(materials, dense, bars)]
    for seed in seeds:
        runs.append(run_or_reuse("moe", seed, materials, bars))
        runs.append(run_or_reuse("dense", seed, materials, bars))
    return runs


def _untouched(materials: Materials, dense: SentenceTransformer, bars: Bars) -> dict[str, Any]:
    file = materials.out / "runs" / "untouched.json"
    found = finished(file, materials.fingerprint)
    if found is not None:
        bars.advance(materials.evaluation_flops("dense"))
        return found
    values = evaluate(dense, materials, "dense", bars)
    result = {
        "fingerprint": materials.fingerprint,
        "kind": UNTOUCHED,
        "seed": 0,
        "results": {UNTOUCHED: {"values": values, "examples": 0, "seconds": 0.0, "flops": 0.0}},
    }
    write_json(file, result)
    return result


def _print_results(results: dict[str, Any], out: Path, console: Console) -> None:
    printed = ["", *lines(results), "", *results["verdicts"]]
    if results["settings"]["seeds"] == 1:
        printed.append("One seed: the intervals are over queries only and say nothing of others.")
    printed += [
        "",
        f"{out / 'report.html'}   the page",
        f"{out / 'results.json'}  the numbers",
        f"{out / 'moe'}           the trained MoE: moefold.load({str(out / 'moe')!r})",
        f"done in {results['seconds'] / 60:.1f} minutes",
    ]
    for line in printed:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _describe(data: Split) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "train_pairs": len(data.train),
        "heldout_pairs": len(data.heldout),
        "heldout_modules": sorted({pair.module for pair in data.heldout}),
        "sha256": data.digest(),
    }


def _without_values(run: dict[str, Any]) -> dict[str, Any]:
    """A run with means instead of one value per query, which stay in its own file."""
    results = {
        name: {
            **{k: v for k, v in one.items() if k != "values"},
            **{metric: float(np.mean(v)) for metric, v in one["values"].items()},
        }
        for name, one in run["results"].items()
    }
    kept = {k: v for k, v in run.items() if k not in ("fingerprint", "look", "reused")}
    return {**kept, "results": results}


def _digest(encoder: SentenceTransformer) -> str:
    """A hash of the encoder's weights."""
    sha = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[name] = "unknown"
    return found


def _machine() -> dict[str, Any]:
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _quieten_libraries() -> None:
    """No bars and warnings of others between ours, and no question to any server."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
