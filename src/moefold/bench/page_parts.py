"""A part of results as a section of the page: layers, few tokens, whole models, growth."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from moefold.bench.columns import setting_text
from moefold.bench.figures import growth, shares
from moefold.bench.words import (
    Results,
    exponent,
    layers_of,
    number,
    processor_text,
    record_of,
    refused,
    setting_of,
    shape_text,
    spread,
    spread_numbers,
    timed,
)
from moefold.inspect.page import Page

Record = Mapping[str, Any]
Entry = Mapping[str, Any]
_FEW = 3  # rounds of a variant that is much slower than the dense MLP


def note(page: Page, text: str) -> None:
    """A remark below a table; a caption would be as wide as the table, and cut on a telephone."""
    page.raw(f'<p class="note">{escape(text)}</p>')


def title_of(several: Sequence[Results], results: Results, entry: Entry, name: str) -> str:
    """What an entry is of and how it was measured; the machine too if there are several."""
    title = f"{name}, {setting_text(setting_of(results, entry))}"
    machines = {processor_text(one) for one in several}
    return f"{title}, {processor_text(results)}" if len(machines) > 1 else title


def add_layers(page: Page, several: Sequence[Results]) -> None:
    """Every layer: a figure of shares, what else was measured, and who was not timed."""
    entries = list(layers_of(several))
    if not entries:
        return
    page.section(
        "Layers",
        "Forward and backward; below a median, its quartiles. Of dense: the dense MLP's time over "
        "a layer's, in the same round. The dense MLP has as many active hidden numbers for each "
        "token. Of the product: operations that had to be done over time, as a share of the rate "
        "of one square product in the same run. Error: the largest relative difference from the "
        "reference, of the result or a gradient.",
    )
    for results, entry in entries:
        size, rate = entry["product"]["size"], entry["product"]["gflops"][1]
        page.subsection(
            title_of(several, results, entry, entry["shape"]["name"]),
            f"{shape_text(entry['shape'])}. A square product of {size} runs at {number(rate)} "
            f"GFLOP/s.",
        )
        _one_layer(page, entry)


def _one_layer(page: Page, entry: Entry) -> None:
    found = timed(entry["records"], "both_ms")
    compared = [r for r in found if "both_of_dense" in r and r["kind"] != "dense"]
    if compared:
        page.figure(
            shares(
                [(r["variant"], r["both_of_dense"], r["kind"] == "ours") for r in compared],
                x_label="share of the dense MLP's speed, forward and backward",
                one="dense MLP",
            ),
            "Medians with quartiles over rounds.",
        )
    page.table(
        ["", "ms", "of dense", "ours, times as fast", "of the product", "memory, of dense"],
        [_row(record) for record in found],
    )
    for record in found:
        if said := _remarks(record):
            page.text(f"{record['variant']}: {'; '.join(said)}.")
    parts = ("forward", "backward")
    with _opening(page, "Forward and backward apart, rates and errors"):
        page.table(
            [
                "",
                *(f"{part}, ms" for part in parts),
                *(f"{part}, of dense" for part in parts),
                "GFLOP/s",
                "error",
            ],
            [
                [
                    record["variant"],
                    *(spread_numbers(record[f"{part}_ms"]) for part in parts),
                    *(_maybe(record, f"{part}_of_dense") for part in parts),
                    spread_numbers(record["both_gflops"]),
                    f"{record['error']:.1e}" if record.get("error") is not None else "",
                ]
                for record in found
            ],
        )
    _not_timed(page, entry["records"])


def _row(record: Record) -> list[str]:
    memory = record.get("memory")
    return [
        record["variant"] + (f"\n{record['version']}" if record.get("version") else ""),
        spread_numbers(record["both_ms"]),
        _maybe(record, "both_of_dense"),
        _maybe(record, "both_ours_faster"),
        spread(record["both_of_product"]),
        f"{memory['of_dense']:.2f}" if memory else "",
    ]


def _maybe(record: Record, key: str) -> str:
    return spread(record[key]) if key in record else "not compared"


def _remarks(record: Record) -> list[str]:
    said = [record["remark"]] if record.get("remark") else []
    if "not_compared" in record:
        said.append(f"not compared, a rate of its own operations only: {record['not_compared']}")
    if record["rounds"] <= _FEW:
        said.append(f"{record['rounds']} rounds only")
    return said


def _not_timed(page: Page, records: Sequence[Record]) -> None:
    left = refused(records)
    for record in left:
        if record.get("differs"):
            page.text(f"NOT TIMED, because it is wrong: {record['variant']}: {record['refused']}.")
    if left:
        with _opening(page, f"{len(left)} not timed, and why"):
            items = (f"{record['variant']}: {record['refused']}" for record in left)
            page.raw(f'<ul class="note">{"".join(f"<li>{escape(i)}</li>" for i in items)}</ul>')


@contextmanager
def _opening(page: Page, summary: str) -> Iterator[None]:
    """What is added meanwhile opens on a click."""
    page.raw(f"<details><summary>{escape(summary)}</summary>")
    yield
    page.raw("</details>")


def add_decode(page: Page, several: Sequence[Results]) -> None:
    """What a pass of few tokens costs, and one of none."""
    entries = [(r, entry) for r in several for entry in r.get("decode", ())]
    empty = [
        (results, entry, record)
        for results, entry in layers_of(several)
        for record in entry["records"]
        if "empty_us" in record
    ]
    if not entries and not empty:
        return
    page.section(
        "Few tokens",
        "What a decoder does at every step, and a pass of no token at all. Below a median, its "
        "quartiles.",
    )
    for results, entry in entries:
        tokens = [point["tokens"] for point in entry["points"]]
        names = list(dict.fromkeys(
            r["variant"] for point in entry["points"] for r in timed(point["records"], "us")
        ))  # fmt: skip
        rows = []
        for name in names:
            found = [record_of(point, name) for point in entry["points"]]
            rows.append(
                [name, *(spread_numbers(r["us"]) if r and "us" in r else "" for r in found)]
            )
        title = title_of(several, results, entry, entry["shape"]["name"])
        page.subsection(f"{title}, inference")
        page.table(["µs", *(f"{n} token{'s' if n > 1 else ''}" for n in tokens)], rows)
        _not_timed(page, entry["points"][0]["records"])
    if empty:
        page.subsection("No token", "What a layer costs before it has anything to do.")
        page.table(
            ["µs", "training, forward", "forward and backward", "inference"],
            [
                [
                    f"{title_of(several, results, entry, entry['shape']['name'])}"
                    f"\n{record['variant']}",
                    *(
                        spread_numbers(record["empty_us"][part])
                        for part in ("forward", "both", "inference")
                    ),
                ]
                for results, entry, record in empty
            ],
        )


def add_models(page: Page, several: Sequence[Results]) -> None:
    """Encoders, dense and upcycled."""
    entries = [(r, entry) for r in several for entry in r.get("models", ())]
    if not entries:
        return
    page.section(
        "Whole models",
        "A sentence encoder in inference, dense and upcycled. The mixtures compute what the dense "
        "model computes: their experts are copies, with weights that add up to one. Of dense: a "
        "multiple of the dense model's time or operations.",
    )
    for results, entry in entries:
        page.subsection(
            title_of(several, results, entry, entry["model"]),
            f"{entry['batch']} texts of {entry['length']} tokens.",
        )
        if "refused" in entry:
            page.text(f"Not measured: {entry['refused']}.")
            continue
        page.table(
            ["", "ms", "time, of dense", "operations, of dense", "error"],
            [
                [
                    r["variant"],
                    spread_numbers(r["ms"]),
                    spread(r["times_dense"]),
                    f"{r['flops_of_dense']:.2f}",
                    f"{r['error']:.1e}" if "error" in r else "",
                ]
                for r in timed(entry["records"], "ms")
            ],
        )
        _not_timed(page, entry["records"])


def add_scaling(page: Page, several: Sequence[Results]) -> None:
    """Curves: a figure and its points."""
    curves = [(results, curve) for results in several for curve in results.get("scaling", ())]
    if not curves:
        return
    page.section(
        "How cost grows",
        "Points are medians with quartiles; a dashed line is the power law that fits them best. "
        "Below an exponent is its 95 % interval, from how far the points are off that law.",
    )
    for results, curve in curves:
        page.subsection(title_of(several, results, curve, curve["name"]))
        page.raw(
            f"<figure>{growth(curve['lines'], x_label=curve['x'], y_label=curve['y'])}</figure>"
        )
        rows = []
        for name, line in curve["lines"].items():
            values = [v[1] for v in line["ms"]] if "ms" in line else line["mib"]
            rows.append([name, exponent(line.get("fit")), *(number(v) for v in values)])
        x = next(iter(curve["lines"].values()))["x"]
        page.table([curve["y"], "exponent", *(str(one) for one in x)], rows)
        note(page, f"Columns: {curve['x']}.")


__all__ = ["add_decode", "add_layers", "add_models", "add_scaling", "note", "title_of"]
