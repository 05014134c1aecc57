"""Small charts as inline SVG: lines over two axes, and bars. Colours are the page's CSS classes, so they follow it.

Every chart is drawn for a column of about 360 pixels, the width at which its letters have the page's size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 40


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: As the legend calls it.
        points: x and y; a point whose y is None breaks the line.
        kind: CSS class: teacher, student, other-1, …, or faint.
        dots: Whether its points are marked.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    kind: str = "student"
    dots: bool = False


@dataclass(frozen=True)
class Gate:
    """Between which values a healthy run passes at one x."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: What is on it, with its unit.
        log: Whether it is logarithmic; values of 0 and below are then left out.
        from_zero: Whether a linear axis begins at 0.
        ticks: Where the ticks stand; left out, at round numbers.
        form: How a tick is written.
    """

    label: str
    log: bool = False
    from_zero: bool = False
    ticks: Sequence[float] | None = None
    form: Callable[[float], str] = lambda value: short(value)


def short(value: float | None, digits: int = 3) -> str:
    """A number as people write it: three figures, thousands as k, M, G, T."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / (1e3 if letter == 'k' else size):.{digits}g}{letter}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, *, title: str, gates: Sequence[Gate] = ()) -> Markup:
    """Draw lines.

    Args:
        lines: Back to front.
        x: The axis below.
        y: The axis on the left.
        title: What the picture shows, for those who do not see it.
        gates: Expected ranges, drawn behind the lines.
    """
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for _, value in line.points if _shown(value, y)]
    ys += [value for gate in gates for value in (gate.low, gate.high) if _shown(value, y)]
    across, up = _Scale(xs, x, LEFT, WIDTH - RIGHT, tight=True), _Scale(ys, y, HEIGHT - BOTTOM, TOP)
    parts = [_frame(across, up)]
    for gate in gates:
        if _shown(gate.low, y) and _shown(gate.high, y):
            top, bottom = up(gate.high), up(gate.low)
            place = min(max(across(gate.x) - 7, LEFT), WIDTH - RIGHT - 14)
            box = f'x="{place:.1f}" y="{top:.1f}" width="14" height="{max(bottom - top, 2):.1f}"'
            parts.append(f'<rect class="gate" {box} rx="3"/>')
    for line in lines:
        parts += _path(line, across, up)
    return _picture(parts, title)


def bar_chart(rows: Sequence[tuple[str, Sequence[float], str]], *, title: str, form: str = "{}") -> Markup:
    """Draw one bar a row, from 0 to the mean of its values, with a whisker from least to greatest.

    Args:
        rows: Name, values and CSS class (teacher, student, other-1, …, or faint).
        title: What the picture shows, for those who do not see it.
        form: How a value is written; ``{}`` stands for the number.
    """
    step, height = 40, 40 * len(rows) + 4
    greatest = max((max(values) for _, values, _ in rows), default=0.0) or 1.0
    across, parts = (WIDTH - 74) / greatest, []
    for place, (name, values, kind) in enumerate(rows):
        y, mean = place * step + 20, sum(values) / len(values)
        parts.append(f'<text class="name" x="0" y="{y - 5}">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar {kind}" x="0" y="{y}" width="{max(mean * across, 1.5):.1f}" height="11" rx="2"/>'
        )
        if max(values) > min(values):
            low, high = min(values) * across, max(values) * across
            parts.append(f'<path class="whisker" d="M{low:.1f} {y + 5.5}H{high:.1f}"/>')
        text = form.format(short(mean))
        parts.append(f'<text class="value" x="{max(values) * across + 8:.1f}" y="{y + 10}">{escape(text)}</text>')
    return _picture(parts, title, height)


class _Scale:
    """From values to places on one axis."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float, tight: bool = False):
        self.axis, self.start, self.end = axis, start, end
        values = [value for value in values if _shown(value, axis)] or [1.0]
        low, high = self._bent(min(values)), self._bent(max(values))
        if axis.from_zero and not axis.log:
            low = min(low, 0.0)
        if high - low < 1e-12:
            low, high = low - 0.5, high + 0.5
        room = 0.0 if tight else 0.06 * (high - low)
        keeps_zero = axis.from_zero and not axis.log and low == 0.0
        self.low, self.high = low - (0.0 if keeps_zero else room), high + room

    def _bent(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        part = (self._bent(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six values at which the axis is marked."""
        if self.axis.ticks is not None:
            marks = [tick for tick in self.axis.ticks if _shown(tick, self.axis)]
            return marks[:: math.ceil(len(marks) / 6)] if marks else []
        if self.axis.log:
            for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
                powers = range(math.floor(self.low), math.ceil(self.high) + 1)
                marks = [step * 10.0**power for power in powers for step in steps]
                marks = [mark for mark in marks if self.low - 1e-9 <= math.log10(mark) <= self.high + 1e-9]
                if len(marks) >= 3:
                    return marks[:: math.ceil(len(marks) / 6)]
        low, high = (10.0**self.low, 10.0**self.high) if self.axis.log else (self.low, self.high)
        rough = (high - low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
        first = math.ceil(low / step - 1e-9)
        return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _shown(value: float | None, axis: Axis) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


def _frame(across: _Scale, up: _Scale) -> str:
    """Ticks, faint lines behind the picture, and what is on the axes."""
    base, parts = HEIGHT - BOTTOM, []
    for value in up.ticks():
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label = up.axis.form(value)
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value in across.ticks():
        x, label = across(value), across.axis.form(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="{anchor}">{escape(label)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="label" x="0" y="11">{escape(up.axis.label)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(across.axis.label)}</text>'
    )
    return "".join(parts)


def _path(line: Line, across: _Scale, up: _Scale) -> list[str]:
    steps, pen = [], "M"
    for x, y in line.points:
        if not _shown(y, up.axis) or not _shown(x, across.axis):
            pen = "M"
            continue
        steps.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
    if not steps:
        return []
    parts = [f'<path class="line {line.kind}" d="{"".join(steps)}"/>']
    if line.dots or len(steps) == 1:
        places = (step[1:].split() for step in steps)
        parts += [f'<circle class="dot {line.kind}" cx="{x}" cy="{y}" r="3.2"/>' for x, y in places]
    return parts


def _picture(parts: Sequence[str], title: str, height: int = HEIGHT) -> Markup:
    """The whole picture; its parts are drawn by the functions above, which escape what they are given."""
    head = f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}">'
    return Markup(f"{head}{''.join(parts)}</svg>")
