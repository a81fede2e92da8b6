"""From `results.json` to tables and a plot; no number comes from anywhere else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.better_answer.settings import ARMS, POOLS
from studies.tables import into_readme, table

Results = Mapping[str, Any]
PLOT = "results.png"
MAIN = POOLS[0]
WAY_NAMES = {
    "baselines": "nothing",
    "transfer": "AlpacaEval",
    "others": "the other sets",
    "within": "all sets, other pairs",
}
_MINUS = "\N{MINUS SIGN}"
_GREY, _BLUE, _ORANGE = "#555555", "#0072B2", "#D55E00"


def tables(results: Results) -> dict[str, str]:
    """Every table in Markdown, by the name of its mark."""
    return {
        "data": _data(results),
        "writers": _writers(results),
        "alpaca": _alpaca(results),
        "contrasts": _contrasts(results),
        "pools": _pools(results),
        "llmbar": _llmbar(results),
        "chosen": _chosen(results),
    }


def _data(results: Results) -> str:
    data, settings, machine = results["data"], results["settings"], results["machine"]
    rows = [
        ("AlpacaEval", f"{data['prompts']:,} prompts, {data['answers']:,} answers"),
        ("LLMBar", f"{data['pairs']:,} pairs"),
        ("prompts in both", f"{data['in_both']}, left out of what is taken to LLMBar"),
        ("texts encoded", f"{data['texts']:,}"),
        ("folds", str(settings["folds"])),
        ("seeds", str(len(settings["seeds"]))),
        ("passes", str(settings["epochs"])),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores"),
        ("versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())),
    ]
    return table(("", ""), rows)


def _writers(results: Results) -> str:
    rows = [
        (name, f"{score:.3f}") for name, score in results["data"]["mean_score_of_writer"].items()
    ]
    return table(("writer", "mean score"), rows)


def _alpaca(results: Results) -> str:
    judged = results["judged"][MAIN]
    rows = [_row(name, "", found) for name, found in judged["baselines"].items()]
    rows += [_row(arm, described(arm), found) for arm, found in judged[MAIN].items()]
    heads = (
        *("chosen by", "net, loss, given"),
        *("agreement", "score of the choice", "of the gain"),
        *("clear pairs", "of similar length", "picks the longest"),
    )
    gain = judged["best"]["mean"] - (low := judged["baselines"]["chance"]["worth"]["mean"])
    shares = [
        100 * (found["worth"]["mean"] - low) / gain
        for part in (judged["baselines"], judged[MAIN])
        for found in part.values()
    ]
    full = [
        (*row[:4], f"{share:.0f} %".replace("-", _MINUS), *row[4:])
        for row, share in zip(rows, shares, strict=True)
    ]
    best = ("the judge itself", "", "100", f"{judged['best']['mean']:.3f}", "100 %", "100", "100")
    return table(heads, [*full, (*best, "")])


def described(arm: str) -> str:
    """What an arm is, in few words."""
    how = ARMS[arm]
    loss = how.loss + (" by score" if how.loss_settings.get("by_utility") else "")
    return f"{how.net}, {loss}, {how.features}"


def _row(name: str, what: str, found: Results) -> tuple[str, ...]:
    return (
        name,
        what,
        percent(found["agreement"]),
        number(found["worth"]),
        percent(found["pairs"]),
        percent(found["similar"]),
        f"{100 * found['longest']['mean']:.0f}",
    )


def _contrasts(results: Results) -> str:
    rows = [
        (
            one["name"],
            percent(one["agreement"], "+.1f"),
            number(one["worth"], "+.3f"),
            percent(one["similar"], "+.1f"),
        )
        for one in results["contrasts"]
    ]
    heads = ("difference", "agreement", "score of the choice", "pairs of similar length")
    return table(heads, rows)


def _pools(results: Results) -> str:
    rows = []
    for pool in POOLS:
        judged = results["judged"][pool]
        for taught, found in {"": judged["baselines"], **{p: judged[p] for p in POOLS}}.items():
            for arm, one in found.items():
                if arm in _SHOWN:
                    cells = (percent(one["agreement"]), number(one["worth"]))
                    rows.append((pool, taught or "nothing", arm, *cells, percent(one["similar"])))
        rows.append((pool, "", "the judge itself", "100", f"{judged['best']['mean']:.3f}", "100"))
    heads = (
        *("choice among", "learnt from", "chosen by"),
        *("agreement", "score of the choice", "pairs of similar length"),
    )
    return table(heads, rows)


_SHOWN = ("chance", "longest", "by writer", "length alone", "pairs by score", "mlp")


def _llmbar(results: Results) -> str:
    found = results["llmbar"]
    sets = list(next(iter(found["baselines"].values())))
    rows = [
        (arm, WAY_NAMES[way], *(percent(one[name]) for name in sets))
        for way, arms in found.items()
        for arm, one in arms.items()
    ]
    counts = next(iter(found["baselines"].values()))
    heads = ("chosen by", "learnt from", *(f"{name} ({counts[name]['groups']})" for name in sets))
    return table(heads, rows)


def _chosen(results: Results) -> str:
    tried = [f"{rate:g}, {decay:g}" for rate, decay in results["settings"]["tried"]]
    rows = [
        (way, arm, *(str(count.get(one, 0)) for one in tried))
        for way, arms in results["chosen"].items()
        for arm, count in arms.items()
    ]
    return table(("learnt from", "arm", *tried), rows)


def percent(found: Results, form: str = ".1f") -> str:
    """A share with its interval, times 100; "none" where there is nothing to say."""
    return _with_interval(found, form, 100)


def number(found: Results, form: str = ".3f") -> str:
    """A value with its interval."""
    return _with_interval(found, form, 1)


def _with_interval(found: Results, form: str, times: float) -> str:
    if found["mean"] is None:
        return "none"
    mean, low, high = (f"{times * found[end]:{form}}" for end in ("mean", "low", "high"))
    text = mean if found["low"] == found["high"] else f"{mean} ({low} to {high})"
    return text.replace("-", _MINUS)


def publish(results: Results, folder: Path) -> None:
    """Writes the tables into a folder's README and the plot beside it."""
    into_readme(tables(results), folder / "README.md")
    write_plot(results, folder / PLOT)


