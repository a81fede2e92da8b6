"""Tables in Markdown, made from results that are written here by hand."""

from dataclasses import replace

import pytest

from moefold.bench.shapes import SHAPES
from moefold.bench.tables import readme_tables
from tests.bench.by_hand import layer, mine, results, timed
from tests.bench.common import EXPERTS, TOKENS

TOKENS_TEXT = "4 gated experts of 16 x 24, top-2"
EXPERTS_TEXT = "4 plain experts of 16 x 24, expert choice, C=1, 48 tokens"


def body(text):
    """Rows of all tables, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    return [line for i, line in enumerate(lines) if i not in rules and i + 1 not in rules]


def heads(text):
    lines = text.splitlines()
    return [lines[i - 1] for i, line in enumerate(lines) if line.startswith("| ---")]


PEERS = [timed("eager", 0.5), timed("grouped", 0.81), {"variant": "x", "kind": "peer"}]


def test_settings_of_one_machine_stand_side_by_side():
    two = layer(TOKENS, "fp32", mine(0.7, memory=1.25))
    made = readme_tables(
        {
            "b": results(layers=[two], threads=2),
            "a": results(
                layers=[
                    layer(TOKENS, "bf16", mine(0.6, memory=1.1)),
                    layer(TOKENS, "fp32", mine(0.9, memory=1.2), *PEERS),
                    layer(EXPERTS, "fp32", {"variant": "moefold", "kind": "ours", "refused": "-"}),
                ]
            ),
        }
    )["speed"]
    assert made.startswith("A CPU (AVX2), torch 2.13.0:\n\n| layer |")
    assert heads(made) == [
        "| layer | fp32, 1 thread | fp32, 2 threads | bf16, 1 thread | memory, fp32 | "
        "memory, bf16 |"
    ]
    assert body(made) == [
        f"| {TOKENS_TEXT}, 48 tokens | 0.90 (0.81 grouped) | 0.70 | 0.60 | 1.25 | 1.10 |",
        f"| {EXPERTS_TEXT} | not timed | not measured | not measured |  |  |",
    ]


def test_machines_are_not_mixed():
    one = [layer(TOKENS, "fp32", mine(0.9))]
    made = readme_tables(
        {
            "a": results(layers=one),
            "b": results(layers=one, cpu="Another"),
            "c": results(layers=one, gpu="A GPU"),
        }
    )["speed"]
    assert made.count("A CPU (AVX2), torch 2.13.0:\n\n") == 1
    assert made.count("Another (AVX2), torch 2.13.0:\n\n") == 1
    assert made.count("A GPU, torch 2.13.0:\n\n") == 1
    assert heads(made) == [
        *["| layer | fp32, 1 thread | memory, fp32 |"] * 2,
        "| layer | fp32 | memory, fp32 |",
    ]
    assert made.count("In brackets the fastest peer that could run.") == 1


def test_the_newest_counts():
    old = results(layers=[layer(TOKENS, "fp32", mine(0.5))], date="2026-01-01T10:00")
    new = results(layers=[layer(TOKENS, "fp32", mine(0.9))], date="2026-01-01T11:00")
    for several in ({"old": old, "new": new}, {"new": new, "old": old}):
        assert body(readme_tables(several)["speed"]) == [
            f"| {TOKENS_TEXT}, 48 tokens | 0.90 | 1.00 |"
        ]


def test_layers_with_spread_and_peers():
    peers = [
        timed("transformers grouped_mm", 0.8, faster=1.125),
        timed("transformers eager", 0.1, faster=9.0),
        {"variant": "rate", "kind": "peer", "not_compared": "another layer"},
    ]
    made = readme_tables(
        {
            "a": results(
                layers=[
                    layer(TOKENS, "fp32", mine(0.9, memory=0.7), *peers),
                    layer(EXPERTS, "fp32", mine(0.8)),
                ]
            )
        }
    )["layers"]
    assert body(made) == [
        f"| {TOKENS_TEXT}, 48 tokens | fp32, 1 thread | 0.90 (0.89 to 0.92) | "
        "0.80, transformers grouped_mm | 1.12 | 9.00 | 0.70 |",
        f"| {EXPERTS_TEXT} | fp32, 1 thread | 0.80 (0.79 to 0.82) | none ran |  |  | 1.00 |",
    ]


def test_what_was_left_out_is_said_once_unless_another_run_has_it():
    shape = SHAPES["7b-256"]
    left = [{"shape": shape.to_dict(), "why": "it is for cuda"}]
    one = [layer(TOKENS, "fp32", mine(0.9))]
    without = {"a": results(layers=one, not_measured=left)}
    made = readme_tables(without)
    assert made["speed"].endswith("\n\nOn a GPU: not measured.")
    assert made["layers"].endswith(f"\n\nOn a GPU: not measured.\n\nNot measured: {shape.text}.")
    other = results(layers=[layer(shape, "bf16", mine(0.9))], gpu="A GPU")
    for text in readme_tables({**without, "b": other}).values():
        assert "On a GPU" not in text


def decode(us):
    """A record of each variant, from its µs."""
    kinds = {"dense": "dense", "moefold": "ours"}
    return [
        {"variant": name, "kind": kinds.get(name, "peer"), "us": [v - 1, v, v + 1]}
        if v
        else {"variant": name, "kind": kinds.get(name, "peer"), "refused": "it cannot"}
        for name, v in us.items()
    ]


def test_few_tokens():
    points = [
        {"tokens": 1, "records": decode({"dense": 5.0, "moefold": 12.34, "p": 20.0, "q": 15.0})},
        {"tokens": 16, "records": decode({"dense": 50.0, "moefold": 120.0, "p": None})},
    ]
    fewer = [{"tokens": 1, "records": decode({"dense": 6.0, "moefold": None})}]
    made = readme_tables(
        {
            "a": results(decode=[layer(TOKENS, "fp32") | {"points": points}]),
            "b": results(decode=[layer(TOKENS, "fp32") | {"points": fewer}], threads=2),
        }
    )["decode"]
    one, two = f"| {TOKENS_TEXT} | fp32, 1 thread", f"| {TOKENS_TEXT} | fp32, 2 threads"
    assert heads(made) == ["| layer |  |  | 1 token | 16 tokens |"]
    assert body(made) == [
        f"{one} | moefold | 12.3 | 120 |",
        f"{one} | fastest peer | 15.0, q | none ran |",
        f"{one} | dense MLP | 5.00 | 50.0 |",
        f"{two} | moefold | not timed |  |",
        f"{two} | fastest peer | none ran |  |",
        f"{two} | dense MLP | 6.00 |  |",
    ]


def model(dtype, *records):
    return {"model": "minilm", "dtype": dtype, "batch": 32, "length": 128, "records": records}


def test_models():
    dense = {"variant": "dense", "ms": [7.0, 7.0, 7.0], "flops_of_dense": 1.0}
    one = {"variant": "top-1 of 8", "refused": "it differs", "flops_of_dense": 1.004}
    two = {"variant": "top-2 of 8", "ms": [9.0, 9.5, 10.0], "flops_of_dense": 1.31}
    two["times_dense"] = [1.3, 1.35, 1.4]
    refused = {"model": "nowhere", "dtype": "fp32", "refused": "no folder"}
    made = readme_tables(
        {
            "a": results(models=[model("fp32", dense, one, two), refused]),
            "b": results(models=[model("fp32", dense, two)], threads=2),
        }
    )["models"]
    assert heads(made) == ["| encoder | mixture | fp32, 1 thread | fp32, 2 threads | operations |"]
    assert body(made) == [
        "| minilm, 32 texts of 128 tokens | top-1 of 8 | not timed | not measured | 1.00 |",
        "| minilm, 32 texts of 128 tokens | top-2 of 8 | 1.35 (1.30 to 1.40) | "
        "1.35 (1.30 to 1.40) | 1.31 |",
    ]


def curve(name, **lines):
    return {"name": name, "dtype": "fp32", "x": "x", "y": "ms of a pass", "lines": lines}


def line(x, ms, exponent=None, half=None):
    found = {"x": x, "ms": [[v, v, v] for v in ms]}
    if exponent is not None:
        low, high = (None, None) if half is None else (exponent - half, exponent + half)
        found["fit"] = {"exponent": exponent, "low": low, "high": high, "factor": 1.0}
    return found


def test_exponents():
    made = readme_tables(
        {
            "a": results(
                scaling=[
                    curve("tokens", moefold=line([16, 32, 64], [1, 2, 4], 1.0, 0.125)),
                    curve("k", moefold=line([1], [3.0]), dense=line([1, 2], [3, 4], 0.5)),
                ]
            ),
            "b": results(scaling=[curve("tokens", moefold=line([8, 16], [1, 2], 0.75))], threads=2),
        }
    )["scaling"]
    assert heads(made) == ["| against | of | x | fp32, 1 thread | fp32, 2 threads |"]
    assert body(made) == [
        "| tokens | moefold | 8 to 64 | 1.00 (0.88 to 1.12) | 0.75 |",
        "| k | moefold | 1 to 1 |  | not measured |",
        "| k | dense | 1 to 2 | 0.50 | not measured |",
    ]


def test_points_of_soft_moe_and_of_memory():
    soft = curve("soft experts", moefold=line([1, 2], [3, 4], 0.42), dense=line([1], [2.5]))
    lines = {"x": [1, 8], "mib": [100.0, 250.5]}
    memory = curve("memory, finer experts", moefold=lines)
    made = readme_tables(
        {
            "a": results(scaling=[soft, memory]),
            "b": results(scaling=[memory], threads=2, date="2026-01-02"),
        }
    )
    assert heads(made["soft"]) == ["|  | of |  | 1 | 2 | exponent |"]
    assert body(made["soft"]) == [
        "| soft experts | moefold | fp32, 1 thread | 3.00 | 4.00 | 0.42 |",
        "| soft experts | dense | fp32, 1 thread | 2.50 |  |  |",
    ]
    # Once for each dtype: threads do not change what is alive.
    assert body(made["memory"]) == ["| memory, finer experts | moefold | fp32 | 100 | 250 |  |"]
    assert "memory" not in "".join(body(made["scaling"]))


def test_what_ran_where():
    assert body(readme_tables({"[a](a.json)": results(threads=2)})["runs"]) == [
        "| [a](a.json) | A CPU (AVX2), torch 2.13.0 | fp32, 2 threads | of the process | 7 | "
        "0.5 to 1.2 | abcabcabca |"
    ]


@pytest.mark.parametrize(
    "name", ["speed", "layers", "decode", "models", "scaling", "soft", "memory", "runs"]
)
def test_no_numbers_are_said_to_be_none(name):
    assert readme_tables({})[name] == "Not measured."
    if name != "runs":
        empty = replace(TOKENS, name="left out")
        only = results(not_measured=[{"shape": empty.to_dict(), "why": "-"}])
        assert readme_tables({"a": only})[name] == "Not measured."
