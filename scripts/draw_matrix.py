"""Draw the rolling matrix of a small plan as SVG: `python scripts/draw_matrix.py [FILE]`, docs/rolling-matrix.svg.

Nothing is drawn by hand: noise levels and the queue come from the passes of real plans, one for each lag. x is blocks,
y is ticks downwards; a cell in the queue (it takes a step in this tick) is large, a waiting or finished one small.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longvid.plan import Plan, make_plan
from pipelines.methods import rolling
from pipelines.show_plan import matrix_rows

NUM_BLOCKS, NUM_STEPS = 8, 5
LAGS = {0: "synchronous", 1: "rolling", 2: "staircase", NUM_STEPS: "block by block"}

BLUES = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
"""Clean, half, noise. One hue from light to dark: it reads in grey and with any kind of colour blindness."""
INK, GREY, QUEUE = "#1f2328", "#59636e", "#d55e00"
WIDTH, HEIGHT = 1060, 600
TOP = 112
"""y of the first tick, in the large matrix and in the small ones."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where a matrix stands: pixel of its first cell, and size of a cell."""

    left: float
    column: float
    row: float

    def x(self, block: float) -> float:
        """Left edge of a block's cells."""
        return self.left + self.column * block

    def y(self, tick: float) -> float:
        """Upper edge of a tick's cells."""
        return TOP + self.row * tick


def small_plan(lag: int) -> Plan:
    """The preset `rolling` at another lag, that of the first block included, few steps, evenly spaced levels."""
    method = replace(rolling(num_steps=NUM_STEPS, lag=lag, flow_shift=1.0), first_steps=0)
    return make_plan(method, method.first_block_size + (NUM_BLOCKS - 1) * method.block_size)


def queue_of(plan: Plan) -> set[tuple[int, int]]:
    """(tick, block) of every step that the plan takes."""
    return {(p.tick, block) for p in plan.passes for block in p.updates}


def colour(level: float) -> str:
    """Fill of a noise level, 0 (clean) to 1 (noise)."""
    low, high = (BLUES[0], BLUES[1]) if level < 0.5 else (BLUES[1], BLUES[2])
    share = 2 * level if level < 0.5 else 2 * level - 1
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def text(x: float, y: float, words: str, *, size: int = 14, fill: str = INK, anchor: str = "middle", bold=False) -> str:
    """A line of text; y is its baseline."""
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{words}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle with the SVG attributes `style`."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {style}/>'


def arrow(x: float, y: float, to_x: float) -> str:
    """A horizontal arrow."""
    head = 9 if to_x > x else -9
    line, tip = f"M{x:g} {y:g}H{to_x - head:g}", f"M{to_x:g} {y:g}l{-head} -5v10z"
    return f'<path d="{line}" stroke="{QUEUE}" stroke-width="2"/><path d="{tip}" fill="{QUEUE}"/>'


def cells(plan: Plan, grid: Grid) -> Iterator[str]:
    """All cells, full size in the queue and small elsewhere; one path for each colour."""
    queue, outlines = queue_of(plan), {}
    for tick, row in enumerate(matrix_rows(plan)):
        for block, step in enumerate(row):
            share = 1.0 if (tick, block) in queue else 0.4
            width, height = share * grid.column, share * grid.row
            x, y = grid.x(block + 0.5) - width / 2, grid.y(tick + 0.5) - height / 2
            outline = f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z"
            outlines.setdefault(colour(plan.schedule.levels[step]), []).append(outline)
    for fill, parts in outlines.items():
        yield f'<path d="{"".join(parts)}" fill="{fill}" stroke="#8c959f" stroke-width="0.5"/>'


def border(plan: Plan, grid: Grid) -> str:
    """The outline of the queue over all ticks: every side of a cell beyond which the queue ends."""
    queue, sides = queue_of(plan), []
    for tick, block in sorted(queue):
        x, y = grid.x(block), grid.y(tick)
        for (down, right), side in {
            (-1, 0): f"M{x:g} {y:g}h{grid.column:g}",
            (1, 0): f"M{x:g} {y + grid.row:g}h{grid.column:g}",
            (0, -1): f"M{x:g} {y:g}v{grid.row:g}",
            (0, 1): f"M{x + grid.column:g} {y:g}v{grid.row:g}",
        }.items():
            if (tick + down, block + right) not in queue:
                sides.append(side)
    return f'<path d="{"".join(sides)}" fill="none" stroke="{QUEUE}" stroke-width="2" stroke-linecap="square"/>'


