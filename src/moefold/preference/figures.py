"""Figures for a page, written as SVG: lines and points between two axes, and bars with intervals.

Text stays text in the page's own typeface, and neutral colours are the page's variables, so that a
figure reads well on a light and on a dark background.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Point = tuple[float, float]

# Okabe and Ito's: told apart with any colour vision, readable on white and on near-black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 48


def chart(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    x_range: Point | None = None,
    y_range: Point | None = None,
    diagonal: bool = False,
    dots: bool = False,
) -> str:
    """Lines through points.

    Args:
        series: points by name, from left to right; names are shown if there are several.
        x_label: what x is.
        y_label: what y is.
        x_range: ends of the axis; those of the points if None.
        y_range: the same.
        diagonal: draw where y is x.
        dots: mark every point.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: there is no point.
    """
    points = [point for one in series.values() for point in one]
    if not points:
        raise ValueError("there is no point to draw; give at least one")
    x_low, x_high = x_range or _ends([x for x, _ in points])
    y_low, y_high = y_range or _ends([y for _, y in points])

    def place(point: Point) -> Point:
        x, y = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return (
            _LEFT + x * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y * (_HEIGHT - _TOP - _BOTTOM),
        )

    pieces = _axes(place, (x_low, x_high), (y_low, y_high), x_label, y_label)
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        ends = _path([place((low, low)), place((high, high))])
        pieces.append(f'<path d="{ends}" stroke="var(--soft)" stroke-dasharray="5 4" fill="none"/>')
    for number, (name, own) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        placed = [place(point) for point in own]
        pieces.append(
            f'<path d="{_path(placed)}" stroke="{colour}" stroke-width="2.2" fill="none"/>'
        )
        if dots or len(own) == 1:
            pieces += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in placed
            ]
        if len(series) > 1:
            pieces.append(
                f'<text x="{_WIDTH - _RIGHT}" y="{_TOP + 14 + 18 * number}" text-anchor="end" '
                f'fill="{colour}">{escape(name)}</text>'
            )
    return _svg(_HEIGHT, pieces)


def bars(rows: Sequence[tuple[str, float, float]], *, label: str, highest: float = 1.0) -> str:
    """A bar for each row, from zero, with its interval.

    Args:
        rows: name, value and half the width of its interval (NaN for none), from the top down.
        label: what the values are.
        highest: end of the axis.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there is no row to draw; give at least one")
    left, step = 190, 28
    height = _TOP + step * len(rows) + _BOTTOM

    def across(value: float) -> float:
        return left + min(max(value / highest, 0.0), 1.0) * (_WIDTH - left - _RIGHT)

    pieces = []
    for tick in _ticks(0.0, highest):
        x = across(tick)
        pieces.append(_line(x, _TOP, x, height - _BOTTOM, "var(--rule)"))
        pieces.append(_text(x, height - _BOTTOM + 18, _number(tick), "middle"))
    for number, (name, value, half) in enumerate(rows):
        y = _TOP + step * number + 5
        pieces.append(_text(left - 8, y + 13, name, "end"))
        pieces.append(
            f'<rect x="{left}" y="{y}" width="{across(value) - left:.1f}" height="{step - 10}" '
            f'fill="{_COLOURS[0]}" opacity="0.75"/>'
        )
        if math.isfinite(half):
            middle = y + (step - 10) / 2
            pieces.append(
                _line(across(value - half), middle, across(value + half), middle, "var(--ink)")
            )
    pieces.append(_text((left + _WIDTH - _RIGHT) / 2, height - 8, label, "middle"))
    return _svg(height, pieces)


def _axes(
    place: Callable[[Point], Point], x: Point, y: Point, x_label: str, y_label: str
) -> list[str]:
    pieces = []
    bottom, left = _HEIGHT - _BOTTOM, _LEFT
    for tick in _ticks(*y):
        _, height = place((x[0], tick))
        pieces.append(_line(left, height, _WIDTH - _RIGHT, height, "var(--rule)"))
        pieces.append(_text(left - 8, height + 4, _number(tick), "end"))
    for tick in _ticks(*x):
        across, _ = place((tick, y[0]))
        pieces.append(_line(across, bottom, across, bottom + 5, "var(--ink)"))
        pieces.append(_text(across, bottom + 19, _number(tick), "middle"))
    pieces.append(_line(left, bottom, _WIDTH - _RIGHT, bottom, "var(--ink)"))
    pieces.append(_text((left + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"))
    turned = f"rotate(-90 14 {(bottom + _TOP) / 2})"
    pieces.append(_text(14, (bottom + _TOP) / 2, y_label, "middle", turned))
    return pieces


def _ends(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    room = 0.04 * (high - low)
    return low - room if low else low, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= 7:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:,.6g}" if abs(value) >= 1e-9 else "0"


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="1.2"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, transform: str = "") -> str:
    turned = f' transform="{transform}"' if transform else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--ink)"{turned}>'
        f"{escape(text)}</text>"
    )


def _svg(height: float, pieces: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" class="figure" font-size="13" '
        f'aria-hidden="true">{"".join(pieces)}</svg>'
    )
