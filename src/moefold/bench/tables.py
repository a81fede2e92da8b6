"""The numbers of a README as tables in Markdown, made from results.

Every machine has tables of its own, and in them dtype and threads are told apart. Where several
results hold the same measurement of the same machine, the newest counts.
"""

from collections.abc import Callable, Mapping, Sequence

from moefold.bench.columns import (
    Entry,
    Found,
    Setting,
    markdown,
    order,
    setting_text,
    settings_of,
    threads_text,
    with_ends,
)
from moefold.bench.curve_tables import (
    MEMORY_MEANS,
    SCALING_MEANS,
    SOFT_MEANS,
    memory_table,
    scaling_table,
    soft_table,
)
from moefold.bench.variants import DENSE, OURS
from moefold.bench.words import (
    NOT_MEASURED,
    Results,
    best_peer,
    load_text,
    never_measured,
    number,
    processor_text,
    record_of,
    setting_of,
    shape_text,
)

_GROUPED, _EAGER = "transformers grouped_mm", "transformers eager"
_MEMORY = (
    "the peak of a training pass, less the weights and gradients beyond those of the dense MLP, "
    "as a share of the dense MLP's peak"
)
_AMP = "Amp: float32 under autocast to bfloat16."


def readme_tables(several: Mapping[str, Results]) -> dict[str, str]:
    """Tables by name; one there are no numbers for says so.

    Args:
        several: results, by what the table of runs calls them.

    Returns:
        `speed` (layers on a few lines), `layers` (with spread and peers), `decode`, `models`,
        `scaling` (exponents of times), `soft` (Soft MoE's inference by experts), `memory` (of
        training by experts of a token) and `runs` (what ran where).
    """
    results = sorted(several.values(), key=lambda one: one["surroundings"]["date"])
    left_out = _left_out(results)
    return {
        "speed": _made(results, "layers", _speed, [_SPEED_MEANS, *left_out[:1]]),
        "layers": _made(results, "layers", _layers, [_LAYERS_MEAN, *left_out]),
        "decode": _made(results, "decode", _decode, [_DECODE_MEANS]),
        "models": _made(results, "models", _models, [_MODELS_MEAN]),
        "scaling": _made(results, "scaling", scaling_table, [SCALING_MEANS]),
        "soft": _made(results, "scaling", soft_table, [SOFT_MEANS]),
        "memory": _made(results, "scaling", memory_table, [MEMORY_MEANS]),
        "runs": _runs(several),
    }


def _made(
    results: Sequence[Results],
    part: str,
    table: Callable[[Found], str],
    below: Sequence[str],
) -> str:
    """A table for each machine that measured this part, below its name, and what numbers mean."""
    machines: dict[str, dict[str, dict[Setting, Entry]]] = {}
    for one in results:
        for entry in one.get(part, ()):
            if "refused" not in entry:
                of = machines.setdefault(processor_text(one), {}).setdefault(_measured(entry), {})
                of[setting_of(one, entry)] = entry
    made = {machine: table(found) for machine, found in machines.items()}
    blocks = [f"{machine}:\n\n{text}" for machine, text in made.items() if text]
    return "\n\n".join([*blocks, *below]) if blocks else f"{NOT_MEASURED.capitalize()}."


def _measured(entry: Entry) -> str:
    """What an entry is of, whatever it was measured with."""
    if "shape" in entry:
        return shape_text(entry["shape"])
    if "model" in entry:
        return f"{entry['model']}, {entry['batch']} texts of {entry['length']} tokens"
    return entry["name"]


_SPEED_MEANS = (
    "A dense MLP's time, of the same active width, over the layer's, forward and backward: at 1 a "
    "mixture costs nothing. In brackets the fastest peer that could run. Memory: "
    + _MEMORY
    + ". "
    + _AMP
)


def _speed(found: Found) -> str:
    settings = settings_of(found)
    dtypes = list(dict.fromkeys(dtype for dtype, _ in settings))
    rows = []
    for layer, entries in found.items():
        rows.append(
            [
                layer,
                *(_share_and_peer(entries.get(one)) for one in settings),
                *(_most_memory(entries, dtype) for dtype in dtypes),
            ]
        )
    heads = ["layer", *map(setting_text, settings), *(f"memory, {dtype}" for dtype in dtypes)]
    return markdown(heads, rows)


def _share_and_peer(entry: Entry | None) -> str:
    if entry is None:
        return NOT_MEASURED
    mine, peer = _mine(entry), best_peer(entry)
    if mine is None:
        return "not timed"
    share = f"{mine['both_of_dense'][1]:.2f}"
    return f"{share} ({peer['both_of_dense'][1]:.2f} {peer['variant']})" if peer else share


def _most_memory(entries: Mapping[Setting, Entry], dtype: str) -> str:
    """Of all thread counts: each thread has memory of its own."""
    shares = (_memory_share(entry) for (own, _), entry in entries.items() if own == dtype)
    return max(shares, key=lambda share: float(share or 0), default="")


def _memory_share(entry: Entry | None) -> str:
    mine = entry and _mine(entry)
    return f"{mine['memory']['of_dense']:.2f}" if mine else ""


