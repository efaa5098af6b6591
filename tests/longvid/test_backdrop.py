"""Backgrounds are named from one frame, whatever stands before them."""

from dataclasses import replace

import numpy as np
import pytest

from longvid.backdrop import read_backdrop
from longvid.worlds import BACKGROUND_COLOURS, BACKGROUNDS, draw, sample_world


def test_backgrounds_of_worlds():
    for index in range(60):
        world = sample_world(np.random.default_rng((11, index)))
        found = read_backdrop(draw(world, 1, start=200)[0])
        assert found.background == world.background
        order = list if world.background == "gradient" else set
        assert order(found.colours) == order(world.colours)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_other_sizes_and_a_cast(background):
    world = next(w for w in (sample_world(np.random.default_rng(i)) for i in range(200)) if w.background == background)
    frame = draw(world, 1, height=240, width=416)[0]
    tinted = np.clip(frame.astype(int) + (9, -6, 7), 0, 255).astype(np.uint8)
    for picture in (frame, tinted):
        found = read_backdrop(picture)
        assert found.background == background and set(found.colours) == set(world.colours)


def test_distance_is_zero_on_all_mixtures():
    world = replace(sample_world(np.random.default_rng(0)), background="gradient", colours=("teal", "brown"))
    backdrop = read_backdrop(draw(world, 1)[0])
    teal, brown = (np.array(BACKGROUND_COLOURS[name], np.float32) for name in ("teal", "brown"))
    mixtures = np.stack([teal, brown, 0.3 * teal + 0.7 * brown, 2 * brown - teal])
    np.testing.assert_allclose(backdrop.distance(mixtures), [0, 0, 0, np.square(brown - teal).sum()], atol=1e-2)
