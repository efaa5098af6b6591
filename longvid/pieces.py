"""Coloured pieces in the frames of a procedural film: where they are, how large, what outline.

A pixel belongs to the colour that is nearest, of those that things in sight have and all mixtures of the background's.
A piece is what hangs together; left and right border are one, since things that drift leave at one and enter at the
other. Plain numpy.

Axes: f frame, h height, w width, g side of an outline's grid.
"""

from dataclasses import dataclass

import numpy as np

from longvid.backdrop import Backdrop
from longvid.worlds import COLOURS

_RGB = np.array(list(COLOURS.values()), np.float32)
_SIDE = 128
_CORE_AREA = 15  # pixels of a picture of 128 x 128 that are surrounded by their own colour
_MIN_AREA = 60  # pixels of a picture of 128 x 128: less is a speck
_TOUCH = 2  # pixels between pieces that hide nothing of each other
GRID, REACH = 36, 1.7
"""Side of an outline's grid, and how many times sqrt(area / pi) it reaches from the centre."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Area in pixels, centre in pixels (x modulo the width), outline (g, g) in 0..1, scaled to unit area.

    `touches`: another piece is so near that it may hide a part of this one.
    """

    colour: int
    area: int
    x: float
    y: float
    outline: np.ndarray
    touches: bool

    @property
    def radius(self) -> float:
        """Of a disc of the same area."""
        return float(np.sqrt(self.area / np.pi))


def shrink(frames: np.ndarray) -> np.ndarray:
    """Frames (f, h, w, 3) of about 128 to 256 pixels along the shorter side, by means over squares; small ones stay."""
    f, h, w, _ = frames.shape
    step = min(h, w) // _SIDE
    if step < 2:
        return frames
    cut = frames[:, : h // step * step, : w // step * step]
    squares = cut.reshape(f, h // step, step, w // step, step, 3).astype(np.float32)
    return (squares.mean((2, 4)) + 0.5).astype(np.uint8)


def find_pieces(frames: np.ndarray, backdrop: Backdrop) -> list[list[Piece]]:
    """Pieces of each frame, uint8 (f, h, w, 3), largest first; `colour` is an index of `worlds.COLOURS`."""
    f, h, w, _ = frames.shape
    pixels = frames.reshape(-1, 3).astype(np.float32)
    distances = np.empty((1 + len(_RGB), len(pixels)), np.float32)
    distances[0] = backdrop.distance(pixels)
    squares = np.einsum("nc,nc->n", pixels, pixels)
    distances[1:] = squares - 2 * _RGB @ pixels.T + np.einsum("kc,kc->k", _RGB, _RGB)[:, None]
    unit = (min(h, w) / _SIDE) ** 2
    owner = distances.argmin(0).reshape(f, h, w)
    seen = [k for k in range(1, len(distances)) if _core(owner == k).sum() >= unit * _CORE_AREA * f / 2]
    if not seen:
        return [[] for _ in range(f)]
    owner = np.array([0, *seen], np.uint8)[distances[[0, *seen]].argmin(0)].reshape(f, h, w)
    return [_pieces_of(one, seen, unit) for one in owner]


def _pieces_of(owner: np.ndarray, seen: list[int], unit: float) -> list[Piece]:
    """Pieces of one frame, given the colour (h, w) of each pixel, 0 being background."""
    found = []
    for k in seen:
        mask = owner == k
        if mask.sum() < unit * _MIN_AREA:
            continue
        labels, num_labels = label(mask)
        areas = np.bincount(labels.ravel(), minlength=num_labels + 1)
        for one in range(1, num_labels + 1):
            if areas[one] >= unit * _MIN_AREA:
                piece = labels == one
                if _core(piece[None]).sum() >= unit * _CORE_AREA:
                    found.append((k, int(areas[one]), piece))
    found.sort(key=lambda entry: -entry[1])
    touching = _touching([mask for *_, mask in found])
    return [_measure(k - 1, area, mask, touch) for (k, area, mask), touch in zip(found, touching, strict=True)]


def _touching(masks: list[np.ndarray]) -> list[bool]:
    """Which of the pieces (h, w) come near another."""
    if len(masks) < 2:
        return [False] * len(masks)
    grown = [_grow(mask) for mask in masks]
    return [any((a & b).any() for j, b in enumerate(grown) if j != i) for i, a in enumerate(grown)]


def _grow(mask: np.ndarray) -> np.ndarray:
    """Reach by half of `_TOUCH` and one pixel more; round the border at left and right."""
    for _ in range(_TOUCH // 2 + 1):
        across = mask | np.roll(mask, 1, 1) | np.roll(mask, -1, 1)
        across[1:] |= mask[:-1]
        across[:-1] |= mask[1:]
        mask = across
    return mask


def _core(mask: np.ndarray) -> np.ndarray:
    """Pixels (f, h, w) whose eight neighbours are in the mask too."""
    rows = mask[:, 1:-1] & mask[:, :-2] & mask[:, 2:]
    return rows & np.roll(rows, 1, 2) & np.roll(rows, -1, 2)


def _measure(colour: int, area: int, mask: np.ndarray, touches: bool) -> Piece:
    """Centre and outline of a piece (h, w) that may hang over the border at left and right."""
    h, w = mask.shape
    columns = mask.sum(0)
    turn = np.arange(w) * (2 * np.pi / w)
    middle = int(np.arctan2(columns @ np.sin(turn), columns @ np.cos(turn)) / (2 * np.pi) * w)
    shift = w // 2 - middle
    mask, columns = np.roll(mask, shift, 1), np.roll(columns, shift)
    x, y = columns @ np.arange(w) / area, mask.sum(1) @ np.arange(h) / area
    steps = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH * np.sqrt(area / np.pi)
    outline = _sample_axis(_sample_axis(mask.astype(np.float32), y + steps).T, x + steps).T
    return Piece(colour=colour, area=area, x=(x - shift + 0.5) % w, y=y + 0.5, outline=outline, touches=touches)


def _sample_axis(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows between rows, linearly; nothing outside."""
    low = np.floor(places).astype(int)
    weight = (places - low)[:, None].astype(np.float32)
    padded = np.pad(picture, ((1, 1), (0, 0)))
    first, second = (np.clip(low + k + 1, 0, len(picture) + 1) for k in (0, 1))
    return padded[first] * (1 - weight) + padded[second] * weight


def label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Number what hangs together (four neighbours; left and right border are one): (h, w) of 0..n, and n."""
    h, w = mask.shape
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (rows, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first = np.searchsorted(rows, np.arange(h + 1)).tolist()
    for i, (row, start, end) in enumerate(runs):
        if end == w and runs[first[row]][1] == 0:
            parent[root(i)] = root(first[row])
        for j in range(first[row - 1], first[row]) if row else ():
            if runs[j][1] < end and start < runs[j][2]:
                parent[root(j)] = root(i)
    labels, names = np.zeros((h, w), np.int32), {}
    for i, (row, start, end) in enumerate(runs):
        labels[row, start:end] = names.setdefault(root(i), len(names) + 1)
    return labels, len(names)
