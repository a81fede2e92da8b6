"""What choosing and learning to choose cost beside the network's own arithmetic.

    python benchmarks/preference/bench_preference.py

Decisions of 20 candidates with 196 features each, scored by one hidden layer of 40:

- choice: `best_of` against the forward pass of the network alone, 2,048 decisions at a time;
- step: loss and gradients of 128 decisions against forward and backward of the network alone.

Ragged groups have the same total: sizes are drawn from 2 to 38.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefold.preference import ConsistentComparator, Groups, best_of, preference_loss
from moefold.preference.scorers import MLPScorer

RESULTS = Path(__file__).parents[1] / "results" / "local"
FEATURES, HIDDEN, MEAN = 196, 40, 20


def decisions(count: int) -> Groups:
    """Ragged groups whose mean size is 20."""
    lengths = torch.randint(2, 2 * MEAN - 1, (count,))
    lengths[-1] = max(2, int(lengths[-1]) + count * MEAN - int(lengths.sum()))
    candidates = (torch.rand(int(lengths.sum()), FEATURES) < 0.1).float()
    chosen = (torch.rand(count) * lengths).long()
    return Groups(candidates=candidates, lengths=lengths, chosen=chosen)


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of every variant, and quartiles of its ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for turn in range(rounds + 2):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            variants[name]()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "ms": statistics.median(own) * 1e3,
            "ratio": statistics.quantiles(
                [a / b for a, b in zip(own, seconds[order[0]], strict=True)], n=4
            ),
        }
        for name, own in seconds.items()
    }


def bench_choice(rounds: int) -> dict[str, Any]:
    """Time choosing."""
    groups, net = decisions(2048), ConsistentComparator(MLPScorer(FEATURES, hidden=HIDDEN)).eval()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return net.scorer(groups.candidates)

    found = interleaved({"network alone": forward, "best_of": lambda: best_of(net, groups)}, rounds)
    for one in found.values():
        one["decisions_per_second"] = len(groups) / one["ms"] * 1e3
    return found


def bench_step(rounds: int) -> dict[str, Any]:
    """Time a training step."""
    groups, net = decisions(128), ConsistentComparator(MLPScorer(FEATURES, hidden=HIDDEN))

    def bare() -> None:
        net.zero_grad()
        net.scorer(groups.candidates).sum().backward()

    def step(loss: str) -> Callable[[], None]:
        def run() -> None:
            net.zero_grad()
            preference_loss(net, groups, loss).backward()

        return run

    losses = {name: step(name) for name in ("pair-logistic", "listwise", "plackett-luce")}
    return interleaved({"network alone": bare, **losses}, 10 * rounds)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parents[2]
        )
        return found.stdout.strip()

    models = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in models.splitlines() if "model name" in line]
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", "src")),
        "torch": torch.__version__,
        "moefold": version("moefold"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "threads": options.threads,
        "choice": bench_choice(options.rounds),
        "step": bench_step(options.rounds),
    }
    for part in ("choice", "step"):
        for name, found in report[part].items():
            low, middle, high = found["ratio"]
            rate = found.get("decisions_per_second")
            told = "" if rate is None else f"  {rate:,.0f} decisions/s"
            print(
                f"{part:7} {name:15} {found['ms']:8.2f} ms  x{middle:.2f} [{low:.2f}, {high:.2f}]"
                f"{told}"
            )
    out = options.out or RESULTS / f"preference-{report['date'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
