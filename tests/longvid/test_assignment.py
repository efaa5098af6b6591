"""Noise is assigned as trying all permutations would."""

from itertools import permutations

import numpy as np
import pytest
import torch

from longvid.assignment import assign, nearest_noise


@pytest.mark.parametrize("num", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["random", "whole"])
def test_assignment_is_that_of_brute_force(num, kind):
    rng = np.random.default_rng(num)
    for _ in range(15):
        cost = rng.normal(size=(num, num)) if kind == "random" else rng.integers(0, 4, (num, num)).astype(float)
        found = assign(cost)
        assert sorted(found) == list(range(num))
        least = min(cost[range(num), list(p)].sum() for p in permutations(range(num)))
        assert cost[range(num), found].sum() == pytest.approx(least, abs=1e-9)


def test_a_large_assignment_finds_the_one_that_duals_prove_best():
    """Costs are a number of the row, one of the column, and something positive except on a hidden permutation."""
    rng = np.random.default_rng(0)
    hidden = rng.permutation(60)
    excess = rng.uniform(0.01, 1, (60, 60))
    excess[range(60), hidden] = 0
    cost = excess + rng.normal(size=(60, 1)) + rng.normal(size=(1, 60))
    assert (assign(cost) == hidden).all()


def test_noise_goes_to_the_clip_that_it_is_near():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(5, 2, 1, 3, 3, generator=generator)
    shuffled = clean[[3, 1, 4, 0, 2]] + 0.1 * torch.randn(clean.shape, generator=generator)
    found = nearest_noise(clean, shuffled)
    assert (found - clean).abs().max() < 0.6
    assert sorted(found.flatten().tolist()) == sorted(shuffled.flatten().tolist())
