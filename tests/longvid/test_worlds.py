"""The films are functions of (world, frame), for ever; captions and attributes say what is drawn."""

from dataclasses import replace

import numpy as np
import pytest

from longvid.captions import MAX_CAPTION_BYTES, NOUNS, VERBS, caption
from longvid.worlds import (
    ATTRIBUTES,
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    Thing,
    World,
    attributes,
    draw,
    pose,
    sample_world,
)

TEN_MINUTES = 9600


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    rng = np.random.default_rng(0)
    return [sample_world(rng) for _ in range(2000)]


def world_of(motion: str = "bounces", **changes: object) -> World:
    thing = {"shape": "square", "colour": "red", "motion": motion, "size": "large", "speed": "fast"}
    thing |= {"x": 0.5, "y": 0.5, "radius": 0.16, "travel": 0.15, "period": 2.0, "phase": 0.3}
    world = {"background": "plain", "colours": ("black",), "camera": "still", "tile": 0.2, "offset": 0.1}
    return World(things=(Thing(**thing),), **(world | {"pan_speed": 0.2} | changes))


def test_a_seed_makes_the_same_film_and_caption():
    def make(seed: int) -> tuple[World, str, bytes]:
        rng = np.random.default_rng(seed)
        world = sample_world(rng)
        return world, caption(world, rng), draw(world, 3).tobytes()

    assert make(5) == make(5)
    assert make(5) != make(6)


