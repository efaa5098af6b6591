"""Procedural films: coloured shapes that move for ever before a background.

The embedded model is trained and judged on them. A world is a frozen value, a film is a pure function of (world, frame
index), so a film has no last frame and frame 9,600 costs what frame 0 costs. Places are fractions of the width and the
height, lengths are fractions of the shorter side, times are seconds. Plain numpy: this file knows no tensor and no
model.
"""

from dataclasses import dataclass
from math import ceil, cos, floor, pi, sin, sqrt, tau

import numpy as np

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (228, 30, 38),
    "green": (40, 190, 60),
    "blue": (45, 85, 245),
    "yellow": (250, 225, 40),
    "orange": (255, 130, 10),
    "purple": (145, 45, 205),
    "pink": (255, 120, 190),
    "cyan": (30, 220, 230),
    "white": (252, 252, 252),
}
"""What things are painted with, 8-bit RGB."""

BACKGROUND_COLOURS: dict[str, Colour] = {
    "black": (10, 10, 14),
    "grey": (92, 92, 97),
    "navy": (18, 28, 78),
    "teal": (14, 82, 86),
    "brown": (92, 60, 40),
    "maroon": (88, 18, 36),
    "cream": (242, 230, 200),
    "pale blue": (165, 205, 240),
}
"""What backgrounds are painted with, 8-bit RGB."""

SHAPES = ("ball", "square", "triangle", "star", "ring", "cross")
MOTIONS = ("bounces", "circles", "drifts left", "drifts right", "spins", "pulses")
SIZES = ("small", "large")
SPEEDS = ("slow", "fast")
THING_ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "motion": MOTIONS, "size": SIZES, "speed": SPEEDS}
BACKGROUNDS = ("plain", "gradient", "stripes", "diagonal stripes", "checks")
CAMERAS = ("still", "left", "right")

_ROUND = ("ball", "ring")
_PATTERNS = ("stripes", "diagonal stripes", "checks")
_DRIFT = {"drifts left": -1.0, "drifts right": 1.0}
_CONTRAST = 105.0  # least RGB distance of a thing from each colour behind it
_REACH = 1.3  # no shape reaches farther than this many radii from its centre
_PULSE = 0.28  # a pulsing radius goes from 1 - _PULSE to 1 + _PULSE