def large_matrix(plan: Plan, grid: Grid) -> Iterator[str]:
    """The matrix at lag 1 with steps written into the queue, one tick's queue marked, and what enters and leaves."""
    rows, queue = matrix_rows(plan), queue_of(plan)
    yield text(grid.x(NUM_BLOCKS / 2), TOP - 62, "lag 1: the rolling queue", size=17, bold=True)
    yield text(grid.x(NUM_BLOCKS / 2), TOP - 30, "block (time of the video →)", fill=GREY)
    yield from (text(grid.x(block + 0.5), TOP - 8, str(block), fill=GREY) for block in range(NUM_BLOCKS))
    yield from cells(plan, grid)
    for tick, row in enumerate(rows):
        yield text(grid.left - 10, grid.y(tick + 0.5) + 5, str(tick), anchor="end", fill=GREY)
        for block, step in enumerate(row):
            if (tick, block) in queue:
                fill = "#fff" if plan.schedule.levels[step] > 0.5 else INK
                yield text(grid.x(block + 0.5), grid.y(tick + 0.5) + 5, str(step), fill=fill)
    yield text(grid.left - 10, TOP - 8, "tick ↓", anchor="end", fill=GREY)
    yield border(plan, grid)
    yield from marks(grid)


def marks(grid: Grid) -> Iterator[str]:
    """The queue at tick 4, the block that has left by tick 5, and the one that enters at tick 7."""
    full, leaving, entering = NUM_STEPS - 1, NUM_STEPS, NUM_BLOCKS - 1
    right, left = grid.x(NUM_BLOCKS) + 12, grid.left - 30
    style = f'rx="4" fill="none" stroke="{INK}" stroke-width="3"'
    yield rectangle(grid.x(0), grid.y(full), NUM_STEPS * grid.column, grid.row, style)
    yield from label(right, grid.y(full + 0.5), ("the queue", f"at tick {full}"), "start", INK)
    y = grid.y(leaving + 0.5)
    yield arrow(left, y, left - 26)
    yield from label(left - 32, y, ("head", "leaves clean"), "end", QUEUE)
    y = grid.y(entering + 0.5)
    yield arrow(right + 22, y, grid.x(NUM_BLOCKS) + 3)
    yield from label(right + 28, y, ("new noise", "enters"), "start", QUEUE)


def label(x: float, y: float, lines: tuple[str, str], anchor: str, fill: str) -> Iterator[str]:
    """Two lines of bold text, centred on y."""
    for line, words in enumerate(lines):
        yield text(x, y - 3 + 17 * line, words, anchor=anchor, fill=fill, bold=True)


def small_matrix(plan: Plan, grid: Grid) -> Iterator[str]:
    """The matrix at another lag: cells, border, and how many ticks it takes."""
    lag, ticks = plan.method.lag, len(matrix_rows(plan)) - 1
    middle = grid.x(NUM_BLOCKS / 2)
    yield text(middle, TOP - 62, f"lag {lag}", size=17, bold=True)
    yield text(middle, TOP - 42, LAGS[lag], size=14)
    yield from (text(grid.x(block + 0.5), TOP - 8, str(block), size=12, fill=GREY) for block in (0, NUM_BLOCKS - 1))
    yield from cells(plan, grid)
    yield border(plan, grid)
    yield text(middle, grid.y(ticks + 1) + 17, f"{ticks} ticks", size=13, fill=GREY)


def scale(plan: Plan, left: float, top: float) -> Iterator[str]:
    """The colour of each level, and what large and small cells are."""
    levels: Sequence[float] = plan.schedule.levels
    yield text(left, top - 9, "noise level : steps taken", anchor="start")
    for step, level in enumerate(levels):
        x, fill = left + 62 * step, "#fff" if level > 0.5 else INK
        yield rectangle(x, top, 62, 26, f'fill="{colour(level)}" stroke="#8c959f" stroke-width="0.5"')
        yield text(x + 31, top + 18, f"{level:.1f} : {step}", fill=fill)
    x = left + 62 * len(levels) + 36
    yield rectangle(x, top - 11, 26, 16, f'fill="{colour(0.6)}" stroke="{QUEUE}" stroke-width="2"')
    yield text(x + 36, top + 2, "in the queue: takes a step in this tick", anchor="start")
    yield rectangle(x + 8, top + 17, 10, 7, f'fill="{colour(1)}" stroke="#8c959f" stroke-width="0.5"')
    yield text(x + 36, top + 25, "outside: waits as noise (dark) or has left clean (light)", anchor="start")


def drawing() -> str:
    """The whole picture."""
    plans = {lag: small_plan(lag) for lag in LAGS}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">',
        "<title>The rolling matrix: noise level of each block at each tick, for four lags</title>",
        rectangle(0, 0, WIDTH, HEIGHT, 'fill="#fff"'),
        *large_matrix(plans[1], Grid(left=172, column=40, row=30)),
    ]
    for number, plan in enumerate(plans.values()):
        grid = Grid(left=654 + 104 * number, column=10, row=9)
        if number == 0:
            for tick in range(0, len(matrix_rows(plans[NUM_STEPS])), 10):
                parts.append(text(grid.left - 8, grid.y(tick + 0.5) + 4, str(tick), size=12, anchor="end", fill=GREY))
        parts.extend(small_matrix(plan, grid))
    parts.extend(scale(plans[1], 50, HEIGHT - 40))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "docs" / "rolling-matrix.svg"
    Path(sys.argv[1] if len(sys.argv) > 1 else default).write_text(drawing(), encoding="utf-8")
