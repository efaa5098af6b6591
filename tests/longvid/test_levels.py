"""Rows that the model is trained on are rows that it meets."""

from itertools import combinations_with_replacement
from math import comb

import numpy as np
import pytest
import torch

from longvid.levels import (
    LevelSampler,
    anchored_fopp_levels,
    block_causal_mask,
    draw_levels,
    fopp_levels,
    iid_levels,
    per_latent,
    soil,
    staircase_levels,
)

BLOCKS, STEPS = 3, 5
MONOTONE = list(combinations_with_replacement(range(1, STEPS + 1), BLOCKS))
"""All sequences 1 <= t_1 <= ... <= t_3 <= 5."""


def anchored_probability(row):
    """Of a sequence in FoPP as published, by its tables: mean over anchors of 1 / (steps, heads, tails).

    tails[i, j] counts the sequences that go on from block i at step j, heads[i, j] those that arrive there.
    """
    tails, heads = np.ones((BLOCKS, STEPS)), np.ones((BLOCKS, STEPS))
    for i in reversed(range(BLOCKS - 1)):
        for j in reversed(range(STEPS - 1)):
            tails[i, j] = tails[i, j + 1] + tails[i + 1, j]
    for i in range(1, BLOCKS):
        for j in range(1, STEPS):
            heads[i, j] = heads[i, j - 1] + heads[i - 1, j]
    return np.mean([1 / (STEPS * heads[i, t - 1] * tails[i, t - 1]) for i, t in enumerate(row)])


PROBABILITIES = {fopp_levels: lambda row: 1 / len(MONOTONE), anchored_fopp_levels: anchored_probability}


@pytest.mark.parametrize("sampler", PROBABILITIES)
def test_fopp_against_all_monotone_sequences(sampler):
    """Chi-square of 20,000 draws, 34 degrees of freedom, p = 0.001; the other sampler's probabilities do not fit."""
    assert len(MONOTONE) == comb(STEPS + BLOCKS - 1, BLOCKS) == 35
    rng, draws = np.random.default_rng(0), 20_000
    counts = dict.fromkeys(MONOTONE, 0)
    for _ in range(draws):
        counts[tuple(np.rint(sampler(rng, BLOCKS, STEPS) * STEPS).astype(int).tolist())] += 1
    assert len(counts) == 35, "all are monotone"
    observed = np.array([counts[row] for row in MONOTONE])
    for name, probability in PROBABILITIES.items():
        expected = draws * np.array([probability(row) for row in MONOTONE])
        assert expected.sum() == pytest.approx(draws)
        chi_square = ((observed - expected) ** 2 / expected).sum()
        assert (chi_square < 65.2) == (name is sampler), f"{name.__name__}: {chi_square}"


@pytest.mark.parametrize("num_blocks", [1, 2, 40])
@pytest.mark.parametrize("sampler", LevelSampler)
def test_every_sampler_draws_a_level_per_block(sampler, num_blocks):
    rng = np.random.default_rng(3)
    rows = np.stack([draw_levels(sampler, rng, num_blocks) for _ in range(50)])
    assert rows.shape == (50, num_blocks) and rows.min() >= 0 and rows.max() <= 1 and len(set(rows.mean(1))) > 30
    if sampler is not LevelSampler.IID:
        assert (np.diff(rows, axis=1) >= 0).all()
    assert ((np.diff(rows, axis=1) == 0).all()) == (sampler is LevelSampler.SYNC or num_blocks == 1)


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
    mask = block_causal_mask(sizes)
    owner = [block for block, size in enumerate(sizes) for _ in range(size)]
    for query, block in enumerate(owner):
        assert mask[query].tolist() == [other <= block for other in owner]
