"""Time one MoE layer, forward and backward, against the dense MLP of the same active width.

    python benchmarks/layers/bench_layer.py      # d=512, f=1024, 2048 tokens, 8 experts, top-2
    python benchmarks/layers/bench_layer.py --experts 64 --k 8 --width 256

What is fair here, and how it is held:

- All variants run interleaved, in an order that rotates, on the same inputs. Ratios are medians of
  the ratios within a round, so that a machine that slows down slows down both sides.
- A variant that disagrees with the reference backend, in values or in any gradient, is not timed.
- Every round has other tokens. Experts then meet other numbers of rows, as in training; with fixed
  inputs, libraries that compile a product for every shape would look faster than they are.
- Tokens whose choice bfloat16 rounding could turn are left out of the inputs: peers route in the
  dtype of the layer, we in float32, and both must choose alike to be compared.
- Gradients are freed between runs, as `zero_grad()` does. The allocator is told to keep what is
  freed: otherwise glibc returns memory to the system, or not, depending on what another variant
  left behind, and getting 40 MB back page by page costs 20 ms (`--allocator default` to see it).

The dense MLP is the usual gated one, three `nn.Linear` without biases, of width `k * width`.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import moefold

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative error in the Frobenius norm, over sums of up to a few thousand products. fp32: 2^-24 of
# rounding grows with the square root of their number, to under 1e-5. bf16: values are rounded to
# 2^-9 at five places in a row, and a peer's router rounds its weights, which adds up to under 2e-2;
# a wrong expert for one token in 200 gives more than that.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
# A peer's logit in bf16 is off by 2^-8 of its size (they are below 4 here), on both sides of a gap.
SAFE_GAP = 2 * 4 * 2**-8
RESULTS = Path(__file__).parents[1] / "results" / "local"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The layer that is timed."""

    tokens: int = 2048
    dim: int = 512
    width: int = 1024
    experts: int = 8
    k: int = 2


class DenseMlp(nn.Module):
    """The yardstick."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to `x [batch, tokens, dim]`."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def our_layer(shape: Shape, backend: str) -> nn.Module:
    """Build moefold's layer, without the auxiliary loss that no other variant has."""
    router = moefold.routers.config("token-choice", k=shape.k, renormalize=True)
    config = moefold.MoEConfig(
        num_experts=shape.experts,
        expert_width=shape.width,
        router=router,
        gated=True,
        activation="silu",
        backend=backend,
        losses={},
    )
    return config.build(shape.dim)


def transformers_layer(shape: Shape, implementation: str) -> nn.Module:
    """Build OLMoE's block: the same function, with the experts implementation of that name."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    return OlmoeSparseMoeBlock(config)


VARIANTS: dict[str, Callable[[Shape], nn.Module]] = {
    "moefold": lambda shape: our_layer(shape, "auto"),
    "moefold grouped": lambda shape: our_layer(shape, "grouped"),
    "moefold reference": lambda shape: our_layer(shape, "reference"),
    "transformers grouped_mm": lambda shape: transformers_layer(shape, "grouped_mm"),
    "transformers eager": lambda shape: transformers_layer(shape, "eager"),
}


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    """Return the parameters under our names: transformers calls the router a gate."""
    return {name.replace("gate.", "router."): p for name, p in layer.named_parameters()}


def draw_inputs(shape: Shape, router: Tensor, rounds: int, dtype: torch.dtype) -> list[Tensor]:
    """Draw tokens whose top k survives rounding, `rounds` times `[1, tokens, dim]`."""
    inputs = []
    for _ in range(rounds):
        pool = torch.randn(4 * shape.tokens, shape.dim).to(dtype)
        best = (pool.float() @ router.float().t()).sort(dim=-1, descending=True).values
        clear = shape.k == shape.experts or best[:, shape.k - 1] - best[:, shape.k] > SAFE_GAP
        kept = pool[clear][: shape.tokens]
        if len(kept) < shape.tokens:
            raise ValueError(
                f"only {len(kept)} of {len(pool)} tokens choose clearly; use fewer experts"
            )
        inputs.append(kept.unsqueeze(0).requires_grad_())
    return inputs


def outcome(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return value and gradients of one pass."""
    y = layer(x)
    of = parameters(layer)
    grads = torch.autograd.grad(y, [x, *of.values()], grad)
    return {"y": y.detach(), "x": grads[0], **dict(zip(of, grads[1:], strict=True))}


