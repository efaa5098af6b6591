"""A contact sheet: frames of a video in a grid, the time of each under it. numpy only; knows no video file.

`choose` says which frames to keep while a stream of known length passes, `contact_sheet` lays them out, `write_png`
saves the sheet.
"""

import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np

PAPER, INK = 250, 60
"""Grey levels of background and labels."""

GLYPHS = {
    "0": ".###. #...# #...# #...# #...# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "##### ...#. ..#.. ...#. ....# #...# .###.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. .#... .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    ".": ". . . . . . #",
    ":": ". . # . # . .",
    "s": ".... .... .### #... .##. ...# ###.",
    " ": ".. .. .. .. .. .. ..",
}
"""A bitmap font, 7 rows high and up to 5 columns wide."""


def choose(num_frames: int, count: int) -> list[int]:
    """Indices of `count` frames spread evenly over `num_frames`, first and last among them; all if there are fewer."""
    if num_frames < 1 or count < 1:
        raise ValueError(f"num_frames={num_frames}, count={count} must be positive; try 81 and 16")
    count = min(count, num_frames)
    gaps = max(count - 1, 1)
    return [(2 * i * (num_frames - 1) + gaps) // (2 * gaps) for i in range(count)]


def label(seconds: float) -> str:
    """Time as it is printed: "12.5 s", or "1:05.0" from a minute on."""
    tenths = round(10 * seconds)
    if tenths < 600:
        return f"{tenths / 10:.1f} s"
    return f"{tenths // 600}:{tenths % 600 / 10:04.1f}"


def contact_sheet(frames: np.ndarray, times: Sequence[float], columns: int = 8) -> np.ndarray:
    """Lay frames uint8 `(n, h, w, 3)` out in rows of `columns`, `times` (seconds) below: uint8 `(H, W, 3)`.

    Raises ValueError for frames of another shape, another number of times, or no columns.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames of {frames.dtype} {frames.shape} must be uint8 (n, height, width, 3), n at least 1")
    if len(times) != len(frames) or columns < 1:
        raise ValueError(f"{len(times)} times, {columns} columns: {len(frames)} frames need {len(frames)} times, try 8")
    n, height, width, _ = frames.shape
    columns = min(columns, n)
    scale = max(1, round(width / 160))
    gap = 4 * scale
    labels = [draw_text(label(seconds), scale) for seconds in times]
    cell_width = max(width, *(text.shape[1] + gap for text in labels))
    cell_height = height + 7 * scale + 2 * gap
    rows = -(-n // columns)
    sheet = np.full((gap + rows * (cell_height + gap), gap + columns * (cell_width + gap), 3), PAPER, np.uint8)
    for i, (frame, text) in enumerate(zip(frames, labels, strict=True)):
        top = gap + i // columns * (cell_height + gap)
        left = gap + i % columns * (cell_width + gap)
        inset = (cell_width - width) // 2
        sheet[top : top + height, left + inset : left + inset + width] = frame
        below, inset = top + height + gap, (cell_width - text.shape[1]) // 2
        sheet[below : below + len(text), left + inset : left + inset + text.shape[1]][text] = INK
    return sheet


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 `(height, width, 3)` as a PNG file (RFC 2083: 8-bit RGB, rows unfiltered)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image of {image.dtype} {image.shape} must be uint8 (height, width, 3)")
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a row names its filter: 0 is none
    rows[:, 1:] = image.reshape(height, -1)
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    ]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def draw_text(text: str, scale: int) -> np.ndarray:
    """The text as a mask `(7 scale, width)`, one column of space between letters."""
    letters = [np.array([[dot == "#" for dot in row] for row in GLYPHS[c].split(" ")]) for c in text]
    mask = np.concatenate([np.pad(letter, ((0, 0), (0, 1))) for letter in letters], axis=1)[:, :-1]
    return mask.repeat(scale, axis=0).repeat(scale, axis=1)
