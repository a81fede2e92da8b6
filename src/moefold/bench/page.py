"""The page, made from results alone: the files that `moefold bench` wrote are all it needs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefold.bench.figures import growth, shares
from moefold.bench.words import (
    NOT_MEASURED,
    PARTS,
    Results,
    exponent,
    layers_of,
    machine,
    never_measured,
    number,
    refused,
    shape_text,
    spread,
    timed,
)
from moefold.evaluate.files import whole_file
from moefold.inspect.page import Page

Record = Mapping[str, Any]


def write_page(several: Sequence[Results], file: Path) -> None:
    """Write the page.

    Args:
        several: results, as `results.read_results` reads them.
        file: where; it is there whole or not at all.

    Raises:
        ValueError: there are no results.
    """
    if not several:
        raise ValueError("a page needs the results of at least one run")
    page = Page(
        "Mixtures of experts, timed",
        "One layer and whole models: ours, other people's, and the dense MLP that a mixture "
        "replaces. What does not compute the same values and gradients was not timed.",
    )
    _runs(page, several)
    _layers(page, several)
    _decode(page, several)
    _models(page, several)
    _scaling(page, several)
    _left_out(page, several)
    _method(page, several)
    with whole_file(file) as beside:
        page.write(beside)


def _runs(page: Page, several: Sequence[Results]) -> None:
    page.section("What ran where")
    rows = []
    for results in several:
        found, settings = results["surroundings"], results["settings"]
        before, after = found.get("load_before"), found.get("load_after")
        rows.append(
            [
                machine(results),
                found["date"].replace("T", " ").replace("+00:00", " UTC"),
                _commit(found),
                f"{settings['rounds']} after {settings['warmup']}",
                " to ".join(f"{one[0]:.1f}" for one in (before, after) if one) or "not known",
                "yes" if results.get("finished") else "no: it was stopped",
            ]
        )
    page.table(
        ["machine", "date", "commit", "rounds", "load", "finished"],
        rows,
        caption="Load: processes that wanted to run, before and after. One that is well above the "
        "number of threads means that others ran beside this.",
    )


def _commit(found: Mapping[str, Any]) -> str:
    if not found.get("commit"):
        return f"moefold {found['versions'].get('moefold', '')}"
    return found["commit"][:10] + ("\nwith changes" if found.get("uncommitted") else "")


def _layers(page: Page, several: Sequence[Results]) -> None:
    entries = list(layers_of(several))
    if not entries:
        return
    page.section(
        "Layers",
        "Share of the dense MLP's speed: its time divided by a layer's, in the same round. The "
        "dense MLP has as many active hidden numbers for each token, so at a share of 1 a mixture "
        "costs nothing.",
    )
    for results, entry in entries:
        page.subsection(f"{entry['shape']['name']}, {entry['dtype']}")
        page.text(
            f"{shape_text(entry['shape'])}. {machine(results)}. A square product of "
            f"{entry['product']['size']} runs at {number(entry['product']['gflops'][1])} GFLOP/s."
        )
        _one_layer(page, entry)


def _one_layer(page: Page, entry: Mapping[str, Any]) -> None:
    found = timed(entry["records"], "both_ms")
    page.figure(
        shares(
            [(r["variant"], r["both_of_dense"], r["kind"] == "ours") for r in found
             if "both_of_dense" in r],
            x_label="share of the dense MLP's speed, forward and backward",
        ),
        "Medians with quartiles over rounds.",
    )  # fmt: skip
    head = ["", *(f"{part}, ms" for part in PARTS), *(f"{part}, of dense" for part in PARTS)]
    page.table(
        [*head, "of the product", "ours is faster by", "memory, of dense", "error"],
        [_row(record) for record in found],
        caption="Below a median, its quartiles. Of the product: operations that had to be done "
        "over time, as a share of the rate of the square product. Memory: the peak of a training "
        "pass without the weights and gradients that the layer has beyond those of the dense MLP, "
        "as a share of the dense MLP's peak. Error: largest relative difference from the "
        "reference.",
    )
    notes = [r for r in found if "remark" in r or "not_compared" in r or r.get("rounds", 0) <= 3]
    for record in notes:
        said = [record.get("remark"), _rate_only(record)]
        if record["rounds"] <= 3:
            said.append(f"{record['rounds']} rounds only")
        page.text(f"{record['variant']}: {'; '.join(one for one in said if one)}.")
    _refused(page, entry["records"])


def _rate_only(record: Record) -> str | None:
    if "not_compared" not in record:
        return None
    return f"not compared, a rate of its own operations only: {record['not_compared']}"


def _row(record: Record) -> list[str]:
    memory = record.get("memory", {})
    return [
        record["variant"] + (f"\n{record['version']}" if record.get("version") else ""),
        *(spread(record[f"{part}_ms"]) for part in PARTS),
        *(_maybe(record, f"{part}_of_dense") for part in PARTS),
        spread(record["both_of_product"]),
        _maybe(record, "both_ours_faster"),
        f"{memory['of_dense']:.2f}" if memory else "",
        f"{record['error']:.1e}" if record.get("error") is not None else "",
    ]


def _maybe(record: Record, key: str) -> str:
    return spread(record[key]) if key in record else "not compared"


def _refused(page: Page, records: Sequence[Record]) -> None:
    left = refused(records)
    for record in left:
        if record.get("differs"):
            page.text(f"NOT TIMED, because it is wrong: {record['variant']}: {record['refused']}.")
    if left:
        page.details(
            f"{len(left)} not timed, and why",
            "\n".join(f"{record['variant']}: {record['refused']}" for record in left),
        )


def _decode(page: Page, several: Sequence[Results]) -> None:
    entries = [(r, entry) for r in several for entry in r.get("decode", ())]
    empty = [
        (results, entry, record)
        for results, entry in layers_of(several)
        for record in entry["records"]
        if "empty_us" in record
    ]
    if not entries and not empty:
        return
    page.section("Few tokens", "What a decoder does at every step, and a pass of no token at all.")
    if empty:
        page.table(
            ["no token", "training, forward, µs", "forward and backward, µs", "inference, µs"],
            [
                [
                    f"{entry['shape']['name']}, {entry['dtype']}\n{record['variant']}",
                    *(spread(record["empty_us"][k], 0) for k in ("forward", "both", "inference")),
                ]
                for _, entry, record in empty
            ],
            caption="The layer's own cost.",
        )
    for _, entry in entries:
        tokens = [point["tokens"] for point in entry["points"]]
        names = list(dict.fromkeys(
            r["variant"] for point in entry["points"] for r in timed(point["records"], "us")
        ))  # fmt: skip
        rows = []
        for name in names:
            found = [_of(point["records"], name) for point in entry["points"]]
            rows.append([name, *(spread(r["us"], 0) if r and "us" in r else "" for r in found)])
        page.subsection(f"{entry['shape']['name']}, {entry['dtype']}, inference")
        page.table(
            ["µs", *(f"{n} token{'s' if n > 1 else ''}" for n in tokens)],
            rows,
            caption="Below a median, its quartiles.",
        )
        _refused(page, entry["points"][0]["records"])


def _of(records: Sequence[Record], variant: str) -> Record | None:
    return next((record for record in records if record["variant"] == variant), None)


def _models(page: Page, several: Sequence[Results]) -> None:
    entries = [(r, entry) for r in several for entry in r.get("models", ())]
    if not entries:
        return
    page.section(
        "Whole models",
        "A sentence encoder in inference, dense and upcycled. The mixtures compute what the dense "
        "model computes: their experts are copies, with weights that add up to one.",
    )
    for _, entry in entries:
        title = f"{entry['model']}, {entry['dtype']}"
        page.subsection(title, f"{entry['batch']} texts of {entry['length']} tokens.")
        if "refused" in entry:
            page.text(f"Not measured: {entry['refused']}.")
            continue
        page.table(
            ["", "ms", "times the dense model's time", "times its operations", "error"],
            [
                [
                    r["variant"],
                    spread(r["ms"], 1),
                    spread(r["times_dense"]),
                    f"{r['flops_of_dense']:.2f}",
                    f"{r['error']:.1e}" if "error" in r else "",
                ]
                for r in timed(entry["records"], "ms")
            ],
            caption="Below a median, its quartiles.",
        )
        _refused(page, entry["records"])


def _scaling(page: Page, several: Sequence[Results]) -> None:
    curves = [curve for results in several for curve in results.get("scaling", ())]
    if not curves:
        return
    page.section(
        "How cost grows",
        "Each line has the exponent of the power law that fits its points best, with a 95 % "
        "interval from how far they are off it.",
    )
    for curve in curves:
        page.subsection(f"{curve['name']}, {curve['dtype']}")
        page.figure(growth(curve["lines"], x_label=curve["x"], y_label=curve["y"]), curve["y"])
        rows = []
        for name, line in curve["lines"].items():
            values = [v[1] for v in line["ms"]] if "ms" in line else line["mib"]
            rows.append([name, exponent(line.get("fit")), *(number(v) for v in values)])
        x = next(iter(curve["lines"].values()))["x"]
        page.table(["", "exponent", *(str(one) for one in x)], rows, caption=curve["y"])


def _left_out(page: Page, several: Sequence[Results]) -> None:
    left = never_measured(several)
    if not left:
        return
    page.section("Not measured")
    page.table(
        ["layer", "result", "why"],
        [
            [f"{one['shape']['name']}\n{shape_text(one['shape'])}", NOT_MEASURED, one["why"]]
            for one in left
        ],
    )


def _method(page: Page, several: Sequence[Results]) -> None:
    page.section(
        "How it was measured",
        "All variants run in every round, in an order that rotates, each round on other tokens. "
        "Numbers are medians with quartiles, of times and of ratios within a round. Before "
        "anything is timed, values and gradients are compared with the reference: a loop over "
        "experts, differentiated by autograd.",
    )
    for results in several:
        kept = {
            name: results[name]
            for name in ("surroundings", "settings", "model_settings", "scaling_settings")
            if name in results
        }
        page.details(
            f"{machine(results)}: versions and settings",
            json.dumps(kept, indent=1, ensure_ascii=False),
        )


__all__ = ["write_page"]
