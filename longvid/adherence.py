"""How far a film shows what its prompt says, second by second: the prompt's words against the oracle's readings.

Knows the words of `longvid.captions` and no others. Plain Python and numpy.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from longvid.captions import NOUNS, VERBS
from longvid.oracle import Reading, ThingReading, read_film
from longvid.worlds import BACKGROUND_COLOURS, COLOURS, World

ASPECTS = ("colour", "shape", "motion", "count", "background")
"""What is judged. A prompt that leaves motion or background open is right in them whatever is seen: None."""

_SIZES = r"(?:small|tiny|little|big|large|huge)"
_SHAPE_OF = {noun: shape for shape, nouns in NOUNS.items() for noun in nouns}
_MOTION_OF = {form: motion for motion, verbs in VERBS.items() for verb in verbs for form in verb.split("/")}
_THING = re.compile(rf"\b({'|'.join(COLOURS)})(?: {_SIZES})? ({'|'.join(sorted(_SHAPE_OF, key=len)[::-1])})\b")
_MOTION = re.compile(rf"\b({'|'.join(sorted(_MOTION_OF, key=len)[::-1])})\b")
_CAMERA = re.compile(
    r"\b(?:(?:the )?camera (?:pans|panning|moves|moving|is still)|pan)(?: left| right)?|\b(?:still|static) camera"
)
_BACK_COLOUR = re.compile(rf"\b({'|'.join(sorted(BACKGROUND_COLOURS, key=len)[::-1])})\b")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A thing that a prompt names; `motion` is None where it says none."""

    colour: str
    shape: str
    motion: str | None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a prompt asks for; `background` is None and `background_colours` empty where it says nothing of them."""

    things: tuple[Wanted, ...]
    background: str | None
    background_colours: tuple[str, ...]


def parse_prompt(prompt: str) -> Scene:
    """Colour, shape and motion of the things a prompt names, and its background.

    Raises ValueError for a prompt that names no thing of a procedural film.
    """
    text = _CAMERA.sub("", re.sub(r"\s+", " ", prompt.lower()))
    found = list(_THING.finditer(text))
    if not found:
        raise ValueError(f"prompt {prompt!r} names no coloured shape that can be read; try 'a red ball bounces'")
    starts = [0, *(match.end() for match in found)]
    ends = [*(match.start() for match in found), len(text)]
    things = []
    for index, match in enumerate(found):
        said = _MOTION.search(text, starts[index + 1], ends[index + 1]) or _MOTION.search(
            text, starts[index], ends[index]
        )
        motion = _MOTION_OF[said[1]] if said else None
        things.append(Wanted(colour=match[1], shape=_SHAPE_OF[match[2]], motion=motion))
    behind = _MOTION.sub("", _THING.sub("", text))
    colours = tuple(dict.fromkeys(_BACK_COLOUR.findall(behind)))
    return Scene(things=tuple(things), background=_background(behind, colours), background_colours=colours)


def _background(text: str, colours: tuple[str, ...]) -> str | None:
    if re.search(r"\bcheck(?:s|ered)\b|\bchequered\b", text):
        return "checks"
    if "stripes" in text:
        return "diagonal stripes" if "diagonal" in text else "stripes"
    if "gradient" in text:
        return "gradient"
    return "plain" if colours else None


def scene_of(world: World) -> Scene:
    """All that a world shows, as a prompt that leaves nothing open would say it."""
    things = tuple(Wanted(colour=t.colour, shape=t.shape, motion=t.motion) for t in world.things)
    return Scene(things=things, background=world.background, background_colours=world.colours)


def judge(scene: Scene, reading: Reading) -> dict[str, float | None]:
    """How far one second is right in each of `ASPECTS`: 0 to 1, the mean over the things; None if nothing is asked.

    A thing is looked for by its colour; one whose colour is nowhere is held against what is left.
    """
    pairs = _pair(scene.things, reading.things)
    moving = [(want, seen) for want, seen in pairs if want.motion]
    return {
        "colour": _mean(seen is not None and seen.colour == want.colour for want, seen in pairs),
        "shape": _mean(seen is not None and seen.shape == want.shape for want, seen in pairs),
        "motion": _mean(seen is not None and seen.motion == want.motion for want, seen in moving) if moving else None,
        "count": float(reading.count == len(scene.things)),
        "background": None if scene.background is None else float(_is_behind(scene, reading)),
    }


def _pair(wanted: Sequence[Wanted], seen: Sequence[ThingReading]) -> list[tuple[Wanted, ThingReading | None]]:
    by_colour = {thing.colour: thing for thing in seen}
    rest = [thing for thing in seen if thing.colour not in {want.colour for want in wanted}]
    return [(want, by_colour.get(want.colour) or (rest.pop(0) if rest else None)) for want in wanted]


def _is_behind(scene: Scene, reading: Reading) -> bool:
    """The pattern is the one asked for, and the colours named are among those seen."""
    return reading.background == scene.background and set(scene.background_colours) <= set(reading.background_colours)


def _mean(values) -> float:
    return float(np.mean([float(value) for value in values]))


def adherence(prompt: str | Scene, frames: np.ndarray, fps: float) -> dict:
    """Judge a film, uint8 (f, h, w, 3).

    `seconds`: a row of `ASPECTS` for each second; `share`: their means over the film, `first_10s` and `last_10s` over
    its ends; `readings`: what was seen. Raises ValueError for a prompt that names nothing readable.
    """
    scene = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    readings = read_film(frames, fps)
    rows = [judge(scene, reading) for reading in readings]
    return {
        "wanted": asdict(scene),
        "share": shares(rows),
        "first_10s": shares(rows[:10]),
        "last_10s": shares(rows[-10:]),
        "seconds": rows,
        "readings": [asdict(reading) for reading in readings],
    }


def shares(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Mean of each of `ASPECTS` over rows that ask for it; None if none does."""
    asked = {name: [row[name] for row in rows if row[name] is not None] for name in ASPECTS}
    return {name: float(np.mean(values)) if values else None for name, values in asked.items()}
