"""The split of layers against every split there is."""

import random
from itertools import combinations

import pytest

from parallel.split import split_layers


def greatest(costs, cuts, first, last):
    sums = [sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True)]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@pytest.mark.parametrize("seed", range(30))
def test_no_split_is_better(seed):
    rng = random.Random(seed)
    costs = [rng.randint(1, 9) for _ in range(rng.randint(1, 8))]
    first, last, num_stages = rng.randint(0, 9), rng.randint(0, 9), rng.randint(1, len(costs))
    ranges = split_layers(costs, num_stages, first=first, last=last)
    assert [i for part in ranges for i in part] == list(range(len(costs))) and all(ranges)
    best = min(greatest(costs, cuts, first, last) for cuts in combinations(range(1, len(costs)), num_stages - 1))
    assert greatest(costs, [part.stop for part in ranges[:-1]], first, last) == best


def test_equal_layers_are_spread_evenly_earlier_stages_first():
    assert [len(part) for part in split_layers([1.0] * 7, 3)] == [3, 2, 2]
    assert [len(part) for part in split_layers([1.0] * 40, 8)] == [5] * 8
    assert [len(part) for part in split_layers([1.0] * 6, 2, last=2.0)] == [4, 2]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_a_stage_needs_a_layer(num_stages):
    with pytest.raises(ValueError, match=f"{num_stages} stages of 3 layers: a stage needs a layer; use 1 to 3"):
        split_layers([1.0] * 3, num_stages)
