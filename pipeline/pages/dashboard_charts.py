"""Draw a curve as HTML with an inline SVG, which any browser shows without a script, at any width.

The SVG is stretched to the width of its card, and its lines keep their thickness (`non-scaling-stroke`). Labels are HTML, so
that letters are not stretched. `data-curve` holds the points for the script that shows the values under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


SIZE = 1000  # units of the SVG in both directions
MOST = 400  # points of a line; of more, the lowest and the highest of each stretch are drawn
REACH = 0.6  # a bound or target is shown if it makes the vertical range at most this much longer
JUMP = 2.0  # first values that would make it this many times longer are left out of the vertical range


@dataclass(frozen=True)
class Series:
    """A line: its name, its kind (`training` or `held-out`), and its points."""

    name: str
    kind: str
    steps: Sequence[float]
    values: Sequence[float]


def short(value: float) -> str:
    """Return a number in three figures, or whole."""
    size = abs(float(f"{value:.3g}"))
    if size and (size < 1e-3 or size >= 1e7):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    text = f"{value:,.0f}" if size >= 1000 or value == round(value) else f"{value:.{max(0, 2 - _order(size))}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _order(size: float) -> int:
    """Return the power of ten of a number: 0 for 1 to 9.99."""
    return math.floor(math.log10(size)) if size else 0


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round numbers from low to high: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    unit = 10.0 ** _order((high - low) / most)
    for step in (unit * factor for factor in (1, 2, 2.5, 5, 10, 20, 25, 50)):
        found = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(found) <= most:
            return found
    return [low]


def of_ticks(marks: Sequence[float]) -> list[str]:
    """Return ticks as texts with as many decimals as the distance between them needs."""
    if len(marks) < 2 or not 1e-3 <= marks[1] - marks[0] < 1e4:
        return [short(mark) for mark in marks]
    apart = marks[1] - marks[0]
    decimals = next(places for places in range(5) if abs(round(apart, places) - apart) < 1e-9 * apart)
    return [f"{mark:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for mark in marks]


def thinned(steps: Sequence[float], values: Sequence[float], most: int = MOST) -> list[tuple[float, float]]:
    """Return at most `most` points of a line: all, or the lowest and the highest of each stretch, in their order."""
    points = list(zip(steps, values, strict=True))
    if len(points) <= most:
        return points
    stretch = math.ceil(len(points) / (most // 2))
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def vertical_range(
    series: Sequence[Series], shown: Sequence[float | None], settles: int = 0
) -> tuple[float, float, list[float]]:
    """Return the lowest and highest value of a chart, and the first values that it leaves out.

    Args:
        shown: bounds and targets, which are shown if they are near the values.
        settles: number of first values that may be far from the others.
    """
    every = [value for one in series for value in one.values]
    later = [value for one in series for value in one.values[settles:]] or every
    low, high = min(later), max(later)
    span = (high - low) or abs(high) or 1.0
    near = [value for value in every if low - JUMP * span <= value <= high + JUMP * span]
    left_out = [value for value in every if value not in near]
    low, high = min(near), max(near)
    span = (high - low) or abs(high) or 1.0
    for value in shown:
        if value is not None and low - REACH * span <= value <= high + REACH * span:
            low, high = min(low, value), max(high, value)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad, left_out


def chart(
    series: Sequence[Series],
    *,
    last_step: float,
    label: str,
    band: tuple[float | None, float | None] = (None, None),
    target: float | None = None,
    resumed: Sequence[int] = (),
    settles: int = 0,
    small: bool = False,
) -> str:
    """Return the HTML of a chart of one or more series with at least one point in all.

    Args:
        last_step: the right end of the horizontal axis, the same in all charts of a run.
        label: words for those who cannot see it.
        band: the healthy range, shaded; None where it has no bound.
        target: a value that is marked by a dashed line.
        resumed: steps from which the run went on.
        settles: see `vertical_range`.
        small: whether to leave out most labels.
    """
    low, high, left_out = vertical_range(series, (*band, target), settles)
    width = max(last_step, 1)

    def x(step: float) -> float:
        return round(SIZE * step / width, 1)

    def y(value: float) -> float:
        return round(SIZE * (high - value) / (high - low), 1)

    parts, rows = [], []
    if band != (None, None):
        top = max(y(band[1]), 0.0) if band[1] is not None else 0.0
        bottom = min(y(band[0]), float(SIZE)) if band[0] is not None else float(SIZE)
        if bottom > top:
            parts.append(f'<rect class="band" x="0" y="{top}" width="{SIZE}" height="{round(bottom - top, 1)}"/>')
            parts += [f'<path class="bound" d="M0 {edge}H{SIZE}"/>' for edge in (top, bottom) if 0 < edge < SIZE]
    marks = ticks(low, high, 3 if small else 5)
    parts += [f'<path class="grid" d="M0 {y(mark)}H{SIZE}"/>' for mark in marks]
    parts += [
        f'<path class="resumed" d="M{x(step)} 0V{SIZE}"><title>resumed at step {step}</title></path>'
        for step in resumed
    ]
    if target is not None and low <= target <= high:
        parts.append(f'<path class="target" d="M0 {y(target)}H{SIZE}"/>')
    for one in series:
        points = thinned(one.steps, one.values)
        where = [f"{x(step)} {y(value)}" for step, value in points]
        if len(where) > 1:
            parts.append(f'<path class="line {one.kind}" d="M{"L".join(where)}"/>')
        if len(where) == 1 or (one.kind == "held-out" and len(where) < 40):
            parts += [f'<path class="dot {one.kind}" d="M{place}h.01"/>' for place in where]
        rows.append(
            {
                "name": one.name,
                "kind": one.kind,
                "points": [[x(step), y(value), step, short(value)] for step, value in points],
            }
        )
    spots = ticks(0, width, 3 if small else 5)
    across = "".join(
        f'<span style="left:{x(step) / SIZE:.2%}">{short(step)}</span>' for step in spots if step == round(step)
    )
    named = zip(marks, of_ticks(marks), strict=True)
    upward = "".join(f'<span style="top:{y(mark) / SIZE:.2%}">{text}</span>' for mark, text in named)
    note = ""
    if left_out:
        beyond = min(left_out, key=lambda value: -abs(value))
        note = f'<p class="beyond">First values up to {short(beyond)} lie outside of the chart.</p>'
    curve = escape(json.dumps(rows, separators=(",", ":")))
    return (
        f'<div class="chart{" small" if small else ""}" data-curve="{curve}"><div class="up">{upward}</div><div class="plot">'
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'</svg></div><div class="across">{across}</div></div>{note}'
    )
