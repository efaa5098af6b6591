"""Prompts are parsed as they are written, and a film is held to its own prompt."""

from dataclasses import replace

import numpy as np
import pytest

from longvid.adherence import ASPECTS, adherence, judge, parse_prompt, scene_of, shares
from longvid.captions import caption
from longvid.oracle import Reading, ThingReading
from longvid.worlds import draw, sample_world

RED_BALL = ThingReading(colour="red", shape="ball", motion="bounces", fit=0.95, x=0.5, y=0.5, radius=0.1)
ONE = Reading(second=0, count=1, background="plain", background_colours=("navy",), things=(RED_BALL,))


def test_captions_are_parsed_to_what_their_worlds_hold():
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(1500):
        world = sample_world(rng)
        text, truth = caption(world, rng), scene_of(world)
        scene = parse_prompt(text)
        assert scene.things == truth.things, text
        assert scene.background in (None, truth.background), text
        assert set(scene.background_colours) <= set(truth.background_colours), text
        named += scene.background is not None
    assert 0.6 < named / 1500 < 0.9


@pytest.mark.parametrize(
    "prompt, things, background",
    [
        ("a red ball bounces on a navy background", [("red", "ball", "bounces")], "plain"),
        ("A bouncing red ball", [("red", "ball", "bounces")], None),
        ("a pale blue background, a blue box", [("blue", "square", None)], "plain"),
        ("green circle moving in a circle, camera moving left", [("green", "ball", "circles")], None),
        ("a white block is turning. a cyan plus slides to the left", [("white", "square", "spins"),
                                                                      ("cyan", "cross", "drifts left")], None),
    ],
)  # fmt: skip
def test_prompts(prompt, things, background):
    scene = parse_prompt(prompt)
    assert [(thing.colour, thing.shape, thing.motion) for thing in scene.things] == things
    assert scene.background == background


def test_a_prompt_of_nothing_known_is_refused():
    with pytest.raises(ValueError, match="names no coloured shape"):
        parse_prompt("a cat plays the piano in pale blue light")


@pytest.mark.parametrize(
    "prompt, right",
    [
        ("a red ball bounces on a navy background", (1, 1, 1, 1, 1)),
        ("a blue ball bounces", (0, 1, 1, 1, None)),
        ("a red star bounces on grey stripes", (1, 0, 1, 1, 0)),
        ("a red ball", (1, 1, None, 1, None)),
        ("a red ball bounces and a green star spins", (0.5, 0.5, 0.5, 0, None)),
    ],
)
def test_aspects_are_judged_apart(prompt, right):
    assert judge(parse_prompt(prompt), ONE) == dict(zip(ASPECTS, right, strict=True))


def test_a_thing_is_looked_for_by_its_colour():
    other = replace(RED_BALL, colour="green", shape="star", motion="spins", radius=0.2)
    seen = replace(ONE, count=2, things=(other, RED_BALL))
    assert judge(parse_prompt("a red ball bounces, a green star spins"), seen)["motion"] == 1
    assert judge(parse_prompt("a green star bounces, a red ball spins"), seen) == {
        "colour": 1, "shape": 1, "motion": 0, "count": 1, "background": None,
    }  # fmt: skip
    nothing = replace(ONE, count=0, things=())
    assert judge(parse_prompt("a red ball bounces"), nothing)["colour"] == 0


def test_the_end_is_told_from_the_beginning():
    world = sample_world(np.random.default_rng(3))
    film = draw(world, 12 * 16)
    kept = adherence(scene_of(world), film, 16)
    assert kept["share"] == kept["first_10s"] == kept["last_10s"] == dict.fromkeys(ASPECTS, 1.0)
    film[10 * 16 :] = (10, 10, 14)
    lost = adherence(scene_of(world), film, 16)
    assert lost["first_10s"]["shape"] == 1 and lost["share"]["shape"] == pytest.approx(10 / 12)
    assert lost["last_10s"]["shape"] == pytest.approx(8 / 10) and len(lost["seconds"]) == 12


def test_shares_leave_out_what_is_not_asked():
    row = dict.fromkeys(ASPECTS, 1.0)
    assert shares([row, row | {"motion": None}, row | {"motion": 0.0, "background": None}])["motion"] == 0.5
    assert shares([row | {"background": None}])["background"] is None