_RADII = {"small": (0.13, 0.15), "large": (0.19, 0.23)}
_PERIODS = {
    "bounces": {"slow": (1.5, 1.9), "fast": (1.0, 1.3)},
    "circles": {"slow": (3.2, 4.0), "fast": (2.1, 2.6)},
    "drifts left": {"slow": (4.2, 5.5), "fast": (2.4, 3.0)},
    "drifts right": {"slow": (4.2, 5.5), "fast": (2.4, 3.0)},
    "spins": {"slow": (3.4, 4.2), "fast": (2.0, 2.5)},
    "pulses": {"slow": (2.4, 3.0), "fast": (1.3, 1.7)},
}


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving shape. `x, y` is the centre of its motion, `travel` the height of a bounce or radius of an orbit."""

    shape: str
    colour: str
    motion: str
    size: str
    speed: str
    x: float
    y: float
    radius: float
    travel: float
    period: float
    phase: float

    def __post_init__(self) -> None:
        for name, known in THING_ATTRIBUTES.items():
            _check(name, getattr(self, name), known)


@dataclass(frozen=True, kw_only=True)
class World:
    """What a film shows.

    `colours` is one colour for a plain background, (top, bottom) for a gradient and two alternating ones for patterns
    of period `2 * tile` that begin at `offset`. The camera pans by `pan_speed` per second.
    """

    background: str
    colours: tuple[str, ...]
    things: tuple[Thing, ...]
    camera: str
    tile: float
    offset: float
    pan_speed: float

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        _check("camera", self.camera, CAMERAS)
        for colour in self.colours:
            _check("background colour", colour, tuple(BACKGROUND_COLOURS))
        num_colours = 1 if self.background == "plain" else 2
        if len(self.colours) != num_colours:
            raise ValueError(f"colours={self.colours}: a {self.background} background has {num_colours}")
        if len(self.things) not in (1, 2):
            raise ValueError(f"{len(self.things)} things given; a world has 1 or 2")


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **{f"{name}_1": words for name, words in THING_ATTRIBUTES.items()},
    **{f"{name}_2": ("none", *words) for name, words in THING_ATTRIBUTES.items()},
    "background": BACKGROUNDS,
    "background_colour_1": tuple(BACKGROUND_COLOURS),
    "background_colour_2": ("none", *BACKGROUND_COLOURS),
    "camera": CAMERAS,
}
"""The classes of each attribute. Thing 1 is the one a caption names first; "none" stands for no second one."""


def attributes(world: World) -> dict[str, int]:
    """Class index of every attribute: `ATTRIBUTES[name][attributes(world)[name]]` is its word."""
    words = {"background": world.background, "camera": world.camera}
    for place in (1, 2):
        thing = world.things[place - 1] if place <= len(world.things) else None
        for name in THING_ATTRIBUTES:
            words[f"{name}_{place}"] = getattr(thing, name) if thing else "none"
        words[f"background_colour_{place}"] = world.colours[place - 1] if place <= len(world.colours) else "none"
    return {name: classes.index(words[name]) for name, classes in ATTRIBUTES.items()}


def sample_world(rng: np.random.Generator, spins: float = 1.0) -> World:
    """Draw a world: a quarter have two things of different colours, thing 1 left of or above thing 2; 30 % pan.

    A thing spins `spins` times as often as it has each other motion.
    """
    often = np.array([spins if motion == "spins" else 1.0 for motion in MOTIONS])
    background = str(rng.choice(BACKGROUNDS, p=(0.54, 0.14, 0.11, 0.09, 0.12)))
    colours = _sample_background_colours(rng, 1 if background == "plain" else 2)
    camera = str(rng.choice(CAMERAS, p=(0.2, 0.4, 0.4))) if background in _PATTERNS else "still"
    seen = [name for name in COLOURS if all(_distance(name, behind) >= _CONTRAST for behind in colours)]
    kinds = []
    for colour in rng.choice(seen, 2 if rng.random() < 0.25 else 1, replace=False):
        motion = str(rng.choice(MOTIONS, p=None if spins == 1 else often / often.sum()))
        size, speed = (str(rng.choice(words)) for words in (SIZES, SPEEDS))
        shape = str(rng.choice([name for name in SHAPES if motion != "spins" or name not in _ROUND]))
        kinds.append({"shape": shape, "colour": str(colour), "motion": motion, "size": size, "speed": speed})
    rooms = _rooms(rng, [kind["motion"] for kind in kinds])
    return World(
        background=background,
        colours=colours,
        things=tuple(_sample_thing(rng, kind, room) for kind, room in zip(kinds, rooms, strict=True)),
        camera=camera,
        tile=rng.uniform(0.16, 0.25),
        offset=rng.uniform(0.0, 0.5),
        pan_speed=rng.uniform(0.12, 0.2),
    )


def _distance(colour: str, behind: str) -> float:
    return float(np.linalg.norm(np.subtract(COLOURS[colour], BACKGROUND_COLOURS[behind])))


def _sample_background_colours(rng: np.random.Generator, num_colours: int) -> tuple[str, ...]:
    """Two colours are far enough apart to be seen and near enough not to outshine the things."""
    first = str(rng.choice(list(BACKGROUND_COLOURS)))
    if num_colours == 1:
        return (first,)
    rgb = np.array(list(BACKGROUND_COLOURS.values()))
    distances = np.linalg.norm(rgb - np.array(BACKGROUND_COLOURS[first]), axis=1)
    near = [name for name, d in zip(BACKGROUND_COLOURS, distances, strict=True) if 55 <= d <= 220]
    return (first, str(rng.choice(near)))


def _rooms(rng: np.random.Generator, motions: list[str]) -> list[tuple[float, float, float, float]]:
    """The part (left, top, right, bottom) of the picture for each thing. What drifts needs the whole width."""
    if len(motions) == 1:
        return [(0.0, 0.0, 1.0, 1.0)]
    if any(m in _DRIFT for m in motions) or ("bounces" not in motions and rng.random() < 0.4):
        return [(0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)]
    return [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]


def _sample_thing(rng: np.random.Generator, kind: dict[str, str], room: tuple[float, float, float, float]) -> Thing:
    """Choose the numbers so that the thing stays in the picture and, where it can, in its room."""
    left, top, right, bottom = room
    motion = kind["motion"]
    radius = rng.uniform(*_RADII[kind["size"]])
    if room != (0.0, 0.0, 1.0, 1.0):
        radius = min(radius, 0.16)
    period = rng.uniform(*_PERIODS[motion][kind["speed"]])
    travel = reach_x = reach_y = 0.0
    if motion == "bounces":  # the fastest fall is 4 travel / period
        travel = min(rng.uniform(0.12, 0.14) * period, bottom - top - 2 * radius)
        reach_y = travel / 2
    elif motion == "circles":
        free = min(right - left, bottom - top) / 2 - radius
        travel = reach_x = reach_y = min(rng.uniform(0.13, 0.18), max(free, 0.11))
    margin = 1.2 * radius * (1 + _PULSE if motion == "pulses" else 1)
    x = rng.uniform() if motion in _DRIFT else _sample_place(rng, left, right, margin + reach_x)
    y = _sample_place(rng, top, bottom, margin + reach_y)
    return Thing(**kind, x=x, y=y, radius=radius, travel=travel, period=period, phase=rng.uniform())


def _sample_place(rng: np.random.Generator, low: float, high: float, reach: float) -> float:
    """A centre whose reach stays in [low, high], or the middle if that is too narrow; always inside the picture."""
    low, high = min(low + reach, (low + high) / 2), max(high - reach, (low + high) / 2)
    return min(max(rng.uniform(low, high), reach), 1 - reach)


def draw(
    world: World, num_frames: int, *, start: int = 0, height: int = 128, width: int = 128, fps: float = 16
) -> np.ndarray:
    """Frames `start ... start + num_frames - 1`: uint8 RGB `(num_frames, height, width, 3)`.

    A frame depends on the world and its index alone. Raises ValueError for sizes, counts or rates that are not
    positive.
    """
    if min(num_frames, height, width, fps) <= 0:
        given = f"num_frames={num_frames}, height={height}, width={width}, fps={fps}"
        raise ValueError(f"{given}: all must be positive, such as 49, 128, 128 and 16")
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    if world.camera == "still":
        frames[:] = _background(world, 0.0, height, width)
    for index, frame in enumerate(frames, start):
        if world.camera != "still":
            frame[:] = _background(world, index / fps, height, width)
        for thing in world.things:
            _paint(frame, thing, index / fps)
    return frames


def pose(thing: Thing, seconds: float, height: int, width: int) -> tuple[float, float, float, float]:
    """Where a thing is at a time: centre x and y and radius in pixels, angle in radians (clockwise).

    A drifting centre is modulo the width: what sticks out at one side is seen at the other.
    """
    unit = min(height, width)
    cycle = seconds / thing.period + thing.phase
    x, y, radius, angle = thing.x * width, thing.y * height, thing.radius * unit, 0.0
    if thing.motion == "bounces":
        fraction = cycle % 1
        y += unit * thing.travel * (0.5 - 4 * fraction * (1 - fraction))
    elif thing.motion == "circles":
        x += unit * thing.travel * cos(tau * cycle)
        y += unit * thing.travel * sin(tau * cycle)
    elif thing.motion == "spins":
        angle = tau * (cycle % 1)
    elif thing.motion == "pulses":
        radius *= 1 + _PULSE * sin(tau * cycle)
    else:
        x = (thing.x + _DRIFT[thing.motion] * cycle) % 1 * width
    return x, y, radius, angle


def _paint(frame: np.ndarray, thing: Thing, seconds: float) -> None:
    """Draw one thing over a frame, in place, inside its bounding box only."""
    height, width, _ = frame.shape
    x, y, radius, angle = pose(thing, seconds, height, width)
    reach = _REACH * radius + 1
    colour = np.array(COLOURS[thing.colour], np.float32)
    top, bottom = max(floor(y - reach), 0), min(ceil(y + reach), height)
    for centre in (x - width, x, x + width) if thing.motion in _DRIFT else (x,):
        left, right = max(floor(centre - reach), 0), min(ceil(centre + reach), width)
        if left >= right or top >= bottom:
            continue
        columns = np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - centre)
        rows = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
        if angle:
            c, s = np.float32(cos(angle)), np.float32(sin(angle))
            columns, rows = c * columns + s * rows, c * rows - s * columns
        cover = np.clip(0.5 - _signed_distance(thing.shape, columns, rows, radius), 0, 1)[..., None]
        box = frame[top:bottom, left:right]
        box[:] = box + cover * (colour - box) + np.float32(0.5)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; the sizes make all shapes look about equally large."""
    if shape == "ball":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "cross":
        x, y, long, short = np.abs(x), np.abs(y), 1.08 * radius, 0.38 * radius
        return np.minimum(np.maximum(x - long, y - short), np.maximum(x - short, y - long))
    if shape == "triangle":
        return np.maximum(y, sqrt(3) / 2 * np.abs(x) - 0.5 * y) - 0.5 * _REACH * radius
    # Star: fold the plane onto half a tip, whose outline runs from the tip to the next inner corner.
    angle = np.abs((np.arctan2(x, -y) + pi / 5) % (tau / 5) - pi / 5)
    far, tip = np.hypot(x, y), _REACH * radius
    edge_x, edge_y = tip * (0.5 * cos(pi / 5) - 1), tip * 0.5 * sin(pi / 5)
    return ((far * np.cos(angle) - tip) * edge_y - far * np.sin(angle) * edge_x) / sqrt(edge_x**2 + edge_y**2)


