"""Charts of a report as inline SVG and HTML: lines over the steps, shares as a shaded table. They load nothing.

A chart carries its points as JSON; report.js reads a value off where the pointer is, and a name in the legend hides its
line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
MOST_POINTS = 600
"""Of a line that is drawn: more than pixels are no use."""


class Line(NamedTuple):
    """A named line: its points (x, y) by x; `run` numbers its colour; `dashed` for what is known beforehand."""

    name: str
    points: Sequence[tuple[float, float]]
    run: int = 0
    dashed: bool = False


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within low .. high, `most` or fewer. Example: `ticks(0, 1)` is [0, 0.25, 0.5, 0.75, 1]."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 12) for place in range(first, first + most) if step * place <= high + 1e-9 * step]


def number(value: float, digits: int = 4) -> str:
    """For a person. Example: `number(7.049254) == "7.049"`, `number(0.000066) == "6.6e-05"`."""
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.{digits - 1}g}"


def told_apart(values: Sequence[float]) -> list[str]:
    """Different numbers with as many digits as it takes. Example: [5.6631, 5.6632] is ["5.6631", "5.6632"]."""
    told = ([number(value, digits) for value in values] for digits in range(4, 18))
    return next(texts for texts in told if len(set(texts)) == len(set(values)))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` of them and the last; which are left out is the same for every line of as many."""
    every = -(-len(points) // MOST_POINTS)
    return [*points[::every], *points[-1:]] if every > 1 else list(points)


def line_chart(title: str, unit: str, lines: Sequence[Line], *, x: str = "step", logarithmic: bool = False) -> str:
    """A figure of lines, or "" where none has a point.

    Args:
        title: above it. unit: of the y axis. x: what the x axis counts. logarithmic: of the x axis.
    """
    drawn = [line._replace(points=thinned(line.points)) for line in lines if line.points]
    if not drawn:
        return ""
    xs = [point[0] for line in drawn for point in line.points]
    ys = [point[1] for line in drawn for point in line.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    pad = 0.06 * (y_high - y_low) or 0.5 * abs(y_high) or 0.5
    y_low, y_high = (0.0 if 0 <= y_low < 0.3 * y_high else y_low - pad), y_high + pad

    def across(value: float) -> float:
        low, high, at = (math.log(v) if logarithmic else v for v in (x_low, x_high, value))
        return LEFT + (WIDTH - LEFT - RIGHT) * ((at - low) / (high - low) if high > low else 0.5)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - y_low) / (y_high - y_low)

    x_ticks = sorted(set(xs)) if logarithmic else ticks(x_low, x_high, 6)
    y_ticks = ticks(y_low, y_high)
    axes = ([*zip(map(at, marks), told_apart(marks), strict=True)] for at, marks in ((across, x_ticks), (up, y_ticks)))
    parts = [*_axes(*axes)]
    for place, line in enumerate(drawn):
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line.points)
        style = " dashed" if line.dashed else ""
        parts.append(f'<polyline class="line run{line.run % 6}{style}" data-line="{place}" points="{path}"/>')
        if len(line.points) < 40 and not line.dashed:
            dots = (f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="2.5"/>' for a, b in line.points)
            parts.append(f'<g class="dots run{line.run % 6}" data-line="{place}">{"".join(dots)}</g>')
    data = [
        {"name": line.name, "x": [a for a, _ in line.points], "y": [b for _, b in line.points],
         "at": [[round(across(a), 1), round(up(b), 1)] for a, b in line.points]}
        for line in drawn
    ]  # fmt: skip
    legend = "".join(
        f'<button type="button" data-line="{place}" aria-pressed="true"><i class="run{line.run % 6}'
        f'{" dashed" if line.dashed else ""}"></i>{escape(line.name)}</button>'
        for place, line in enumerate(drawn)
    )
    return (
        f"<figure class=chart data-x=\"{escape(x)}\" data-lines='{escape(json.dumps(data), quote=True)}'>"
        f"<figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"<p class=legend>{legend}</p><output></output></figure>"
    )


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> Iterator[str]:
    floor = HEIGHT - BOTTOM
    for place, text in y_ticks:
        yield f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield f'<text class=tick x="{LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{text}</text>'
    for place, text in x_ticks:
        yield f'<text class=tick x="{place:.1f}" y="{floor + 16}" text-anchor="middle">{text}</text>'
    yield f'<line class=cursor y1="{TOP}" y2="{floor}" x1="-9" x2="-9"/>'


def share_table(title: str, rows: Mapping[str, Mapping[str, float]], corner: str) -> str:
    """Shares 0..1 in percent, shaded by their size against the largest; "" where there is none."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    largest = max((value for row in rows.values() for value in row.values()), default=0.0) or 1.0
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(
            f'<td style="--share:{row[c] / largest:.3f}">{100 * row[c]:.1f}</td>' if c in row else "<td></td>"
            for c in columns
        )
        + "</tr>"
        for name, row in rows.items()
    )
    return (
        f"<figure class=shares><figcaption>{escape(title)} <small>%</small></figcaption>"
        f"<table><tr><th>{escape(corner)}</th>{head}</tr>{body}</table></figure>"
    )


def heat_maps(title: str, grids: Mapping[str, Sequence[Sequence[float]]], note: str) -> str:
    """Grids of shares 0..1 side by side, in percent, shaded by their size against the largest; NaN is a blank cell.

    note: what they are. "" where there is none.
    """
    if not grids:
        return ""
    shown = [value for grid in grids.values() for row in grid for value in row if not math.isnan(value)]
    largest = max(shown, default=0.0) or 1.0
    tables = []
    for name, grid in grids.items():
        own = [value for row in grid for value in row if not math.isnan(value)]
        mean = f" <small>{100 * sum(own) / len(own):.1f}</small>" if own else ""
        body = "".join(f"<tr>{''.join(_cell(value, largest) for value in row)}</tr>" for row in grid)
        tables.append(f"<div><b>{escape(name)}</b>{mean}<table>{body}</table></div>")
    return (
        f"<figure class=heat><figcaption>{escape(title)} <small>%</small></figcaption>"
        f"<div class=maps>{''.join(tables)}</div><p class=note>{escape(note)}</p></figure>"
    )


def _cell(value: float, largest: float) -> str:
    if math.isnan(value):
        return "<td></td>"
    return f'<td style="--share:{value / largest:.3f}">{100 * value:.{0 if largest >= 0.1 else 1}f}</td>'


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> str:
    """Words and numbers; a marked row stands out."""
    marks = marked or [False] * len(rows)
    body = "".join(
        f"<tr{' class=marked' if mark else ''}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div class=wide><table><tr>{names}</tr>{body}</table></div>"
