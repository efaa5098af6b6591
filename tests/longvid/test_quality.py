"""Measures have their closed forms, and tell true films from frozen, drifting, seamed and collapsing ones."""

import numpy as np
import pytest

from longvid.oracle import seconds_of
from longvid.quality import (
    collapse,
    frechet_distance,
    latent_drift,
    measure,
    over_seconds,
    seam_ratio,
    similarity,
    slope_per_minute,
    standing_still,
)
from longvid.worlds import draw, sample_world


def grey(levels) -> np.ndarray:
    """Frames of one grey level each."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), 16, 16, 3)).copy()


def film(seconds: int, seed: int = 2) -> np.ndarray:
    return draw(sample_world(np.random.default_rng(seed)), 16 * seconds)


def test_measures_of_a_frame():
    frame = np.zeros((1, 10, 10, 3), np.uint8)
    frame[0, ::2, ::2] = frame[0, 1::2, 1::2] = 100
    one = measure([frame])
    assert one.sharpness[0] == pytest.approx(400**2, rel=1e-4), "the Laplacian of a chequered board is +-4 of a level"
    assert one.brightness[0] == pytest.approx(50) and one.contrast[0] == pytest.approx(50)
    assert one.saturation[0] == 0 and np.isnan(one.change[0])
    frame[:] = (200, 50, 100)
    coloured = measure([frame])
    assert coloured.saturation[0] == pytest.approx(0.75) and coloured.sharpness[0] == pytest.approx(0, abs=1e-3)
    assert coloured.brightness[0] == pytest.approx(0.2126 * 200 + 0.7152 * 50 + 0.0722 * 100)


def test_pieces_of_a_video_measure_as_the_whole():
    whole, parts = measure([film(2)]), measure(np.array_split(film(2), 5))
    for name in ("sharpness", "change", "histogram", "small"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_slopes():
    assert slope_per_minute(np.array([5.0, 6.0, 7.0])) == pytest.approx(60)
    assert slope_per_minute(np.array([5.0, 6.0, 7.0]), step=0.25) == pytest.approx(240)
    assert slope_per_minute(np.array([5.0])) == 0


def test_a_video_that_brightens_drifts_and_a_true_one_does_not():
    measures = measure([grey(50 + np.arange(96))])
    curves = over_seconds(measures, seconds_of(96, 16))
    assert slope_per_minute(curves["brightness"]) == pytest.approx(16 * 60, rel=1e-3)
    assert curves["histogram_distance"][0] == 0 and curves["histogram_distance"][-1] == 1
    assert curves["flicker"].max() == pytest.approx(0, abs=1e-4)
    true = over_seconds(measure([film(6)]), seconds_of(96, 16))
    assert np.ptp(true["brightness"]) < 4 and true["histogram_distance"].max() < 0.05


def test_flicker_is_the_second_difference_of_brightness():
    flickering = measure([grey([100, 106] * 16)])
    assert over_seconds(flickering, seconds_of(32, 16))["flicker"] == pytest.approx([12, 12], rel=1e-4)


def test_seams():
    change = np.ones(25)
    change[0] = np.nan
    assert seam_ratio(change, [1, 13]) == 1
    change[[1, 13]] = 1.5
    assert seam_ratio(change, [1, 13]) == pytest.approx(1.5)
    assert seam_ratio(change, []) is None and seam_ratio(change, [0, 25]) is None
    assert seam_ratio(np.zeros(9), [4]) is None


def test_frozen_seconds_are_found():
    frames = film(8)
    assert standing_still(over_seconds(measure([frames]), seconds_of(128, 16))["moved"]) == (0, 0)
    frames[2 * 16 : 3 * 16] = frames[2 * 16]
    frames[5 * 16 : 8 * 16] = frames[5 * 16]
    assert standing_still(over_seconds(measure([frames]), seconds_of(128, 16))["moved"]) == (0.5, 3)


@pytest.mark.parametrize("seed", [0, 2, 6, 9])
def test_falling_back_to_the_opening_is_told_from_going_on(seed):
    frames, seconds = film(24, seed), seconds_of(24 * 16, 16)
    going_on = collapse(similarity(frames, seconds))
    rng = np.random.default_rng(0)
    falling = frames.copy()
    for second in range(2, 24):  # every third is elsewhere, the others show the opening second again
        if second % 3:
            falling[second * 16 : second * 16 + 16] = frames[:16]
        else:
            shift = rng.integers(20, 100, 2)
            falling[second * 16 : second * 16 + 16] = np.roll(frames[:16], tuple(shift), (1, 2))
    assert going_on < 0.08 < collapse(similarity(falling, seconds))
    assert collapse(similarity(frames[:48], seconds_of(48, 16))) is None


def test_latents_that_drift():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((3, 61, 8, 8)).astype(np.float32)
    latents -= latents.mean((2, 3), keepdims=True)
    latents /= latents.std((2, 3), keepdims=True)
    latents[1] += 0.25 * np.arange(61)[:, None, None] / 60
    latents[2] *= 1 + 0.5 * np.arange(61)[:, None, None] / 60
    drift = latent_drift(latents, seconds_each=0.25)  # 15 s
    np.testing.assert_allclose(drift["mean"], [0, 1, 0], atol=0.02)
    np.testing.assert_allclose(drift["deviation"], [0, 0, 2], atol=0.05)


def test_frechet_distances_of_gaussians():
    rng = np.random.default_rng(0)
    one = rng.standard_normal((4000, 3))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + (3, 0, 4)) == pytest.approx(25)
    root = np.sqrt(np.linalg.eigvalsh(np.cov(one, rowvar=False))).sum()
    assert frechet_distance(one, 3 * one) == pytest.approx(
        4 * np.trace(np.cov(one, rowvar=False)) + np.square(2 * one.mean(0)).sum()
    )
    assert root == pytest.approx(3, rel=0.05)
    a, b = np.array([[2, 1], [0, 1]]), np.array([[1, 0], [3, 1]])
    first, second = rng.standard_normal((200_000, 2)) @ a.T, rng.standard_normal((200_000, 2)) @ b.T
    product = np.linalg.eigvals(a @ a.T @ b @ b.T)
    exact = np.trace(a @ a.T) + np.trace(b @ b.T) - 2 * np.sqrt(product).sum()
    assert frechet_distance(first, second) == pytest.approx(exact, rel=0.03)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(one[:1], one)
