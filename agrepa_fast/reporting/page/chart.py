"""Line charts as SVG, in the colours of the page around them."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from .document import Chart

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 224, 38, 8, 8, 36
STYLES = ("strong", "thin", "dashed", "dotted")  # of lines; style.css draws them

Points = Sequence[tuple[float, float]]


def draw_lines(
    title: str, x_label: str, lines: Mapping[str, tuple[str, Points]], mark: tuple[float, str] | None = None
) -> Chart:
    """Return a chart of lines on one scale that begins at 0. lines: name -> (one of STYLES, points); a line without a
    finite value is left out. mark: an x with a text, drawn as a vertical line."""
    lines = {name: (style, [p for p in points if math.isfinite(p[1])]) for name, (style, points) in lines.items()}
    lines = {name: line for name, line in lines.items() if line[1]}
    xs, ys = zip(*(point for _, points in lines.values() for point in points), strict=True) if lines else ((1,), (1,))
    x_ticks, y_ticks = _ticks(min(0, *xs), max(xs)), _ticks(min(0, *ys), max(ys))
    x_high, y_low, y_high = max(xs) or 1, y_ticks[0], max(y_ticks[-1], max(ys))

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / x_high

    def y_of(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (y_high - y) / (y_high - y_low)

    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if tick <= x_high:
            anchor = "end" if x_of(tick) > _WIDTH - 20 else "middle"
            parts.append(
                f'<text x="{x_of(tick):.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="{anchor}">{tick:g}</text>'
            )
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{escape(x_label)}</text>')
    if mark is not None:
        x = x_of(mark[0])
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x + 5:.1f}" y="{_TOP + 10}">{escape(mark[1])}</text>')
    for style, points in lines.values():
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        if len(points) == 1 or style == "strong":
            parts += [f'<circle class="{style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5"/>' for x, y in points]
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return Chart(title, svg, [(style, name) for name, (style, _) in lines.items()])


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers from at most `low` to about `high`."""
    span = (high - low) or 1.0
    rough = span / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first = math.floor(low / step)
    return [round(number * step, 10) for number in range(first, math.ceil(high / step - 1e-9) + 1)]
