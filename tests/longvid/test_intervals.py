"""Dynamic programming finds what trying all partitions finds."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from longvid.intervals import (
    IntervalCost,
    affinity_cost,
    affinity_edges,
    cluster,
    distance_cost,
    edges_between,
    gradient_affinity,
    interval_edges,
    log_snr,
    task_levels,
)

LEVELS = task_levels(11, 0.06)


def measured_affinity(num_tasks=11, seed=0):
    gradients = torch.randn(num_tasks, 20, generator=torch.Generator().manual_seed(seed))
    return gradient_affinity(gradients.cumsum(0))


def distance(values):
    return lambda i, j: sum((values[t] - values[(i + j) // 2]) ** 2 for t in range(i, j + 1))


def dissimilarity(affinity):
    return lambda i, j: -sum(affinity[(i + j) // 2, t] for t in range(i, j + 1))


COSTS = {
    "timestep": (distance_cost(LEVELS), distance(LEVELS)),
    "log-snr": (distance_cost(log_snr(LEVELS)), distance(log_snr(LEVELS))),
    "affinity": (affinity_cost(measured_affinity()), dissimilarity(measured_affinity())),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_sums_over_an_interval(name):
    cost, written_out = COSTS[name]
    for i in range(11):
        for j in range(11):
            assert cost[i, j] == (pytest.approx(written_out(i, j), abs=1e-9) if i <= j else np.inf)


@pytest.mark.parametrize("num_intervals", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("name", [*COSTS, "random"])
def test_clusters_are_those_of_brute_force(name, num_intervals):
    cost = np.random.default_rng(5).normal(size=(11, 11)) if name == "random" else COSTS[name][0]
    partitions = [(0, *inner) for inner in combinations(range(1, 11), num_intervals - 1)]
    total = lambda starts: sum(cost[i, j - 1] for i, j in pairwise((*starts, 11)))  # noqa: E731
    found = cluster(cost, num_intervals)
    assert found in partitions
    assert total(found) == pytest.approx(min(map(total, partitions)), abs=1e-9)


def test_timesteps_are_cut_evenly_and_log_snr_finely_at_the_ends():
    by_time = interval_edges(IntervalCost.TIMESTEP, 4, 0.0)
    assert by_time == pytest.approx((0.25, 0.5, 0.75), abs=0.011)
    by_snr = interval_edges(IntervalCost.LOG_SNR, 5, 0.0)
    sizes = np.diff((0, *by_snr, 1))
    assert len(by_snr) == 4 and sizes[0] < sizes[1] < sizes[2] and sizes[4] < sizes[3] < sizes[2]


def test_measured_affinity_finds_groups_of_tasks():
    gradients = torch.eye(3, 8).repeat_interleave(torch.tensor([2, 5, 3]), 0) + 0.01
    affinity = gradient_affinity(gradients)
    np.testing.assert_allclose(np.diag(affinity), 1)
    assert cluster(affinity_cost(affinity), 3) == (0, 2, 7)
    levels = task_levels(10, 0.1)
    assert affinity_edges(affinity, 3, 0.1) == edges_between(levels, (0, 2, 7)) == pytest.approx((0.28, 0.73))
    with pytest.raises(ValueError, match="log-snr"):
        interval_edges(IntervalCost.AFFINITY, 3, 0.1)