def _background(world: World, seconds: float, height: int, width: int) -> np.ndarray:
    """The background alone, uint8, broadcastable to `(height, width, 3)`."""
    first, last = (np.array(BACKGROUND_COLOURS[world.colours[i]], np.float32) for i in (0, -1))
    if world.background == "plain":
        return first.astype(np.uint8)
    rows = (np.arange(height)[:, None] + 0.5) / min(height, width)
    if world.background == "gradient":
        weight = rows / rows[-1]
    else:
        pan = {"still": 0.0, "left": -1.0, "right": 1.0}[world.camera] * world.pan_speed * seconds
        columns = (np.arange(width)[None] + 0.5) / min(height, width) + world.offset + pan
        pixels = world.tile * min(height, width)
        if world.background == "diagonal stripes":
            weight = _bands((columns + rows) / (sqrt(2) * world.tile), pixels)
        else:
            weight = _bands(columns / world.tile, pixels)
        if world.background == "checks":
            across = _bands(rows / world.tile, pixels)
            weight = weight + across - 2 * weight * across
    return (first + weight.astype(np.float32)[..., None] * (last - first) + np.float32(0.5)).astype(np.uint8)


def _bands(place: np.ndarray, pixels: float) -> np.ndarray:
    """Square wave of period 2, 0 or 1 with soft edges; `pixels` is the width of a band."""
    return np.clip((0.5 - np.abs(place % 2 - 1)) * pixels + 0.5, 0, 1)
