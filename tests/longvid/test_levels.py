"""Rows that the model is trained on are rows that it meets."""

import numpy as np
import pytest
import torch

from longvid.levels import block_causal_mask, iid_levels, per_latent, soil, staircase_levels


def test_staircases_never_decrease_and_reach_every_level_of_every_block():
    rng = np.random.default_rng(0)
    rows = np.stack([staircase_levels(rng, 5) for _ in range(4000)])
    assert (np.diff(rows, axis=1) >= 0).all()
    assert rows.min() == 0 and rows.max() == 1
    for block in range(5):
        between = rows[:, block][(rows[:, block] > 0) & (rows[:, block] < 1)]
        counts = np.histogram(between, bins=10, range=(0, 1))[0]
        assert counts.min() > 0.25 * counts.mean(), f"block {block} hardly meets some levels: {counts}"


def test_rises_span_the_lags_from_a_rolling_queue_to_block_by_block():
    rng = np.random.default_rng(1)
    rows = np.stack([staircase_levels(rng, 3) for _ in range(4000)])
    inside = rows[(rows[:, 0] > 0) & (rows[:, 2] < 1)]
    rises = np.diff(inside, axis=1)
    np.testing.assert_allclose(rises[:, 0], rises[:, 1])
    assert rises.min() < 0.05 and rises.max() > 0.45


def test_iid_levels_are_uniform():
    rows = np.stack([iid_levels(np.random.default_rng(i), 4) for i in range(2000)])
    counts = np.histogram(rows, bins=10, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_soil_raises_only_what_is_cleaner():
    rng = np.random.default_rng(2)
    levels = np.array([0.0, 0.0, 0.5, 1.0])
    soiled = np.stack([soil(rng, levels, 0.1) for _ in range(500)])
    assert (soiled[:, 2:] == levels[2:]).all()
    assert (soiled[:, 0] == soiled[:, 1]).all()
    assert 0.4 < (soiled[:, 0] == 0).mean() < 0.6
    assert soiled[:, 0].max() < 0.1


def test_levels_are_shifted_and_repeated_over_their_blocks():
    levels = per_latent(np.array([0.0, 0.5, 1.0]), (1, 2, 3), shift=3.0)
    torch.testing.assert_close(levels, torch.tensor([0, 0.75, 0.75, 1, 1, 1]))


@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 4)])
def test_mask_lets_a_block_see_itself_and_all_before(sizes):
    mask = block_causal_mask(sizes, 2)
    owner = [block for block, size in enumerate(sizes) for _ in range(2 * size)]
    for query, block in enumerate(owner):
        assert mask[query].tolist() == [other <= block for other in owner]
