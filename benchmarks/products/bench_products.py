"""Products with the few rows of an expert: compiled code beside `torch.mm`, by number of rows.

    python -m benchmarks.products.bench_products --output benchmarks/results/products-CPU.json

One thread. Every matrix is another one, as in a layer, so that none is in cache. Interleaved in
random order, medians; rates in GFLOP/s. The three products of a linear layer:

    layer     x @ w.T      [rows, in] by a matrix that lies as [out, in]
    of input  g @ w        [rows, out] by the same matrix
    of matrix g.T @ x      [out, rows] by [rows, in]

Shapes: `rows in` and `out in`.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moefold.bench.results import load, surroundings, write_results
from moefold.ops.cpu import products
from moefold.ops.cpu.compiled import library

SIZES = ((768, 3072), (512, 1024), (512, 256))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512, 2048)
MATRICES = 48 << 20
"""Numbers of the matrices that are multiplied in turn: more than any cache holds."""

KINDS = ("layer", "of input", "of matrix")


def measure(rows: int, width_in: int, width_out: int, rounds: int) -> list[dict[str, Any]]:
    """Rates of the three products, by torch and by compiled code."""
    number = max(2, min(64, MATRICES // (4 * width_in * width_out)))
    matrices = torch.randn(number, width_out, width_in)
    x, grad = torch.randn(rows, width_in), torch.randn(rows, width_out)
    out, of_input, of_matrix = grad.clone(), x.clone(), torch.empty_like(matrices)
    room = products.make_room()
    assert room is not None, library()

    def by_torch(kind: str, i: int) -> None:
        if kind == "layer":
            torch.mm(x, matrices[i].t(), out=out)
        elif kind == "of input":
            torch.mm(grad, matrices[i], out=of_input)
        else:
            torch.mm(grad.t(), x, out=of_matrix[i])

    def compiled(kind: str, i: int) -> None:
        if kind == "layer":
            products.product(x, matrices[i].t(), out, room)
        elif kind == "of input":
            products.product(grad, matrices[i], of_input, room)
        else:
            products.sums(grad, x, of_matrix[i], room)

    ways: dict[str, Callable[[str, int], None]] = {"torch": by_torch, "compiled": compiled}
    runs = [(kind, way) for kind in KINDS for way in ways]
    took: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for counted in [False] + [True] * rounds:
        random.shuffle(runs)
        for kind, way in runs:
            start = time.perf_counter()
            for i in range(number):
                ways[way](kind, i)
            if counted:
                took[kind, way].append(time.perf_counter() - start)
    flops = 2e-9 * rows * width_in * width_out * number
    return [
        {"rows": rows, "in": width_in, "out": width_out, "product": kind}
        | {way: flops / median(took[kind, way]) for way in ways}
        for kind in KINDS
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Rates of compiled code and of torch in GFLOP/s, by number of rows, as Markdown."""
    counts = sorted({r["rows"] for r in records})
    lines = [
        "| matrix | product | " + " | ".join(f"{rows} rows" for rows in counts) + " |",
        "| --- | --- |" + " --- |" * len(counts),
    ]
    for of in dict.fromkeys((r["in"], r["out"], r["product"]) for r in records):
        own = {r["rows"]: r for r in records if (r["in"], r["out"], r["product"]) == of}
        rates = (own[rows] for rows in counts)
        cells = (f"{r['compiled']:.0f} / {r['torch']:.0f}" for r in rates)
        lines.append(f"| {of[0]} to {of[1]} | {of[2]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all sizes and write them."""
    parser = argparse.ArgumentParser(
        description="Products with few rows: compiled code beside torch.mm."
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {"kind": "compiled products", "surroundings": surroundings("cpu")}
    records: list[dict[str, Any]] = []
    for width_in, width_out in SIZES:
        for rows in ROWS:
            records += measure(rows, width_in, width_out, asked.rounds)
            print("\n".join(table(records[-len(KINDS) :]).splitlines()[2:]), flush=True)
    found |= {"rounds": asked.rounds, "records": records, "load_after": load()}
    write_results(found, asked.output)
    print(table(records))


if __name__ == "__main__":
    main()
