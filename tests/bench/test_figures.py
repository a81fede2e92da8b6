"""Figures of the page: what is written on them."""

import re

import pytest

from moefold.bench.figures import growth, shares


def words(svg):
    return re.findall(r">([^<>]+)</text>", svg)


def numbers(svg):
    return [float(one.replace("\N{MINUS SIGN}", "-")) for one in words(svg) if one[0].isdigit()]


def test_a_row_for_each_share_and_a_line_for_one():
    rows = [("ours", [0.8, 0.9, 1.0], True), ("theirs", [0.2, 0.3, 0.4], False)]
    found = words(shares(rows, x_label="share of it", one="dense MLP"))
    assert [one for one in found if one[0].isalpha()] == [
        "share of it", "ours", "theirs", "dense MLP",
    ]  # fmt: skip


@pytest.mark.parametrize(("high", "last"), [(0.5, 1.0), (1.0, 1.0), (4.0, 4.0)])
def test_layers_have_one_axis_unless_one_is_faster(high, last):
    svg = shares([("ours", [0.2, 0.3, high], True)], x_label="share", one="dense")
    assert max(numbers(svg)) == last


def line(x, y, **more):
    return {"x": x, "ms": [[v, v, v] for v in y], **more}


def test_names_have_their_exponents():
    fit = {"exponent": 0.5, "factor": 1.0}
    lines = {"a": line([1, 4], [1, 2], fit=fit), "b": {"x": [1], "mib": [3.0]}}
    found = words(growth(lines, x_label="tokens", y_label="ms"))
    assert [one for one in found if one[0].isalpha()] == [
        "tokens", "ms", "a, to the power of 0.50", "b",
    ]  # fmt: skip


@pytest.mark.parametrize("y", [[1.0, 1.0], [5.5, 14.0], [70.0, 140.0], [0.6, 1.4], [3.0, 900.0]])
def test_an_axis_has_at_least_two_numbers(y):
    lines = {"a": line([16, 32], y)}
    assert len(numbers(growth(lines, x_label="x", y_label="y"))) >= 2 + 2


def test_names_stand_above_the_axes():
    svg = growth({"a": line([1, 4], [1, 2])}, x_label="x", y_label="y")
    # SVG counts from the top: the name is above the highest tick of the axis.
    height = {
        text: float(y)
        for y, text in re.findall(r'<text[^>]*?y="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    }
    assert height["a"] < min(y for text, y in height.items() if text != "a")