def disagreement(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error and where it is."""
    errors = {
        name: ((found[name].double() - t.double()).norm() / t.double().norm()).item()
        for name, t in wanted.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def timed(
    layer: nn.Module, x: Tensor, grad: Tensor, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return seconds of forward, and of forward and backward."""
    layer.zero_grad()
    x.grad = None
    start = clock()
    y = layer(x)
    middle = clock()
    y.backward(grad)
    return middle - start, clock() - start


def run(shape: Shape, dtype_name: str, options: argparse.Namespace) -> list[dict]:
    """Check every variant, time those that agree, and return one record each."""
    torch.manual_seed(options.seed)
    dtype = DTYPES[dtype_name]
    master = our_layer(shape, "reference").to(dtype)
    with torch.no_grad():  # logits of unit size, so that gaps are wide
        router = parameters(master)["router.weight"].normal_(std=shape.dim**-0.5)
    inputs = draw_inputs(shape, router, options.rounds + options.warmup, dtype)
    grad = torch.randn_like(inputs[0])
    wanted = outcome(master, inputs[0], grad)

    layers: dict[str, nn.Module] = {"dense": DenseMlp(shape.dim, shape.k * shape.width).to(dtype)}
    records = [{"variant": "dense", "dtype": dtype_name}]
    for name, build in VARIANTS.items():
        if options.only and name not in options.only:
            continue
        record: dict = {"variant": name, "dtype": dtype_name}
        records.append(record)
        try:
            layer = build(shape).to(dtype)
        except ImportError as error:
            record["refused"] = str(error)
            continue
        with torch.no_grad():
            for key, parameter in parameters(layer).items():
                parameter.copy_(parameters(master)[key])
        record["error"], record["error_in"] = disagreement(outcome(layer, inputs[0], grad), wanted)
        if record["error"] > TOLERANCE[dtype_name]:
            record["refused"] = f"differs from the reference by {record['error']:.1e}, not timed"
            continue
        layers[name] = layer

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    seconds = {name: [] for name in layers}
    order = list(layers)
    for turn, x in enumerate(inputs):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            both = timed(layers[name], x, grad, clock)
            if turn >= options.warmup:
                seconds[name].append(both)
    for record in records:
        if record["variant"] in layers:
            record.update(summary(seconds[record["variant"]], seconds["dense"]))
    return records


def summary(own: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict:
    """Describe the rounds of one variant: medians with quartiles, in ms and as ratios."""
    result = {}
    for part, index in (("forward", 0), ("both", 1)):
        times = [seconds[index] * 1e3 for seconds in own]
        ratios = [a[index] / b[index] for a, b in zip(own, dense, strict=True)]
        result[f"{part}_ms"] = statistics.quantiles(times, n=4)
        result[f"{part}_ms_least"] = min(times)
        result[f"{part}_ratio"] = statistics.quantiles(ratios, n=4)
    return result


def surroundings(options: argparse.Namespace, shape: Shape) -> dict:
    """Return what a number means nothing without."""

    def git(*args: str) -> str:
        found = subprocess.run(
            ["git", *args], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
        return found.stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")
    models = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in models if "model name" in line), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--", "../../src")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "moefold": version("moefold"),
        "cpu": model or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        "shape": asdict(shape),
        "options": {k: v for k, v in vars(options).items() if k != "out"},
    }


def show(record: dict) -> str:
    """Return one line of the printed table."""
    name = f"{record['dtype']}  {record['variant']:26}"
    if "both_ms" not in record:
        return f"{name} {record['refused']}"
    parts = []
    for part in ("forward", "both"):
        low, middle, high = record[f"{part}_ratio"]
        ms = record[f"{part}_ms"][1]
        parts.append(f"{part} {ms:8.1f} ms  x{middle:5.3f} [{low:5.3f}, {high:5.3f}]")
    return f"{name} {'   '.join(parts)}"


def keep_freed_memory() -> None:
    """Let glibc serve every size from its heap, and never shrink it."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1)):
        raise OSError("this allocator cannot be told to keep memory; use --allocator default")


def main() -> None:
    """Parse the options, run, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, help="variants beside dense")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of this process; with --threads 1 it holds on a machine that is shared",
    )
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep")
    parser.add_argument("--out", type=Path, help=f"where to write; {RESULTS}/layer-DATE.json")
    options = parser.parse_args()
    if options.allocator == "keep":
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    report = surroundings(options, shape)
    report["results"] = []
    for dtype_name in options.dtypes:
        for record in run(shape, dtype_name, options):
            report["results"].append(record)
            print(show(record), flush=True)
    report["load_after"] = os.getloadavg()
    out = options.out or RESULTS / f"layer-{report['date'].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"load {report['load_before'][0]:.1f} to {report['load_after'][0]:.1f}; written to {out}")
    if any("refused" in record for record in report["results"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
