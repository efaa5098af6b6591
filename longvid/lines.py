"""Lines in a frame with axes, as SVG text. Plain Python; axes are linear or logarithmic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 46
COLOURS = ("#1450aa", "#c8102e", "#2e8b57", "#e07b00", "#7b3fa0", "#555555", "#00838f", "#9c6b30")
_LINE_HEIGHT = 15


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Named lines of points (x, y); a y of None is a gap. `dashed` names those that are drawn so."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float | None]]]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = True
    dashed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Where a value is, pixels."""
        to = math.log if self.log else float
        return self.start + (self.stop - self.start) * (to(value) - to(self.low)) / (to(self.high) - to(self.low))

    def ticks(self) -> list[float]:
        """Round values on the axis: powers of two where it is logarithmic."""
        if self.log:
            powers = range(math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9) + 1)
            return [2.0**power for power in powers][:: -(-len(powers) // 11)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        if self.high - self.low <= 8 and self.low >= 1 and self.low == int(self.low) and self.high == int(self.high):
            return [float(value) for value in range(int(self.low), int(self.high) + 1)]
        step = next(step * times for times in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * times) <= 6)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]


def draw_lines(chart: Lines) -> str:
    """The chart as an `<svg>` element. Raises ValueError without points, or for one that a logarithmic axis lacks."""
    points = [(x, y) for line in chart.lines.values() for x, y in line if y is not None]
    if not points:
        raise ValueError(f"chart {chart.title!r} has no points; a line needs at least one")
    x = _axis([p[0] for p in points], chart.log_x, LEFT, WIDTH - RIGHT, from_zero=False)
    y = _axis([p[1] for p in points], chart.log_y, HEIGHT - BOTTOM, TOP, from_zero=chart.from_zero)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
             f'height="{HEIGHT}" font-family="sans-serif" font-size="11" role="img">',
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
             _text(LEFT, 19, chart.title, size=13, weight="bold")]  # fmt: skip
    for value in x.ticks():
        parts += [_rule(x(value), TOP, x(value), HEIGHT - BOTTOM),
                  _text(x(value), HEIGHT - BOTTOM + 15, _number(value), "middle")]  # fmt: skip
    for value in y.ticks():
        parts += [_rule(LEFT, y(value), WIDTH - RIGHT, y(value)), _text(LEFT - 6, y(value) + 4, _number(value), "end")]
    parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, chart.x, "middle"),
              f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle" '
              f'fill="#333">{escape(chart.y)}</text>']  # fmt: skip
    for i, (name, line) in enumerate(chart.lines.items()):
        parts += _line(line, COLOURS[i % len(COLOURS)], x, y, dashed=name in chart.dashed)
    parts += _legend(chart, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axis(values: Sequence[float], log: bool, start: float, stop: float, *, from_zero: bool) -> _Axis:
    low, high = min(values), max(values)
    if log and low <= 0:
        raise ValueError(f"a logarithmic axis has no place for {low}; values must be above 0")
    if log:
        return _Axis(low, high if high > low else 2 * low, log, start, stop)
    low = min(low, 0.0) if from_zero else low
    high = high if high > low else low + 1
    return _Axis(low, high + 0.04 * (high - low) if from_zero else high, log, start, stop)


def _line(line: Sequence[tuple[float, float | None]], colour: str, x: _Axis, y: _Axis, *, dashed: bool) -> list[str]:
    """Pieces between gaps, and a dot for each point where they are few."""
    pieces: list[list[str]] = [[]]
    for px, py in line:
        if py is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{x(px):.1f},{y(py):.1f}")
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    found = [f'<polyline points="{" ".join(piece)}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
             for piece in pieces if len(piece) > 1]  # fmt: skip
    dots = [point.split(",") for piece in pieces for point in piece] if len(line) <= 16 else []
    return found + [f'<circle cx="{px}" cy="{py}" r="2.5" fill="{colour}"/>' for px, py in dots]


def _legend(chart: Lines, x: _Axis, y: _Axis) -> list[str]:
    """Names in the corner, of four, that has the fewest points."""
    height = _LINE_HEIGHT * len(chart.lines) + 6
    width = 34 + 6.2 * max(map(len, chart.lines))
    corners = [(left, top) for top in (TOP + 6, HEIGHT - BOTTOM - 6 - height)
               for left in (LEFT + 8, WIDTH - RIGHT - 8 - width)]  # fmt: skip
    places = [(x(px), y(py)) for line in chart.lines.values() for px, py in line if py is not None]

    def covered(corner: tuple[float, float]) -> int:
        left, top = corner
        return sum(left - 8 <= px <= left + width + 8 and top - 8 <= py <= top + height + 8 for px, py in places)

    left, top = min(corners, key=covered)
    parts = [f'<rect x="{left}" y="{top}" width="{width:.0f}" height="{height}" fill="white" fill-opacity="0.85"/>']
    for i, name in enumerate(chart.lines):
        middle = top + 11 + i * _LINE_HEIGHT
        dash = ' stroke-dasharray="5 4"' if name in chart.dashed else ""
        parts += [f'<line x1="{left + 4}" x2="{left + 26}" y1="{middle}" y2="{middle}" stroke-width="2" '
                  f'stroke="{COLOURS[i % len(COLOURS)]}"{dash}/>', _text(left + 31, middle + 4, name)]  # fmt: skip
    return parts


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e2e2e2"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11, weight: str = "normal") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill="#333">{escape(text)}</text>')  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