def test_a_part_of_a_film_is_a_slice_of_the_whole(worlds):
    for world in worlds[:40]:
        whole = draw(world, 40)
        np.testing.assert_array_equal(draw(world, 7, start=33), whole[33:])
    assert whole.dtype == np.uint8 and whole.shape == (40, 128, 128, 3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_are_periodic_and_still_there_after_ten_minutes(motion):
    world = world_of(motion)  # 2 s are 32 frames
    first, late = draw(world, 32), draw(world, 32, start=TEN_MINUTES)
    np.testing.assert_allclose(first.astype(int), late, atol=1)
    assert np.median(np.abs(np.diff(first.astype(int), axis=0)).max(axis=(1, 2, 3))) > 50, "it moves"
    red = (late == COLOURS["red"]).all(-1).sum((1, 2))
    assert red.min() > 300, "never out of the picture"


@pytest.mark.parametrize("motion", MOTIONS)
def test_motions_never_jump(motion):
    film = draw(world_of(motion), 70).astype(float)
    change = np.abs(np.diff(film, axis=0)).mean((1, 2, 3))
    assert change.max() < 3 * np.median(change) + 0.5


def test_a_thing_that_leaves_at_one_side_enters_at_the_other():
    film = draw(world_of("drifts right"), 32)[:, 64, :, 0] > 128
    assert any(row[0] and row[-1] and not row[64] for row in film)
    areas = film.sum(1)
    assert areas.max() - areas.min() <= 2


def test_speed_on_screen_is_modest(worlds):
    for thing in (thing for world in worlds for thing in world.things):
        poses = np.array([pose(thing, f / 16, 128, 128) for f in range(int(16 * thing.period))])
        step = np.abs(np.diff(poses[:, :2], axis=0))
        step = np.minimum(step, 128 - step)  # a drifting centre is modulo the width
        rim = np.abs(np.diff(poses[:, 2])).max() + 1.1 * poses[0, 2] * np.diff(poses[:, 3] % (np.pi * 2 / 5)).max()
        assert np.hypot(*step.T).max() < 5.2 and rim < 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_has_its_named_colour(shape, colour):
    world = world_of("circles")
    thing = replace(world.things[0], shape=shape, colour=colour)
    x, y, radius, _ = pose(thing, 0.0, 128, 128)
    y += 0.78 * radius if shape == "ring" else 0.0
    frame = draw(replace(world, things=(thing,)), 1)[0]
    assert tuple(frame[int(y), int(x)]) == COLOURS[colour]


def test_things_stand_out_and_stay_in_the_picture(worlds):
    for world in worlds:
        for thing in world.things:
            for behind in world.colours:
                assert np.linalg.norm(np.subtract(COLOURS[thing.colour], BACKGROUND_COLOURS[behind])) >= 100
            assert not (thing.motion == "spins" and thing.shape in ("ball", "ring"))
            for seconds in np.linspace(0, thing.period, 9):
                x, y, radius, _ = pose(thing, seconds, 128, 128)
                assert radius - 1 <= y <= 129 - radius
                assert "drifts" in thing.motion or radius - 1 <= x <= 129 - radius


def test_two_things_are_mostly_apart_and_never_of_one_colour(worlds):
    gaps = []
    for first, second in (world.things for world in worlds if len(world.things) == 2):
        assert first.colour != second.colour
        for seconds in (0.0, 1.1, 2.3):
            a, b = (np.array(pose(thing, seconds, 128, 128)) for thing in (first, second))
            across = abs(a[0] - b[0])
            gaps.append(np.hypot(min(across, 128 - across), a[1] - b[1]) > 0.9 * (a[2] + b[2]))
    assert np.mean(gaps) > 0.97


def test_every_attribute_value_occurs(worlds):
    seen = [attributes(world) for world in worlds]
    for name, classes in ATTRIBUTES.items():
        assert {row[name] for row in seen} == set(range(len(classes))), name
    assert all(row.keys() == ATTRIBUTES.keys() for row in seen)


def test_shares_of_cameras_and_pairs(worlds):
    assert abs(np.mean([world.camera == "still" for world in worlds]) - 0.744) < 0.05
    assert abs(np.mean([len(world.things) == 2 for world in worlds]) - 0.25) < 0.05
    assert all(world.camera == "still" for world in worlds if world.background in ("plain", "gradient"))


def test_captions_name_what_attributes_say(worlds):
    rng = np.random.default_rng(1)
    for world in worlds:
        text, classes = caption(world, rng), attributes(world)
        assert len(text.encode()) <= MAX_CAPTION_BYTES
        for place in range(1, len(world.things) + 1):
            colour, shape, motion = (
                ATTRIBUTES[f"{name}_{place}"][classes[f"{name}_{place}"]] for name in ("colour", "shape", "motion")
            )
            said = text.lower()
            assert any(f"{colour} {noun}" in said for noun in NOUNS[shape]), text
            assert any(verb in said for forms in VERBS[motion] for verb in forms.split("/")), text


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_panning_camera_moves_the_background_only(background):
    colours = ("black",) if background == "plain" else ("black", "grey")
    world = world_of("pulses", background=background, colours=colours)
    left, right, still = (draw(replace(world, camera=c), 20)[:, 2:10].astype(int) for c in ("left", "right", "still"))
    np.testing.assert_array_equal(still, still[:1].repeat(20, 0))
    if "stripes" in background or background == "checks":
        # 10 frames at 0.2 widths per second are 16 pixels.
        np.testing.assert_allclose(right[10, :, :-16], right[0, :, 16:], atol=1)
        np.testing.assert_allclose(left[10, :, 16:], left[0, :, :-16], atol=1)


def test_other_sizes_show_the_same_scene():
    film = draw(world_of("spins"), 4, height=96, width=160)
    assert film.shape == (4, 96, 160, 3)
    rows, columns = np.nonzero((film[0] == COLOURS["red"]).all(-1))
    assert abs(rows.mean() - 47.5) < 1 and abs(columns.mean() - 79.5) < 1
    area = (draw(world_of("spins"), 1) == COLOURS["red"]).all(-1).sum()
    assert abs(len(rows) / area - (96 / 128) ** 2) < 0.03


def test_wrong_values_are_refused_in_one_line():
    thing = world_of().things[0]
    with pytest.raises(ValueError, match="colour='mauve' is not known; use one of red"):
        replace(thing, colour="mauve")
    with pytest.raises(ValueError, match="has 1"):
        world_of(colours=("black", "grey"))
    with pytest.raises(ValueError, match="1 or 2"):
        replace(world_of(), things=())
    with pytest.raises(ValueError, match="all must be positive"):
        draw(world_of(), 0)


def test_things_spin_as_often_as_is_asked_for():
    things = [t for i in range(2000) for t in sample_world(np.random.default_rng(i), spins=4.0).things]
    share = sum(t.motion == "spins" for t in things) / len(things)
    assert abs(share - 4 / 9) < 0.04  # three standard deviations
    assert sample_world(np.random.default_rng(5), spins=1.0) == sample_world(np.random.default_rng(5))
