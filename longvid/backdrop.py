"""What stands behind the things of a procedural film, read from the pixels of one frame.

The palette and the patterns are those of `longvid.worlds`. Every background it can draw is a hypothesis (one colour, a
gradient of two, two that alternate), and the one that leaves the least unexplained is taken. Plain numpy.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

import numpy as np

from longvid.worlds import BACKGROUND_COLOURS

_NAMES = tuple(BACKGROUND_COLOURS)
_RGB = np.array(list(BACKGROUND_COLOURS.values()), np.float32)
_CAP = 50.0  # an RGB distance beyond which a pixel is no more unlike a colour than any other
_PENALTY = 1.5  # what a second colour must explain, mean RGB distance over the picture
_NEAR, _FAR = 55, 220  # RGB distances between two colours of one background
_ROWS = 64  # the picture is looked at in about so many rows


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """A background: a name of `worlds.BACKGROUNDS`, names of its colours, and their RGB `(1 or 2, 3)` as found."""

    background: str
    colours: tuple[str, ...]
    rgb: np.ndarray

    def distance(self, pixels: np.ndarray) -> np.ndarray:
        """Squared RGB distance of pixels (n, 3) to the nearest mixture of the colours: (n,)."""
        first, along = self.rgb[0], self.rgb[-1] - self.rgb[0]
        rest = pixels - first
        length = float(along @ along)
        if length:
            rest = rest - np.clip(rest @ along / length, 0, 1)[:, None] * along
        return np.einsum("nc,nc->n", rest, rest)


def read_backdrop(frame: np.ndarray) -> Backdrop:
    """The background of a frame, uint8 (h, w, 3)."""
    step = max(1, round(min(frame.shape[:2]) / _ROWS))
    picture = frame[::step, ::step].astype(np.float32)
    far = np.linalg.norm(picture[:, :, None] - _RGB, axis=-1)  # (h, w, colour)
    near = np.minimum(far, _CAP)
    costs = {("plain", (i,)): near[..., i].mean() for i in range(len(_NAMES))}
    for pair in _pairs():
        costs["two", pair] = np.minimum(near[..., pair[0]], near[..., pair[1]]).mean() + _PENALTY
    for pair in (both for two in _pairs() for both in permutations(two)):
        ramp = np.linspace(0, 1, len(picture), dtype=np.float32)[:, None, None]
        wanted = _RGB[pair[0]] + ramp * (_RGB[pair[1]] - _RGB[pair[0]])
        rest = picture - wanted
        costs["gradient", pair] = np.minimum(np.sqrt(np.einsum("hwc,hwc->hw", rest, rest)), _CAP).mean() + _PENALTY
    (kind, chosen), _ = min(costs.items(), key=lambda item: item[1])
    if kind == "gradient":
        return Backdrop(background=kind, colours=tuple(_NAMES[i] for i in chosen), rgb=_RGB[list(chosen)])
    owner = far[..., list(chosen)].argmin(-1)
    seen = far[..., list(chosen)].min(-1) < 1.2 * _CAP
    rgb = [_median(picture[(owner == k) & seen], _RGB[i]) for k, i in enumerate(chosen)]
    kind = "plain" if kind == "plain" else _pattern(np.where(seen, 2.0 * owner - 1, 0))
    return Backdrop(background=kind, colours=tuple(_NAMES[i] for i in chosen), rgb=np.stack(rgb))


def _median(pixels: np.ndarray, default: np.ndarray) -> np.ndarray:
    return np.median(pixels, axis=0).astype(np.float32) if len(pixels) else default


@cache
def _pairs() -> tuple[tuple[int, int], ...]:
    """Colours that a background may join."""
    pairs = combinations(range(len(_NAMES)), 2)
    return tuple((i, j) for i, j in pairs if _NEAR <= np.linalg.norm(_RGB[i] - _RGB[j]) <= _FAR)


def _pattern(sign: np.ndarray) -> str:
    """How two colours alternate: -1 and 1 (h, w), 0 where a thing is. What is constant along its own lines wins."""
    rows, columns = np.indices(sign.shape)
    if _agreement(sign, columns) > 0.8:
        return "stripes"
    if _agreement(sign, columns + rows) > 0.65:
        return "diagonal stripes"
    return "checks"


def _agreement(sign: np.ndarray, line: np.ndarray) -> float:
    """How far the pixels of each line agree, 0 to 1."""
    total = np.bincount(line.ravel(), sign.ravel())
    return float(np.abs(total).sum() / max(np.abs(sign).sum(), 1))
