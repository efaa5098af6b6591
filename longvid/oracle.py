"""The oracle: reads from the pixels of a procedural film what it shows, second by second. No learned weights.

Shape is the outline of `longvid.worlds` that covers a piece best, over all angles at equal area. Motion is what changes
most over about two seconds: the place (along a line, a circle, up and down), the radius or the angle. A thing that is
melted, wanders or stands still is said to be so: it is no shape, and no motion, that a world has. Plain numpy.

Axes: f frame, h height, w width, s shape, n fold of a symmetry.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np

from longvid.backdrop import read_backdrop
from longvid.pieces import GRID, REACH, Piece, find_pieces, shrink
from longvid.worlds import COLOURS, SHAPES, Thing, World, draw

UNCLEAR, STILL, WANDERS, UNSEEN = "unclear", "still", "wanders", "unseen"
"""Readings that no world has: an outline unlike all shapes; no motion, one that is none of ours, too little to tell."""

WINDOW = 2.0  # seconds over which a motion is read
_LEAST_FIT = 0.75  # intersection over union below which an outline is no shape
_FINE = 5  # outlines are drawn so many times finer than the grid
_SOFTNESS = (0.0, 0.15, 0.25)  # how far outlines may be rounded, in radii
_FOLDS = (3, 4, 5)
_FOLD_OF = {"square": 4, "triangle": 3, "star": 5, "cross": 4}
_PLACE, _PULSE, _TURN = 0.018, 0.07, 0.7  # the least motion: deviation of place / side, of log radius; radians per s
_TURNS_BACK = 0.35  # deviation from a straight line in time, as a share of all; a mere fall (y = t^2) has 0.25
_STRAIGHT = 0.22  # deviation across a line, as a share of that along it


@dataclass(frozen=True, kw_only=True)
class ThingReading:
    """One thing in one second: `fit` is the mean intersection over union with the best shape.

    x, y are fractions of width and height, the radius (of a disc of equal area) one of the shorter side.
    """

    colour: str
    shape: str
    motion: str
    fit: float
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is seen in the second that begins at `second`: pieces counted, and the largest thing of each colour."""

    second: int
    count: int
    background: str
    background_colours: tuple[str, ...]
    things: tuple[ThingReading, ...]


