"""The page, made from results alone: the files that `moefold bench` wrote are all it needs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefold.bench.page_parts import add_decode, add_layers, add_models, add_scaling, note, title_of
from moefold.bench.variants import OURS
from moefold.bench.words import (
    NOT_MEASURED,
    Results,
    best_peer,
    layers_of,
    load_text,
    machine,
    never_measured,
    record_of,
    shape_text,
    spread,
)
from moefold.evaluate.files import whole_file
from moefold.inspect.page import Page

# On a narrow screen a figure is moved sideways, as a table is: shrunk, nobody could read it. And
# what names a row is broken into lines, so that numbers are on the screen.
_STYLE = """<style>figure { overflow-x: auto; } svg.figure { min-width: 34rem; }
@media (max-width: 44rem) { tbody th { white-space: normal; min-width: 11rem; } }</style>"""


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
    page.raw(_STYLE)
    _glance(page, several)
    _runs(page, several)
    add_layers(page, several)
    add_decode(page, several)
    add_models(page, several)
    add_scaling(page, several)
    _left_out(page, several)
    _method(page, several)
    with whole_file(file) as beside:
        page.write(beside)


def _glance(page: Page, several: Sequence[Results]) -> None:
    """Every layer on a line, first of all: what most readers came for."""
    rows = [
        [f"{title_of(several, results, entry, entry['shape']['name'])}\n"
         f"{shape_text(entry['shape'])}", *_at_a_glance(entry)]
        for results, entry in layers_of(several)
    ]  # fmt: skip
    if not rows:
        return
    page.section(
        "At a glance",
        "How fast a layer is beside a dense MLP of the same active width, forward and backward: "
        "the dense MLP's time over the layer's. At 1 a mixture costs nothing.",
    )
    if left := never_measured(several):
        kinds = " or ".join(dict.fromkeys(one["shape"]["device"] for one in left))
        rows.append([f"{len(left)} more layers\nfor {kinds}", NOT_MEASURED, "", ""])
    page.table(["layer", "of dense", "fastest peer, of dense", "memory, of dense"], rows)
    note(
        page,
        "Below a median, its quartiles. Memory: the peak of a training pass without the weights "
        "and gradients that the layer has beyond those of the dense MLP, as a share of the dense "
        "MLP's peak.",
    )


def _at_a_glance(entry: Mapping[str, Any]) -> list[str]:
    mine, peer = record_of(entry, OURS), best_peer(entry)
    timed = mine if mine and "both_of_dense" in mine else None
    return [
        spread(timed["both_of_dense"]) if timed else "not timed",
        f"{peer['both_of_dense'][1]:.2f}\n{peer['variant']}" if peer else "none ran",
        f"{timed['memory']['of_dense']:.2f}" if timed else "",
    ]


def _runs(page: Page, several: Sequence[Results]) -> None:
    page.section("What ran where")
    rows = []
    for results in several:
        found, settings = results["surroundings"], results["settings"]
        date, _, clock = found["date"].partition("T")
        rows.append(
            [
                _machine(found),
                f"{date}\n{clock[:5]} UTC",
                _commit(found),
                f"{settings['rounds']}\nafter {settings['warmup']}",
                {"cpu": "of the process", "wall": "on the wall"}[settings["clock"]],
                load_text(results),
                "yes" if results.get("finished") else "no: it was stopped",
            ]
        )
    page.table(["machine", "date", "commit", "rounds", "clock", "load", "finished"], rows)
    note(
        page,
        "Load: processes that wanted to run, before and after. One that is well above the number "
        "of threads means that others ran beside this.",
    )


def _machine(found: Mapping[str, Any]) -> str:
    cores = "" if found.get("gpu") else f"{found['threads']} of {found['cores']} cores, "
    name = found.get("gpu") or f"{found['cpu']} ({found['capability']})"
    return f"{name}\n{cores}torch {found['versions']['torch']}"


def _commit(found: Mapping[str, Any]) -> str:
    if not found.get("commit"):
        return f"moefold {found['versions'].get('moefold', '')}"
    return found["commit"][:10] + ("\nwith changes" if found.get("uncommitted") else "")


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
