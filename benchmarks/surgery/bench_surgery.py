"""Time and memory of surgery on an encoder of 110 M parameters, and of streaming it.

    python benchmarks/surgery/bench_surgery.py            # BERT base, 8 experts
    python benchmarks/surgery/bench_surgery.py --threads 1 --clock cpu     # on a shared machine

What is measured, and how it is held:

- Every number comes from a process of its own, since peak memory is a process's. Rounds alternate
  between the cases, so that a machine that slows down slows all of them.
- The model is read from a folder, as users have it, so that hashing its files is in the time.
- Memory is resident memory above what the process had with everything imported and nothing opened;
  its highest point over the whole life of the model is compared with the size of the upcycled
  weights. A mapped file counts, although the system could take its pages back.
- What surgery makes is checked before a number of it is printed: the parameters are those of the
  plan, and the output at birth is that of the dense model.

Streaming is compared with the shards that it writes. That is from folder to folder, the disk
included, where the others end with the model in memory.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results" / "local"
CASES = {
    "every-other": {"sites": "every-other", "inputs": True},
    "every-other, no receipt": {"sites": "every-other", "inputs": False},
    "all": {"sites": "all", "inputs": True},
    "all, no receipt": {"sites": "all", "inputs": False},
    "all, streamed": {"sites": "all", "stream": True},
}
SECONDS, TIMES_FINAL, SHARDS = 5.0, 1.3, 2.0
"""What must hold: seconds of a surgery, its peak in final models, that of streaming in shards."""
WARM_UP: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 60}
"""A model small enough that opening it leaves only what libraries keep."""


def resident() -> tuple[int, int]:
    """Resident memory in bytes: now, and its highest point so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, highest = (1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, highest


def measure(folder: Path, work: Path, case: dict, options: argparse.Namespace) -> dict:
    """Carries out one case in this process."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    import moefold

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    moe = moefold.MoEConfig(num_experts=options.experts)
    config = moefold.UpcycleConfig(sites=case["sites"], moe=moe)
    tiny = work / f"tiny-{os.getpid()}"
    BertModel(BertConfig(num_hidden_layers=2, num_attention_heads=2, **WARM_UP)).save_pretrained(
        tiny
    )
    moefold.upcycle_folder(tiny, work / f"warm-{os.getpid()}", config)
    moefold.upcycle(BertModel.from_pretrained(tiny), config)

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    before = resident()[0]
    if case.get("stream"):
        start = clock()
        out = work / f"out-{os.getpid()}"
        plan = moefold.upcycle_folder(folder, out, config, max_shard_size=options.shard)
        seconds = clock() - start
        peak = resident()[1] - before
        files = [file.stat().st_size for file in out.glob("*.safetensors")]
        parameters = (sum(files) - 100_000) // 4  # but for headers
        assert abs(parameters / plan.after.parameters - 1) < 1e-3, "not the weights of the plan"
        return {"seconds": seconds, "peak": peak, "shard": max(files), "shards": len(files)}
    start = clock()
    model = BertModel.from_pretrained(folder).eval()
    opening = clock() - start
    start = clock()
    plan = moefold.upcycle(model, config, inputs=case["inputs"])
    seconds = clock() - start
    peak = resident()[1] - before
    held = resident()[0] - before
    assert sum(p.numel() for p in model.parameters()) == plan.after.parameters
    if plan.receipt is not None:
        # float32: sums of a few hundred products in another order, over twelve layers.
        assert plan.receipt.error < 1e-4, f"the output changed by {plan.receipt.error:.1e}"
    return {
        "seconds": seconds,
        "opening_seconds": opening,
        "peak": peak,
        "held": held,
        "final": plan.after.weight_bytes,
        "dense": plan.before.weight_bytes,
    }


def make_dense(folder: Path, seed: int) -> None:
    """Saves BERT base with random weights, in shards of 60 MB."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    BertModel(BertConfig()).save_pretrained(folder, max_shard_size="60MB")


def summary(case: str, rounds: list[dict]) -> dict:
    """Medians and extremes of a case, and whether what must hold does."""
    seconds = [r["seconds"] for r in rounds]
    peak = statistics.median(r["peak"] for r in rounds)
    found = {
        "case": case,
        "seconds": statistics.median(seconds),
        "seconds_least_most": [min(seconds), max(seconds)],
        "peak_bytes": peak,
    }
    if "shard" in rounds[0]:
        found |= {"shard_bytes": rounds[0]["shard"], "shards": rounds[0]["shards"]}
        found["peak_in_shards"] = peak / rounds[0]["shard"]
        found["holds"] = found["peak_in_shards"] <= SHARDS
        return found
    final = rounds[0]["final"]
    found |= {
        "opening_seconds": statistics.median(r["opening_seconds"] for r in rounds),
        "final_bytes": final,
        "dense_bytes": rounds[0]["dense"],
        "peak_in_final_models": peak / final,
        "held_in_final_models": statistics.median(r["held"] for r in rounds) / final,
    }
    found["holds"] = found["seconds"] < SECONDS and found["peak_in_final_models"] <= TIMES_FINAL
    return found


def show(found: dict) -> str:
    """One line of the printed table."""
    low, high = found["seconds_least_most"]
    line = f"{found['case']:<24} {found['seconds']:6.2f} s [{low:5.2f}, {high:5.2f}]   peak "
    if "peak_in_shards" in found:
        line += f"{found['peak_in_shards']:.2f} shards of {found['shard_bytes'] / 1e6:.0f} MB"
    else:
        size = found["final_bytes"] / 1e9
        line += f"{found['peak_in_final_models']:.2f} final models of {size:.2f} GB"
    return line + ("" if found["holds"] else "   does not hold")


def surroundings(options: argparse.Namespace) -> dict:
    """What a number means nothing without."""

    def git(*args: str) -> str:
        found = subprocess.run(
            ["git", *args], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
        return found.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", "../../src")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "moefold": version("moefold"),
        "cpu": next((m.split(":")[1].strip() for m in models if "model name" in m), ""),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "options": {k: v for k, v in vars(options).items() if k not in ("out", "one")},
    }


def main() -> None:
    """Parse the options, run every case in processes of its own, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this process; with --threads 1 it holds on a machine that is shared",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=200_000_000, help="bytes, where streamed")
    parser.add_argument("--out", type=Path, help=f"where to write; {RESULTS}/surgery-DATE.json")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "FOLDER", "WORK"), help="internal")
    options = parser.parse_args()
    if options.one:
        case, folder, work = options.one
        print(json.dumps(measure(Path(folder), Path(work), CASES[case], options)))
        return
    report = surroundings(options)
    rounds: dict[str, list[dict]] = {case: [] for case in CASES}
    passed = ("experts", "threads", "clock", "seed", "shard")
    settings = [text for n in passed for text in (f"--{n}", str(getattr(options, n)))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "dense"
        make_dense(folder, options.seed)
        for _ in range(options.rounds):
            for case in CASES:
                with tempfile.TemporaryDirectory(dir=place) as work:
                    command = [sys.executable, __file__, *settings, "--one", case, folder, work]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        sys.exit(f"{case}:\n{done.stderr}")
                    rounds[case].append(json.loads(done.stdout.splitlines()[-1]))
    report["results"] = [summary(case, found) for case, found in rounds.items()]
    report["load_after"] = os.getloadavg()
    print("\n".join(map(show, report["results"])))
    out = options.out or RESULTS / f"surgery-{report['date'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"load {report['load_before'][0]:.1f} to {report['load_after'][0]:.1f}; written to {out}")
    if not all(found["holds"] for found in report["results"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
