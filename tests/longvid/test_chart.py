"""Curves are where their values are."""

import string

import numpy as np
import pytest

from longvid.chart import FAINT, HEIGHT, STRONG, WIDTH, Panel, draw_panels, mean_curve, text_mask


def rows_of(image: np.ndarray, ink: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((image == ink).all(-1).any(1))


def test_a_higher_value_stands_higher():
    for value in (0.25, 0.75):
        rows = rows_of(draw_panels([Panel(title="x", curves=[np.full(9, value)], low=0.0, high=1.0)]), STRONG)
        top = rows_of(draw_panels([Panel(title="x", curves=[np.full(9, 1.0)], low=0.0, high=1.0)]), STRONG)[0]
        assert abs(rows.mean() - top - (1 - value) * (HEIGHT - 1)) < 2


def test_seconds_stand_side_by_side_and_gaps_stay_open():
    curve = np.array([0.5, np.nan, np.nan, 0.5])
    image = draw_panels([Panel(title="x", curves=[curve], low=0.0, high=1.0)])
    columns = np.flatnonzero((image == STRONG).all(-1).any(0))
    assert len(columns) == 2 and abs(columns[1] - columns[0] - 0.75 * (WIDTH - 1)) < 2


def test_the_mean_is_strong_and_the_videos_are_faint():
    image = draw_panels([Panel(title="x", curves=[np.zeros(5), np.ones(5)])])
    assert len(rows_of(image, FAINT)) == 2
    assert np.ptp(rows_of(image, STRONG)) == 2
    np.testing.assert_array_equal(mean_curve([np.array([0.0, np.nan]), np.array([1.0, np.nan, 3.0])]), [0.5, np.nan, 3])


def test_all_letters_are_drawn_differently():
    masks = {text_mask(letter, 1).tobytes() for letter in string.ascii_lowercase + string.digits}
    assert len(masks) == 36 and text_mask(string.ascii_lowercase + "0123456789 .-%,/+:", 1).shape[0] == 7


def test_values_of_any_size_and_none():
    for values in ([np.nan], [0.0], [1e-9], [-5e7, 3e9]):
        draw_panels([Panel(title="x", curves=[np.array(values)])] * 4)
    with pytest.raises(ValueError, match="at least one"):
        draw_panels([])
