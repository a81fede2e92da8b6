"""From `results.json` to tables and a plot; no number comes from anywhere else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.tables import into_readme, table

Results = Mapping[str, Any]
PLOT = "results.png"
_COLOURS = {"pair": "#0072b2", "list": "#009e73", "regression": "#d55e00"}
"""Of Okabe and Ito, whom colour-blind people can tell apart."""
_PHASE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")


def tables(results: Results) -> dict[str, str]:
    """Every table in Markdown, by the name of its mark."""
    return {
        "setting": _setting(results),
        "methods": _methods(results),
        "sizes": _sizes(results),
        "experts": _experts(results),
        "phases": _phases(results),
        "people": _people(results),
        "strongest": _strongest(results),
    }


def _setting(results: Results) -> str:
    settings = results["settings"]
    largest = max(results["methods"], key=lambda row: row["games"])
    rows = [
        (
            "learnt from",
            f"{largest['games']:,} games of gnubg-nn 0-ply against itself, {largest['passes']} "
            f"passes, {_thousands(largest['decisions'])} decisions; other games for each seed",
        ),
        (
            "judged by",
            f"{settings['test']:,} other games; {2 * settings['pairs']:,} games against "
            "PubEval, each dice sequence twice with sides swapped",
        ),
        (
            "net",
            f"196 inputs, {settings['hidden']} hidden units (tanh), one output: "
            f"{largest['parameters']:,} parameters",
        ),
        (
            "learning rate",
            "of each method the best of "
            + ", ".join(f"{rate:g}" for rate in settings["rates"])
            + f" on {settings['tuning'][2]} games of their own",
        ),
        ("seeds", str(len(settings["seeds"]))),
        ("machine", f"{results['machine']['cpu']}, {results['machine']['cores']} cores"),
        ("versions", ", ".join(f"{name} {number}" for name, number in results["versions"].items())),
    ]
    return table(("", ""), rows)


def _methods(results: Results) -> str:
    arms = results["arms"]
    rows = [
        (
            f"`{row['arm']}`: {arms[row['arm']]['says']}",
            "equities" if arms[row["arm"]]["by_equity"] else "choices",
            *_worth(row),
            _difference(row, "points"),
        )
        for row in results["methods"]
    ]
    return table(("learns", "from", *_WORTH, "points against `regression`"), rows)


def _sizes(results: Results) -> str:
    rows = [
        (
            f"{row['games']:,}",
            _thousands(row["decisions"]),
            str(row["passes"]),
            f"`{row['arm']}`",
            *_worth(row),
            _difference(row, "points"),
        )
        for row in results["sizes"]
    ]
    heads = ("games", "decisions", "passes", "learns", *_WORTH, "points against `regression`")
    return table(heads, rows)


def _experts(results: Results) -> str:
    rows = [
        (
            results["arms"][row["arm"]]["says"] if row["arm"] != "list" else "one net",
            str(row["hidden"]),
            f"{row['parameters']:,}",
            *_worth(row),
            _difference(row, "points"),
        )
        for row in results["experts"]
    ]
    heads = ("scorer", "hidden units of each", "parameters", *_WORTH, "points against one net")
    return table(heads, rows)


def _phases(results: Results) -> str:
    """Who is chosen in which kind of position: the experts of each seed, the busiest first."""
    rows = []
    for row in results["experts"]:
        for seed, found in zip(row["seeds"], row.get("phases", ()), strict=False):
            experts = len(next(iter(found["load"].values())))
            rows += [
                (
                    results["arms"][row["arm"]]["says"] if expert == 0 else "",
                    str(seed) if expert == 0 else "",
                    f"{expert}",
                    *(f"{100 * load[expert]:.0f} %" for load in found["load"].values()),
                    f"{found['information']:.2f}" if expert == 0 else "",
                )
                for expert in range(experts)
            ]
    kinds = list(_first_phases(results)["load"])
    return table(("scorer", "seed", "expert", *kinds, "information"), rows)


def _people(results: Results) -> str:
    rows = []
    for row in results["people"]:
        shares = {
            key: [one[key]["mean"] for one in row["people"] if one[key] is not None]
            for key in ("human", "human_unseen", "engine", "people")
        }
        rows.append(
            (
                f"`{row['arm']}`",
                str(row["hidden"]),
                *(_spread(shares[key], ".3f") for key in shares),
                _interval(row["points"]),
            )
        )
    heads = (
        "learns",
        "hidden",
        "as the people",
        "in positions not seen",
        "as the engine",
        "people as the engine",
        "points per game",
    )
    return table(heads, rows)


def _strongest(results: Results) -> str:
    row, arms = results["strongest"], results["arms"]
    stages = [row["after"], row]
    minutes = (row["after"]["cpu_seconds"] + row["cpu_seconds"][0]) / 60
    rows = [
        (
            "learns",
            "; then ".join(
                f"{stage['passes']} passes `{stage['arm']}`: {arms[stage['arm']]['says']}, rate "
                f"{stage['rate']:g}"
                for stage in stages
            ),
        ),
        ("from", f"{row['games']:,} games, {_thousands(row['decisions'])} decisions"),
        ("hidden units", str(row["hidden"])),
        ("CPU time of training", f"{minutes:.0f} minutes, one core"),
        ("agreement, regret", f"{row['agreement']['mean']:.3f}, {row['regret']['mean']:.4f}"),
        *(
            (f"{name}, {match['games']:,} games", _interval(match["points"]))
            for name, match in row["matches"].items()
        ),
    ]
    return table(("", ""), rows)


_WORTH = ("agreement", "regret", "points per game against PubEval")


def _worth(row: Results) -> tuple[str, ...]:
    return (
        f"{row['agreement']['mean']:.3f} ({_spread(row['agreement_of_seeds'], '.3f')})",
        f"{row['regret']['mean']:.4f}",
        _interval(row["points"]),
    )


def _difference(row: Results, what: str) -> str:
    return _interval(row["against"][what]) if "against" in row else ""


def _interval(found: Mapping[str, float]) -> str:
    mean, low, high = (f"{found[end]:+.3f}" for end in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def _spread(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _thousands(values: Sequence[int]) -> str:
    return _spread(values, ",")


def _first_phases(results: Results) -> Results:
    return next(row["phases"][0] for row in results["experts"] if "phases" in row)


def publish(results: Results, folder: Path) -> None:
    """Writes the tables into a folder's README and the plot beside it."""
    into_readme(tables(results), folder / "README.md")
    write_plot(results, folder / PLOT)


