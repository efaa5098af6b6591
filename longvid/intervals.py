"""Noise levels as tasks, clustered into intervals by dynamic programming.

*Addressing Negative Transfer in Diffusion Models* (arXiv 2306.00354), section 4: near levels help each other in
training and distant ones get in each other's way, so levels are clustered into contiguous intervals, each of which
counts as one task (`longvid/multitask.py`). A cost says how badly the tasks i..j go together; costs are matrices
(n, n) of which entry (i, j), i <= j, is read.
"""

from enum import StrEnum

import numpy as np
import torch
from torch import Tensor


class IntervalCost(StrEnum):
    """What makes levels alike."""

    TIMESTEP = "timestep"
    LOG_SNR = "log-snr"
    AFFINITY = "affinity"


def task_levels(num_tasks: int, cleanest: float) -> np.ndarray:
    """Levels of tasks that share (cleanest, 1) evenly: the middle of each share, (num_tasks,)."""
    return cleanest + (1 - cleanest) * (np.arange(num_tasks) + 0.5) / num_tasks


def log_snr(level: np.ndarray) -> np.ndarray:
    """2 log((1 - sigma) / sigma)."""
    return 2 * (np.log1p(-level) - np.log(level))


def distance_cost(values: np.ndarray) -> np.ndarray:
    """Sum over t in i..j of (value_t - value_c)^2, c the middle task of i..j: for timesteps and for log-SNR."""
    return _cost_to_centre((values[:, None] - values[None, :]) ** 2)


def affinity_cost(affinity: np.ndarray) -> np.ndarray:
    """Minus the sum over t in i..j of the affinity of c and t, c the middle task of i..j."""
    return _cost_to_centre(-affinity)


def gradient_affinity(gradients: Tensor) -> np.ndarray:
    """Cosines between the gradients (n, parameters) of the tasks, (n, n); 0 where a gradient is 0."""
    unit = torch.nn.functional.normalize(gradients.double(), dim=1)
    return (unit @ unit.T).numpy()


def cluster(cost: np.ndarray, num_intervals: int) -> tuple[int, ...]:
    """First task of each of `num_intervals` contiguous intervals whose costs have the least sum.

    best(k, j) = min over i of best(k - 1, i - 1) + cost(i, j): the least cost of the tasks 0..j in k intervals.
    """
    num_tasks = len(cost)
    assert 1 <= num_intervals <= num_tasks, f"{num_intervals} intervals of {num_tasks} tasks"
    best, starts = cost[0], np.zeros((num_intervals, num_tasks), dtype=int)
    for k in range(1, num_intervals):
        total = np.full((num_tasks, num_tasks), np.inf)
        for i in range(k, num_tasks):
            total[i, i:] = best[i - 1] + cost[i, i:]
        best, starts[k] = total.min(0), total.argmin(0)
    found, last = [], num_tasks - 1
    for k in reversed(range(num_intervals)):
        found.append(int(starts[k, last]))
        last = found[-1] - 1
    return tuple(reversed(found))


def edges_between(levels: np.ndarray, starts: tuple[int, ...]) -> tuple[float, ...]:
    """Levels at which one interval ends and the next begins, halfway between tasks: one fewer than intervals."""
    return tuple(float(levels[i - 1] + levels[i]) / 2 for i in starts[1:])


def interval_edges(cost: IntervalCost, num_intervals: int, cleanest: float, num_tasks: int = 100) -> tuple[float, ...]:
    """Edges of the intervals of (cleanest, 1) by a cost that needs no measurement."""
    levels = task_levels(num_tasks, cleanest)
    match cost:
        case IntervalCost.TIMESTEP:
            values = levels
        case IntervalCost.LOG_SNR:
            values = log_snr(levels)
        case IntervalCost.AFFINITY:
            raise ValueError("affinity must be measured: use affinity_edges, or the cost log-snr")
    return edges_between(levels, cluster(distance_cost(values), num_intervals))


def affinity_edges(affinity: np.ndarray, num_intervals: int, cleanest: float) -> tuple[float, ...]:
    """Edges of the intervals of (cleanest, 1) by the measured affinity (n, n) of its `task_levels`."""
    starts = cluster(affinity_cost(affinity), num_intervals)
    return edges_between(task_levels(len(affinity), cleanest), starts)


def _cost_to_centre(pairs: np.ndarray) -> np.ndarray:
    """Entry (i, j): sum of pairs[(i + j) // 2, i..j]; inf where i > j."""
    num_tasks = len(pairs)
    sums = np.concatenate([np.zeros((num_tasks, 1)), np.cumsum(pairs, axis=1)], axis=1)
    first, last = np.arange(num_tasks)[:, None], np.arange(num_tasks)[None, :]
    centre = (first + last) // 2
    return np.where(first <= last, sums[centre, last + 1] - sums[centre, first], np.inf)
