"""Curves over time in small panels, as an image. numpy only.

A panel has a title, a range of values, and curves: the mean of all videos, strong, over those of each video, faint.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longvid.contact_sheet import GLYPHS, INK, PAPER

LETTERS = {
    "a": "..... ..... .###. ....# .#### #...# .####",
    "b": "#.... #.... ####. #...# #...# #...# ####.",
    "c": "..... ..... .###. #.... #.... #...# .###.",
    "d": "....# ....# .#### #...# #...# #...# .####",
    "e": "..... ..... .###. #...# ##### #.... .###.",
    "f": "..## .#.. .#.. ###. .#.. .#.. .#..",
    "g": "..... ..... .#### #...# .#### ....# .###.",
    "h": "#.... #.... ####. #...# #...# #...# #...#",
    "i": ".#. ... ##. .#. .#. .#. ###",
    "j": "..#. .... .##. ..#. ..#. #.#. .#..",
    "k": "#... #... #..# #.#. ##.. #.#. #..#",
    "l": "##. .#. .#. .#. .#. .#. ###",
    "m": "..... ..... ##.#. #.#.# #.#.# #.#.# #.#.#",
    "n": "..... ..... ####. #...# #...# #...# #...#",
    "o": "..... ..... .###. #...# #...# #...# .###.",
    "p": "..... ..... ####. #...# ####. #.... #....",
    "q": "..... ..... .#### #...# .#### ....# ....#",
    "r": ".... .... #.## ##.. #... #... #...",
    "s": ".... .... .### #... .##. ...# ###.",
    "t": ".#.. .#.. ###. .#.. .#.. .#.. ..##",
    "u": "..... ..... #...# #...# #...# #..## .##.#",
    "v": "..... ..... #...# #...# #...# .#.#. ..#..",
    "w": "..... ..... #...# #...# #.#.# #.#.# .#.#.",
    "x": "..... ..... #...# .#.#. ..#.. .#.#. #...#",
    "y": "..... ..... #...# #...# .#### ....# .###.",
    "z": "..... ..... ##### ...#. ..#.. .#... #####",
    "-": ".... .... .... #### .... .... ....",
    "%": "##..# ##..# ...#. ..#.. .#... #..## #..##",
    ",": ".. .. .. .. .. .# #.",
    "/": "....# ....# ...#. ..#.. .#... #.... #....",
    "+": "..... ..#.. ..#.. ##### ..#.. ..#.. .....",
}
"""What titles need beside the digits of contact sheets; 7 rows high."""

WIDTH, HEIGHT, GAP, LEFT, SCALE = 380, 150, 14, 76, 2
"""Pixels of a panel's plot, between panels, left of a plot for its range; pixels of a dot of the font."""

STRONG, FAINT, GRID = (20, 80, 170), (190, 208, 232), 228


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves (a row of seconds each; NaN where there is no value) and the range shown; None: that of the values."""

    title: str
    curves: Sequence[np.ndarray]
    low: float | None = None
    high: float | None = None


def draw_panels(panels: Sequence[Panel], columns: int = 3) -> np.ndarray:
    """Panels in rows of `columns`: uint8 (H, W, 3). Raises ValueError if there is none."""
    if not panels:
        raise ValueError("no panels given; a chart needs at least one")
    images = [_draw_panel(panel) for panel in panels]
    rows = -(-len(images) // columns)
    cell_height, cell_width, _ = images[0].shape
    sheet = np.full((GAP + rows * (cell_height + GAP), GAP + columns * (cell_width + GAP), 3), PAPER, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * (cell_height + GAP), GAP + i % columns * (cell_width + GAP)
        sheet[top : top + cell_height, left : left + cell_width] = image
    return sheet


def _draw_panel(panel: Panel) -> np.ndarray:
    """Title above, range at the left, seconds below."""
    line = 7 * SCALE + 8
    image = np.full((line + HEIGHT + line, LEFT + WIDTH, 3), PAPER, np.uint8)
    longest = max(len(curve) for curve in panel.curves)
    low, high = _range(panel)
    _write(image, panel.title, 0, LEFT)
    for value, row in ((high, line), (low, line + HEIGHT - 7 * SCALE)):
        text = _number(value)
        _write(image, text, row, max(0, LEFT - 8 - text_mask(text, SCALE).shape[1]))
    _write(image, "0", line + HEIGHT + 8, LEFT)
    end = f"{longest} s"
    _write(image, end, line + HEIGHT + 8, LEFT + WIDTH - text_mask(end, SCALE).shape[1])
    plot = image[line : line + HEIGHT, LEFT:]
    plot[[0, HEIGHT // 4, HEIGHT // 2, 3 * HEIGHT // 4, -1]] = GRID
    plot[:, [0, -1]] = GRID
    for curve in panel.curves if len(panel.curves) > 1 else ():
        _plot(plot, curve, longest, low, high, FAINT, 1)
    _plot(plot, mean_curve(panel.curves), longest, low, high, STRONG, 3)
    return image


def _range(panel: Panel) -> tuple[float, float]:
    values = np.concatenate([np.asarray(curve, float) for curve in panel.curves])
    values = values[np.isfinite(values)]
    low = panel.low if panel.low is not None else float(values.min(initial=0.0))
    high = panel.high if panel.high is not None else float(values.max(initial=low))
    return low, high if high > low else low + 1


def mean_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the curves that have a value in each second; NaN where none has."""
    table = np.full((len(curves), max(len(curve) for curve in curves)), np.nan)
    for row, curve in zip(table, curves, strict=True):
        row[: len(curve)] = curve
    known = np.isfinite(table)
    total = np.where(known, table, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _plot(plot: np.ndarray, curve: np.ndarray, longest: int, low: float, high: float, ink, thick: int) -> None:
    """Draw a curve; second i stands at its middle. A value alone is a dot."""
    h, w, _ = plot.shape
    places = (np.arange(len(curve)) + 0.5) / longest * (w - 1)
    rows = (1 - (np.asarray(curve, float) - low) / (high - low)) * (h - 1)
    known = np.isfinite(rows)
    for i in np.flatnonzero(known):
        j = i + 1 if i + 1 < len(curve) and known[i + 1] else i
        count = int(max(abs(places[j] - places[i]), abs(rows[j] - rows[i]))) + 2
        x = np.linspace(places[i], places[j], count).round().astype(int)
        y = np.linspace(rows[i], rows[j], count).round().astype(int)
        for shift in range(-(thick // 2), thick - thick // 2):
            plot[np.clip(y + shift, 0, h - 1), np.clip(x, 0, w - 1)] = ink


def _number(value: float) -> str:
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text if "e" not in text else "0"


def _write(image: np.ndarray, text: str, top: int, left: int) -> None:
    mask = text_mask(text, SCALE)[:, : image.shape[1] - left]
    image[top : top + len(mask), left : left + mask.shape[1]][mask] = INK


def text_mask(text: str, scale: int) -> np.ndarray:
    """Lower-case letters, digits and a few signs as a mask (7 scale, width)."""
    glyphs = {**GLYPHS, **LETTERS}
    letters = [np.array([[dot == "#" for dot in row] for row in glyphs[c].split(" ")]) for c in text]
    mask = np.concatenate([np.pad(letter, ((0, 0), (0, 1))) for letter in letters], axis=1)[:, :-1]
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)