def write_plot(results: Results, path: Path) -> None:
    """Points by method and by games, and which experts are chosen in which phase."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    methods, sizes, phases = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.3))
    _plot_methods(methods, results)
    _plot_sizes(sizes, results)
    _plot_phases(phases, results)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _plot_methods(axes: Any, results: Results) -> None:
    rows = sorted(results["methods"], key=lambda row: row["points"]["mean"])
    for place, row in enumerate(rows):
        mean, low, high = (row["points"][end] for end in ("mean", "low", "high"))
        absolute = results["arms"][row["arm"]]["absolute"]
        colour = _COLOURS["regression" if absolute else "pair"]
        axes.errorbar(
            mean,
            place,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=colour,
            capsize=3,
            mfc="white" if absolute else colour,
        )
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.axvline(0, color="0.7", lw=0.8)
    axes.set_xlabel("points per game against PubEval")
    axes.set_title(
        f"{rows[0]['games']:,} games, {results['settings']['hidden']} hidden units "
        "(hollow: absolute)",
        fontsize=9,
    )


def _plot_sizes(axes: Any, results: Results) -> None:
    games = sorted({row["games"] for row in results["sizes"]})
    for arm, colour in _COLOURS.items():
        own = sorted((r for r in results["sizes"] if r["arm"] == arm), key=lambda r: r["games"])
        mean, low, high = ([row["points"][end] for row in own] for end in ("mean", "low", "high"))
        axes.plot(games, mean, "o-", color=colour, label=arm, lw=1.5)
        axes.fill_between(games, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(games, [f"{count:,}" for count in games], minor=False)
    axes.minorticks_off()
    axes.axhline(0, color="0.7", lw=0.8)
    axes.set_xlabel("games to learn from")
    axes.set_ylabel("points per game against PubEval")
    axes.legend(frameon=False)


def _plot_phases(axes: Any, results: Results) -> None:
    """A bar for each kind of position and net, of the first seed, divided among experts."""
    bars: list[tuple[str, list[float]]] = []
    for row in results["experts"]:
        for found in row.get("phases", ())[:1]:
            bars += [(f"{row['arm']}: {kind}", load) for kind, load in found["load"].items()]
    for place, (_, load) in enumerate(bars):
        left = 0.0
        for expert, share in enumerate(load):
            axes.barh(place, share, left=left, color=_PHASE_COLOURS[expert % 4], ec="white")
            left += share
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the plays that each expert has")
    axes.set_title("which phases the experts find, first seed", fontsize=9)