@dataclass
class _Track:
    """The largest piece of one colour through the film; NaN where there is none."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    fits: np.ndarray  # (f, s)
    moments: np.ndarray  # (f, n), complex
    clear: np.ndarray

    @classmethod
    def empty(cls, num_frames: int) -> "_Track":
        """Nothing seen."""
        x, y, radius = np.full((3, num_frames), np.nan)
        fits, moments = np.zeros((num_frames, len(SHAPES))), np.zeros((num_frames, len(_FOLDS)), complex)
        return cls(x, y, radius, fits, moments, np.zeros(num_frames, bool))

    def add(self, frame: int, piece: Piece, fits: np.ndarray, moments: np.ndarray) -> None:
        """Enter what was measured in a frame."""
        self.x[frame], self.y[frame], self.radius[frame] = piece.x, piece.y, piece.radius
        self.fits[frame], self.moments[frame], self.clear[frame] = fits, moments, not piece.touches

    def chosen(self, frames: slice) -> np.ndarray:
        """Indices of frames in which nothing hides it; where they are less than half, all in which it is seen."""
        seen = np.flatnonzero(~np.isnan(self.x[frames])) + frames.start
        clear = seen[self.clear[seen]]
        return clear if 2 * len(clear) >= len(seen) else seen


def read_film(frames: np.ndarray, fps: float) -> list[Reading]:
    """Read uint8 (f, h, w, 3) second by second; what is left at the end joins the last second if it is under half.

    Raises ValueError for frames of another kind, and for fewer than two.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 2 or fps <= 0:
        raise ValueError(f"frames of {frames.dtype} {frames.shape} at {fps} fps must be uint8 (n, height, width, 3)")
    frames, seconds = shrink(frames), seconds_of(len(frames), fps)
    backdrops = [read_backdrop(frames[(part.start + part.stop) // 2]) for part in seconds]
    pieces = [piece for part, backdrop in zip(seconds, backdrops, strict=True)
              for piece in find_pieces(frames[part], backdrop)]  # fmt: skip
    tracks = _tracks(pieces)
    h, w = frames.shape[1:3]
    readings = []
    for second, (part, backdrop) in enumerate(zip(seconds, backdrops, strict=True)):
        half = (part.stop - part.start) / 2
        seen = [k for k, track in tracks.items() if (~np.isnan(track.x[part])).sum() >= half]
        window = _window(part, len(frames), fps)
        things = [_read_thing(k, tracks[k], part, window, (h, w, fps)) for k in seen]
        readings.append(
            Reading(
                second=second,
                count=int(np.median([len(found) for found in pieces[part]])),
                background=backdrop.background,
                background_colours=backdrop.colours,
                things=tuple(sorted(things, key=lambda thing: -thing.radius)),
            )
        )
    return readings


def seconds_of(num_frames: int, fps: float) -> list[slice]:
    """The frames of each second; a rest of under half a second joins the last."""
    count = max(1, int(num_frames / fps + 0.5))
    cuts = [round(i * fps) for i in range(count)] + [num_frames]
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _window(part: slice, num_frames: int, fps: float) -> slice:
    """The `WINDOW` around a second, moved where it would leave the film."""
    length = min(num_frames, round(WINDOW * fps))
    start = min(max((part.start + part.stop - length) // 2, 0), num_frames - length)
    return slice(start, start + length)


def _tracks(pieces: list[list[Piece]]) -> dict[int, _Track]:
    """Measure the largest piece of each colour in each frame."""
    largest: dict[int, list[tuple[int, Piece]]] = defaultdict(list)
    for frame, found in enumerate(pieces):
        for piece in reversed(found):
            if largest[piece.colour] and largest[piece.colour][-1][0] == frame:
                largest[piece.colour].pop()
            largest[piece.colour].append((frame, piece))
    tracks = {}
    for colour, entries in largest.items():
        track = tracks[colour] = _Track.empty(len(pieces))
        for frame, piece in entries:
            track.add(frame, piece, *_compare(piece.outline.ravel()))
    return tracks


def _compare(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best intersection over union with each shape (s,), and moments of each fold (n,), for an outline (g g,)."""
    templates, owner = _templates()
    inside = np.minimum(templates, outline).sum(1)
    union = templates.sum(1) + outline.sum() - inside
    fits = np.zeros(len(SHAPES))
    np.maximum.at(fits, owner, inside / union)
    harmonics, weight = _harmonics()
    return fits, harmonics @ outline / max(weight @ outline, 1e-6)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Outlines (t, g g) of all shapes at all angles, of the area of a disc of radius 1, and the shape of each (t,).

    Besides the true ones there are rounded ones, since autoencoders and models round off what is small.
    """
    outlines, owner = [], []
    for index, shape in enumerate(SHAPES):
        num_angles = 12 if shape in _FOLD_OF else 1
        for turns in np.arange(num_angles) / num_angles / _FOLD_OF.get(shape, 1):
            for softness in _SOFTNESS:
                outlines.append(_outline(shape, turns, softness).ravel())
                owner.append(index)
    return np.array(outlines, np.float32), np.array(owner)


def _outline(shape: str, turns: float, softness: float) -> np.ndarray:
    """A shape in the middle of a square, its corners rounded: (g, g) in 0..1, of the area of a disc of radius 1.

    Rounded is what is over a half after a Gaussian blur, whose deviation is given in such radii.
    """
    picture = _rounded(shape, _radius(shape, softness), turns, softness)
    return picture.reshape(GRID, _FINE, GRID, _FINE).mean((1, 3))


@cache
def _radius(shape: str, softness: float) -> float:
    """The radius that gives a shape its area, as a part of the side."""
    radius, wanted = 0.5 / REACH, np.pi / (2 * REACH) ** 2
    for _ in range(3):
        radius *= np.sqrt(wanted / _rounded(shape, radius, 0.0, softness).mean())
    return radius


def _rounded(shape: str, radius: float, turns: float, softness: float) -> np.ndarray:
    picture = _drawn(shape, radius, turns, _FINE * GRID)
    return (_blur(picture, softness * len(picture) / (2 * REACH)) > 0.5) * np.float32(1) if softness else picture


def _drawn(shape: str, radius: float, turns: float, side: int) -> np.ndarray:
    """A white shape before black: (side, side) in 0..1; radius is a part of the side."""
    thing = Thing(shape=shape, colour="white", motion="spins", size="small", speed="slow", x=0.5, y=0.5,
                  radius=radius, travel=0.0, period=1.0, phase=turns)  # fmt: skip
    world = World(background="plain", colours=("black",), things=(thing,), camera="still", tile=0.2, offset=0.0,
                  pan_speed=0.0)  # fmt: skip
    picture = draw(world, 1, height=side, width=side)[0, ..., 0].astype(np.float32)
    return (picture - picture.min()) / np.ptp(picture)


def _blur(picture: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian blur of a square picture."""
    place = np.arange(len(picture))
    kernel = np.exp(-0.5 * ((place[:, None] - place) / deviation) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ picture @ kernel.T


@cache
def _harmonics() -> tuple[np.ndarray, np.ndarray]:
    """|z|^2 (z / |z|)^n for each fold (n, g g), and |z|^2 (g g,)."""
    z = _grid()
    return np.array([abs(z) ** 2 * (z / abs(z)) ** n for n in _FOLDS]), abs(z) ** 2


def _grid() -> np.ndarray:
    """Places (g g,) of an outline's grid as complex numbers, y downwards."""
    line = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH
    return (line[None] + 1j * line[:, None]).ravel()


def _read_thing(colour: int, track: _Track, part: slice, window: slice, scale: tuple[int, int, float]) -> ThingReading:
    """One thing in one second; its motion from the window around it."""
    frames = track.chosen(part)
    fits = track.fits[frames].mean(0)
    best = int(fits.argmax())
    shape = SHAPES[best] if fits[best] >= _LEAST_FIT else UNCLEAR
    return ThingReading(
        colour=tuple(COLOURS)[colour],
        shape=shape,
        motion=_read_motion(track, shape, window, *scale),
        fit=float(fits[best]),
        x=float(track.x[frames[len(frames) // 2]] / scale[1]),
        y=float(np.median(track.y[frames]) / scale[0]),
        radius=float(np.median(track.radius[frames]) / min(scale[:2])),
    )


def _read_motion(track: _Track, shape: str, window: slice, h: int, w: int, fps: float) -> str:
    """What changes most over the window, each change measured in the least that counts as a motion."""
    frames = track.chosen(window)
    if len(frames) < 0.6 * (window.stop - window.start) or len(frames) < 4:
        return UNSEEN
    times = frames / fps
    x = np.unwrap(track.x[frames], period=w) / min(h, w)
    y = track.y[frames] / min(h, w)
    moved = {
        "place": np.hypot(x.std(), y.std()) / _PLACE,
        "pulses": np.log(track.radius[frames]).std() / _PULSE,
        "spins": abs(_turning(track.moments[frames], times, shape)) / _TURN,
    }
    most = max(moved, key=moved.get)
    if moved[most] < 1:
        return STILL
    return _path(x, y, times) if most == "place" else most


def _path(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> str:
    """The motion of a centre: across, up and down, or round."""
    if y.std() < _STRAIGHT * x.std():
        across = np.polyfit(times, x, 1)
        if (x - np.polyval(across, times)).std() < _STRAIGHT * x.std():
            return "drifts right" if across[0] > 0 else "drifts left"
        return WANDERS
    if x.std() < _STRAIGHT * y.std():
        rest = y - np.polyval(np.polyfit(times, y, 1), times)
        return "bounces" if rest.std() > _TURNS_BACK * y.std() else WANDERS
    # A circle (Kasa's fit): x^2 + y^2 = 2 a x + 2 b y + c.
    terms = np.stack([2 * x, 2 * y, np.ones_like(x)], 1)
    a, b, _ = np.linalg.lstsq(terms, x**2 + y**2, rcond=None)[0]
    far = np.hypot(x - a, y - b)
    turned = np.ptp(np.unwrap(np.arctan2(y - b, x - a)))
    return "circles" if far.std() < _STRAIGHT * far.mean() and 0.06 < far.mean() < 0.3 and turned > 2 else WANDERS


def _turning(moments: np.ndarray, times: np.ndarray, shape: str) -> float:
    """Radians per second from the phases (f, n) of the outline's moments; 0 where they do not go round evenly."""
    sizes = np.abs(moments).mean(0)
    fold = _FOLD_OF.get(shape, _FOLDS[int(sizes.argmax())])
    if shape in ("ball", "ring") or sizes[_FOLDS.index(fold)] < 0.02:
        return 0.0
    phase = np.unwrap(np.angle(moments[:, _FOLDS.index(fold)]))
    line = np.polyfit(times, phase, 1)
    return float(line[0] / fold) if (phase - np.polyval(line, times)).std() < 0.6 else 0.0
