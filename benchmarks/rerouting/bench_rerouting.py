"""What unified competition costs: its choice, and a pretrained layer that it routes.

    python benchmarks/rerouting/bench_rerouting.py

Ratios, each a median over rounds in which the variants take turns:

- choice: the best pairs of one group of 4,096 tokens and 64 experts under one budget, against
  `torch.topk` of each token on the same scores. Ours breaks ties by index, which `topk` does not.
  The same with bounds on the experts of a token (1 to 12), on the tokens of an expert (1.25 times
  its share), on both, and by the rules that see no later token.
- layer: one layer of OLMoE's shape (width 2,048, 64 experts of 1,024, top 8) on one sequence,
  rerouted to `unified` at a budget of 8, against the untouched layer, and against the same layer
  with its own choice recorded. The weights are random, so loads are near to equal for both.
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
from transformers import OlmoeConfig, OlmoeModel

import moefold
from moefold.routers.inference import Known
from moefold.routers.sparse import Recipe, SparseRouter

RESULTS = Path(__file__).parents[1] / "results" / "local"


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant, by round; two rounds before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for turn in range(rounds + 2):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            variants[name]()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, object]]:
    """Median milliseconds, and quartiles of the ratio to the base in the same round."""
    found: dict[str, dict[str, object]] = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
        found[name] = {
            "ms": statistics.median(own) * 1e3,
            "ratio": statistics.quantiles(ratios, n=4),
        }
    return found


def bench_choice(rounds: int) -> dict[str, dict[str, object]]:
    """Time the choice alone."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4096, 64)
    tokens = {"min_experts": 1, "max_experts": 12}
    experts = {"capacity_factor": 1.25}
    base = "topk of each token"
    plain = scored(logits)[1]
    variants: dict[str, Callable[[], object]] = {base: lambda: torch.topk(plain, 8, dim=-1)}
    for name, settings in {
        "unified": {},
        "bounds of a token": tokens,
        "bounds of an expert": experts,
        "bounds of both": {**tokens, **experts},
    }.items():
        recipe, scores = scored(logits, **settings)
        variants[name] = lambda recipe=recipe, scores=scores: recipe.choice(scores, None, False)
    for rule in ("threshold", "prefix"):
        recipe, scores = scored(logits, inference=rule)
        assert recipe.inference is not None, "the router was built with a rule"
        state = recipe.inference.initial(recipe.choice, 64)
        if state is not None:  # the level that the group's own choice has on these scores
            state = scores.flatten().topk(8 * 4096).values[-1].reshape(state.shape)
        known = Known(
            scores=scores, mask=None, choice=recipe.choice, state=state, predicted=None, past=None
        )
        variants[rule] = lambda rule=recipe.inference, known=known: rule(known)
    return summary(interleaved(variants, rounds), base)


def scored(logits: torch.Tensor, **settings: Any) -> tuple[Recipe, torch.Tensor]:
    """The recipe of unified competition at a budget of 8, and what it makes of logits."""
    router = moefold.routers.build("unified", dim=8, num_experts=64, budget=8.0, **settings)
    assert isinstance(router, SparseRouter)
    return router.recipe, router.recipe.score(logits, None)


def bench_layer(tokens: int, rounds: int) -> dict[str, dict[str, object]]:
    """Time a layer of OLMoE's shape."""
    config = OlmoeConfig(num_hidden_layers=1, vocab_size=1000, pad_token_id=0, eos_token_id=1)
    models = {}
    for name in ("untouched", "token-choice", "unified"):
        torch.manual_seed(0)
        models[name] = OlmoeModel(config).eval()
        for parameter in models[name].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    moefold.reroute(models["token-choice"], "token-choice")
    moefold.reroute(models["unified"], moefold.routers.config("unified", budget=8.0))
    ids = torch.randint(1000, (1, tokens))

    def run(model: OlmoeModel) -> Callable[[], object]:
        return lambda: model(input_ids=ids, use_cache=False)

    with torch.no_grad():
        timed = interleaved({name: run(model) for name, model in models.items()}, rounds)
    return summary(timed, "untouched")


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the layer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
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
        "transformers": version("transformers"),
        "moefold": version("moefold"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "threads": options.threads,
        "tokens": options.tokens,
        "choice": bench_choice(4 * options.rounds),
        "layer": bench_layer(options.tokens, options.rounds),
    }
    for part in ("choice", "layer"):
        for name, found in report[part].items():
            low, middle, high = found["ratio"]
            print(
                f"{part:7} {name:20} {found['ms']:9.2f} ms  x{middle:.2f} [{low:.2f}, {high:.2f}]"
            )
    out = options.out or RESULTS / f"rerouting-{report['date'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