def write_plot(results: Results, path: Path) -> None:
    """The score of what is chosen, by way of choosing; and accuracy on LLMBar by set."""
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _plot_alpaca(left, results["judged"][MAIN])
    _plot_llmbar(right, results["llmbar"])
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _plot_alpaca(axes: Any, judged: Results) -> None:
    rows = [(name, found, _GREY, "s") for name, found in judged["baselines"].items()]
    for arm, found in judged[MAIN].items():
        absolute = ARMS[arm].loss.startswith("answer-")
        rows.append((arm, found, _ORANGE if absolute else _BLUE, "^" if absolute else "o"))
    for place, (_, found, colour, marker) in enumerate(rows):
        _point(axes, found["worth"], place, colour, marker, across=False)
    axes.axvline(judged["best"]["mean"], color="0.6", ls="--", lw=1)
    axes.text(judged["best"]["mean"], -0.8, "best of 15 ", ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -1.4)
    axes.set_xlabel("mean score of the chosen answer (0 to 1, 95 % intervals)")
    axes.set_title(
        "AlpacaEval, one of 15 answers\n"
        "squares: nothing read or learnt by texts, circles: comparing, triangles: one by one",
        fontsize=9,
    )


def _plot_llmbar(axes: Any, found: Results) -> None:
    shown = [
        ("longest", "baselines", _GREY, "s"),
        ("length alone", "transfer", "#E69F00", "D"),
        ("pairs by score", "transfer", _BLUE, "o"),
        ("pairs by score", "others", "#009E73", "v"),
        ("pairs by score", "within", "#CC79A7", "^"),
    ]
    shown = [one for one in shown if one[0] in found[one[1]]]
    sets = list(next(iter(found["baselines"].values())))
    for number_, (arm, way, colour, marker) in enumerate(shown):
        for place, name in enumerate(sets):
            at = place + 0.15 * (number_ - (len(shown) - 1) / 2)
            label = f"{arm}; learnt from {WAY_NAMES[way]}" if place == 0 else None
            _point(axes, found[way][arm][name], at, colour, marker, across=True, label=label)
    axes.axhline(0.5, color="0.6", ls="--", lw=1)
    counts = next(iter(found["baselines"].values()))
    axes.set_xticks(
        range(len(sets)), [f"{one}\n{counts[one]['groups']}" for one in sets], fontsize=9
    )
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy (95 % intervals; dashed: chance)")
    axes.set_title("LLMBar, pairs judged by people", fontsize=9)
    axes.legend(fontsize=8, loc="upper right")


def _point(
    axes: Any,
    found: Results,
    place: float,
    colour: str,
    marker: str,
    *,
    across: bool,
    label: str | None = None,
) -> None:
    mean, low, high = (found[end] for end in ("mean", "low", "high"))
    if mean is None:
        return
    bars = [[mean - low], [high - mean]]
    x, y, kind = (place, mean, "yerr") if across else (mean, place, "xerr")
    style = {"fmt": marker, "color": colour, "capsize": 3, "ms": 5, "label": label}
    axes.errorbar(x, y, **{kind: bars}, **style)
