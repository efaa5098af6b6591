"""What a procedural film shows, in words: captions with synonyms in many styles."""

import numpy as np

from longvid.worlds import Thing, World

MAX_CAPTION_BYTES = 150

NOUNS: dict[str, tuple[str, ...]] = {
    "ball": ("ball", "ball", "circle", "sphere", "disc"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "hoop", "donut"),
    "cross": ("cross", "cross", "plus"),
}
"""What a shape is called; a name that stands twice is twice as frequent."""

_CIRCLES = ("circles/circling", "orbits/orbiting", "goes round and round/going round and round")
_DRIFTS = ("drifts {}/drifting {}", "floats {}/floating {}", "slides {}/sliding {}", "moves {}/moving {}")
VERBS: dict[str, tuple[str, ...]] = {
    "bounces": ("bounces/bouncing", "bounces/bouncing", "jumps up and down/jumping up and down"),
    "circles": (*_CIRCLES, "moves in a circle/moving in a circle"),
    "drifts left": tuple(verb.format(to, to) for verb in _DRIFTS for to in ("left", "to the left")),
    "drifts right": tuple(verb.format(to, to) for verb in _DRIFTS for to in ("right", "to the right")),
    "spins": ("spins/spinning", "rotates/rotating", "turns/turning", "twirls/twirling"),
    "pulses": ("pulses/pulsing", "grows and shrinks/growing and shrinking", "throbs/throbbing"),
}
"""How a motion is said: present/participle."""

_SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("big", "large", "huge")}
_SPEED_WORDS = {"slow": ("slowly",), "fast": ("quickly", "fast")}
_STYLES = ("{a} {name} {present}", "{a} {name} is {participle}", "{name}, {participle}", "{name} {participle}")
_FILM_STYLES = ("{a} {name} {participle}", "{a} {name} that is {participle}")
_PANS = ("the camera pans {}", "camera panning {}", "the camera moves {}", "camera moving {}", "pan {}")
_STILLS = ("the camera is still", "still camera", "static camera")


def caption(world: World, rng: np.random.Generator) -> str:
    """Say what the film shows, in varied words, at most 150 bytes of UTF-8.

    Colour, shape and motion of each thing are always named, in the order of `world.things`; size half of the time,
    speed a quarter, background and a panning camera four times in five.
    """
    opening, joints = "", (" and ", ", and ", " while ")
    style = _STYLES[rng.choice(4, p=(0.55, 0.25, 0.12, 0.08))]
    is_list = "{a}" not in style
    if is_list:
        joints = (", ",)
    elif rng.random() < 0.2:
        opening, joints = _choice(rng, ("a video of ", "a film of ", "video of ", "a clip of ")), (" and ", ", and ")
        style = _choice(rng, _FILM_STYLES)
    text = opening + _choice(rng, joints).join(_thing_phrase(thing, style, rng) for thing in world.things)
    tails = []
    if rng.random() < 0.8:
        tails.append(_background_phrase(world, is_list, rng))
    if rng.random() < (0.15 if world.camera == "still" else 0.8):
        tails.append(", " + _choice(rng, _STILLS if world.camera == "still" else _PANS).format(world.camera))
    while len(text + "".join(tails)) > MAX_CAPTION_BYTES - 1:
        tails.pop()
    text += "".join(tails)
    text = text[0].upper() + text[1:] if rng.random() < 0.4 else text
    return text + "." if rng.random() < 0.3 else text


def _choice(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _thing_phrase(thing: Thing, style: str, rng: np.random.Generator) -> str:
    """One thing and its motion: "a red ball bounces", "a red ball is bouncing", "red ball, bouncing"."""
    size = _choice(rng, _SIZE_WORDS[thing.size]) + " " if rng.random() < 0.5 else ""
    speed = " " + _choice(rng, _SPEED_WORDS[thing.speed]) if rng.random() < 0.25 else ""
    name = f"{size}{thing.colour} {_choice(rng, NOUNS[thing.shape])}"
    present, participle = _choice(rng, VERBS[thing.motion]).split("/")
    article = "an" if name[0] in "aeiou" else "a"
    return style.format(a=article, name=name, present=present, participle=participle) + speed


def _background_phrase(world: World, is_list: bool, rng: np.random.Generator) -> str:
    """The end of a sentence or of a list: " on a grey background", ", navy and grey stripes"."""
    both = " and ".join(world.colours)
    some = both if rng.random() < 0.8 else world.colours[0]
    nouns = {
        "plain": (f"{both} background",),
        "gradient": (f"{both} gradient", f"{' to '.join(world.colours)} gradient"),
        "stripes": (f"{some} stripes", f"{some} vertical stripes"),
        "diagonal stripes": (f"{some} diagonal stripes", f"diagonal {some} stripes"),
        "checks": (f"{some} checks", f"{some} chequered floor", f"{some} checkered background"),
    }[world.background]
    noun = _choice(rng, nouns)
    if is_list:
        return ", " + noun
    if world.background == "plain" and rng.random() < 0.2:
        return " on " + both
    article = "" if noun.endswith("s") else "a "
    return f" {_choice(rng, ('on', 'on', 'in front of', 'over', 'against'))} {article}{noun}"
