"""Losses of several tasks, the intervals of levels, made into one.

PCGrad and NashMTL combine gradients linearly, with coefficients that depend on inner products only. So each is a
function from the Gram matrix G G^T (tasks, tasks) of the tasks' gradients G (tasks, parameters) to a weight per task,
and the combined gradient is that of the weighted sum of losses. Knows no model.
"""

from enum import StrEnum
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from longvid.types import Levels

PerTask = Annotated[Tensor, "k"]
"""A number per task."""


class Multitask(StrEnum):
    """How the losses of the intervals are combined."""

    NONE = "none"
    UNCERTAINTY = "uw"
    PCGRAD = "pcgrad"
    NASH = "nash"


def interval_losses(error: Levels, counts: Levels, level: Levels, edges: tuple[float, ...]) -> tuple[PerTask, PerTask]:
    """Mean error over the latents that count of each interval, 0 where there is none, and which have any (bool)."""
    member = torch.bucketize(level, torch.tensor(edges, device=level.device)).flatten()
    weight = counts.to(error.dtype).flatten()
    sums, sizes = error.new_zeros(2, len(edges) + 1).unbind()
    sums = sums.index_add(0, member, error.flatten() * weight)
    sizes = sizes.index_add(0, member, weight)
    return sums / sizes.clamp(min=1), sizes > 0


def uncertainty_loss(losses: PerTask, log_variances: PerTask, present: PerTask) -> Tensor:
    """Sum over the present tasks of (exp(-s) L + s) / 2; s is learned, and is log L at the optimum.

    Source: Kendall et al. (arXiv 1705.07115), in the form of arXiv 2306.00354.
    """
    return (0.5 * ((-log_variances).exp() * losses + log_variances) * present).sum()


def gram_matrix(gradients: Tensor) -> np.ndarray:
    """Inner products of the rows of (tasks, parameters), in float64."""
    gradients = gradients.double()
    return (gradients @ gradients.T).cpu().numpy()


def pcgrad_weights(gram: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weights of the tasks' gradients in the sum of gradients freed of conflicts, (tasks,).

    Each gradient, against each other in random order: if their product is negative, its part along the other is taken
    away. Source: PCGrad (arXiv 2001.06782), algorithm 1. Row i of `parts` writes gradient i in terms of all.
    """
    num_tasks = len(gram)
    parts = np.eye(num_tasks)
    for i in range(num_tasks):
        for j in rng.permutation(num_tasks):
            product = parts[i] @ gram[:, j]
            if j != i and product < 0:
                parts[i, j] -= product / gram[j, j]
    return parts.sum(0)


def nash_weights(gram: np.ndarray, ridge: float = 1e-9, tolerance: float = 1e-9) -> np.ndarray:
    """Weights a > 0 with G G^T a = 1 / a, entry by entry: the Nash bargaining of the tasks, (tasks,).

    Source: NashMTL (arXiv 2202.01017), claim 3.2. Such an `a` is where a^T M a / 2 - sum(log a) is least: strictly
    convex and self-concordant, so Newton's step shortened by 1 / (1 + its decrement) arrives from anywhere. The
    combined gradient has norm sqrt(tasks). Where gradients can cancel (a Pareto-stationary point) there is no
    solution, hence the ridge, a share of the mean square. Tasks with no gradient get weight 0.
    """
    has_gradient = np.diag(gram) != 0  # one that is not a number makes weights that are none, and training stops
    weights = np.zeros(len(gram))
    if not has_gradient.any():
        return weights
    norms = np.sqrt(np.diag(gram)[has_gradient])
    cosines = gram[np.ix_(has_gradient, has_gradient)] / np.outer(norms, norms) + ridge * np.eye(len(norms))
    scaled = np.full(len(norms), 1 / np.sqrt(len(norms)))
    for _ in range(500):
        gradient = cosines @ scaled - 1 / scaled
        step = np.linalg.solve(cosines + np.diag(scaled**-2), gradient)
        decrement = np.sqrt(max(0.0, gradient @ step))
        scaled = scaled - step / (1 + decrement) if decrement > 0.25 else scaled - step
        if decrement < tolerance:
            break
    weights[has_gradient] = scaled / norms
    return weights