_LAYERS_MEAN = (
    "Forward and backward, as a share of the speed of a dense MLP of the same active width: "
    "medians over rounds, with quartiles. Over: how many times as fast as transformers' expert "
    "functions. Memory: " + _MEMORY + ". " + _AMP
)


def _layers(found: Found) -> str:
    rows = []
    for layer, entries in found.items():
        for setting in sorted(entries, key=order):
            entry = entries[setting]
            mine, peer = _mine(entry), best_peer(entry)
            rows.append(
                [
                    layer,
                    setting_text(setting),
                    with_ends(mine["both_of_dense"]) if mine else "not timed",
                    f"{peer['both_of_dense'][1]:.2f}, {peer['variant']}" if peer else "none ran",
                    _faster(entry, _GROUPED),
                    _faster(entry, _EAGER),
                    _memory_share(entry),
                ]
            )
    heads = ["layer", "", OURS, "best peer", "over `grouped_mm`", "over `eager`", "memory"]
    return markdown(heads, rows)


def _left_out(results: Sequence[Results]) -> list[str]:
    """That layers were not measured, and on a second line which."""
    left = never_measured(results)
    if not left:
        return []
    kinds = dict.fromkeys(one["shape"]["device"] for one in left)
    places = " or ".join({"cuda": "a GPU", "cpu": "a CPU"}[kind] for kind in kinds)
    names = "; ".join(shape_text(one["shape"]) for one in left)
    return [f"On {places}: {NOT_MEASURED}.", f"{NOT_MEASURED.capitalize()}: {names}."]


_DECODE_MEANS = "Median µs of an inference pass of one layer, by the number of tokens in it."


def _decode(found: Found) -> str:
    tokens = sorted(
        {point["tokens"] for entries in found.values() for e in entries.values()
         for point in e["points"]}
    )  # fmt: skip
    rows = []
    for layer, entries in found.items():
        layer = layer.rpartition(",")[0]  # without its tokens: here they are columns
        for setting in sorted(entries, key=order):
            points = {point["tokens"]: point for point in entries[setting]["points"]}
            for name, cell in (
                (OURS, lambda point: _us(record_of(point, OURS))),
                ("fastest peer", _fastest_peer),
                ("dense MLP", lambda point: _us(record_of(point, DENSE))),
            ):
                cells = [cell(points[n]) if n in points else "" for n in tokens]
                rows.append([layer, setting_text(setting), name, *cells])
    heads = ["layer", "", "", *(f"{n} token{'s' if n > 1 else ''}" for n in tokens)]
    return markdown(heads, rows)


def _us(record: Entry | None) -> str:
    return number(record["us"][1]) if record and "us" in record else "not timed"


def _fastest_peer(point: Entry) -> str:
    peers = [r for r in point["records"] if r["kind"] == "peer" and "us" in r]
    if not peers:
        return "none ran"
    best = min(peers, key=lambda record: record["us"][1])
    return f"{_us(best)}, {best['variant']}"


_MODELS_MEAN = (
    "A batch in inference, as a multiple of the dense encoder's time: medians over rounds, with "
    "quartiles. Every other MLP is a mixture of copies, which computes the same."
)


def _models(found: Found) -> str:
    settings = settings_of(found)
    rows = []
    for model, entries in found.items():
        variants = {
            record["variant"]: record
            for entry in entries.values()
            for record in entry["records"]
            if record["variant"] != DENSE
        }
        for variant, any_of in variants.items():
            cells = []
            for setting in settings:
                entry = entries.get(setting)
                record = entry and record_of(entry, variant)
                if record and "ms" in record:
                    cells.append(with_ends(record["times_dense"]))
                else:
                    cells.append("not timed" if record else NOT_MEASURED)
            rows.append([model, variant, *cells, f"{any_of['flops_of_dense']:.2f}"])
    heads = ["encoder", "mixture", *map(setting_text, settings), "operations"]
    return markdown(heads, rows) if rows else ""


def _runs(several: Mapping[str, Results]) -> str:
    if not several:
        return f"{NOT_MEASURED.capitalize()}."
    rows = []
    for name, results in several.items():
        where, settings = results["surroundings"], results["settings"]
        threads = "" if where.get("gpu") else threads_text(where["threads"])
        clock = {"cpu": "of the process", "wall": "on the wall"}[settings["clock"]]
        rows.append(
            [
                name,
                processor_text(results),
                ", ".join(filter(None, [*settings["dtypes"], threads])),
                clock,
                str(settings["rounds"]),
                load_text(results),
                (where.get("commit") or "")[:10] + (" changed" if where.get("uncommitted") else ""),
            ]
        )
    return "\n\n".join(
        [
            markdown(["results", "machine", "", "clock", "rounds", "load", "commit"], rows),
            "Load: processes that wanted to run, before and after. Well above the number of "
            "threads, others ran beside this.",
        ]
    )


def _mine(entry: Entry) -> Entry | None:
    mine = record_of(entry, OURS)
    return mine if mine and "both_of_dense" in mine else None


def _faster(entry: Entry, variant: str) -> str:
    record = record_of(entry, variant)
    if record is None or "both_ours_faster" not in record:
        return ""
    return f"{record['both_ours_faster'][1]:.2f}"


__all__ = ["readme_tables"]
