"""What the DiT's errors, one per latent, come to: weights by level, intervals of levels as tasks, noise assignment.

The mathematics is in `longvid/weighting.py`, `intervals.py`, `multitask.py` and `assignment.py`. With PCGrad and
NashMTL a step takes a backward pass for each interval that the batch has, and holds that many gradients, before the one
that trains.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from longvid.intervals import IntervalCost, affinity_edges, gradient_affinity, interval_edges, task_levels
from longvid.multitask import (
    Multitask,
    gram_matrix,
    interval_losses,
    nash_weights,
    pcgrad_weights,
    uncertainty_loss,
)
from longvid.weighting import LossWeighting, level_weight

NUM_MEASURED = 20
"""Levels between which affinity is measured, so the most intervals there can be."""

MEASURE_AFTER = 0.05
"""Share of the steps after which it is: before, intervals are those of log-SNR."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Options of the loss; those left out make it the plain mean over latents that count.

    `num_intervals` and `interval_cost` are read with `multitask` only (arXiv 2306.00354 has 5 intervals). `immiscible`
    assigns each batch's noise to its clips, `balance_first` weights a video's first latent to the others' scale.
    """

    loss_weighting: LossWeighting = LossWeighting.NONE
    multitask: Multitask = Multitask.NONE
    num_intervals: int = 5
    interval_cost: IntervalCost = IntervalCost.LOG_SNR
    immiscible: bool = False
    balance_first: bool = False

    def __post_init__(self):
        if not 2 <= self.num_intervals <= NUM_MEASURED:
            raise ValueError(f"num_intervals={self.num_intervals} must be between 2 and {NUM_MEASURED}; try 5")

    @property
    def needs_gradients(self) -> bool:
        """Whether a step needs each interval's own gradient."""
        return self.multitask in (Multitask.PCGRAD, Multitask.NASH)

    def changes(self) -> dict[str, str | int | bool]:
        """Options that are not at their defaults, as plain values."""
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return {name: v.value if isinstance(v, StrEnum) else v for name, v, default in values if v != default}


class WithUncertainty(nn.Module):
    """A DiT, and beside it what uncertainty weighting learns: log variances of the intervals' losses, (intervals,)."""

    def __init__(self, dit: nn.Module, num_intervals: int):
        super().__init__()
        self.dit = dit
        self.log_variances = nn.Parameter(torch.zeros(num_intervals))


def combined_loss(
    objective: Objective,
    model: nn.Module,
    errors: tuple[Tensor, Tensor, Tensor],
    edges: tuple[float, ...],
    rng: np.random.Generator,
    total: Tensor | None = None,
) -> dict[str, Tensor]:
    """`loss`, whose gradient is the step's, and with several tasks also `error`, the plain mean, to compare by.

    `errors` are each latent's error (b, f), which count, and their levels. `model` is what is trained. Of a part of a
    batch `total` is how many latents of the whole batch count: what parts give adds up to what the whole gives.
    """
    error, counts, levels = errors
    error = error * level_weight(objective.loss_weighting, levels)
    weight = counts.float()
    mean = (error * weight).sum() / (weight.sum() if total is None else total).clamp(min=1)
    if objective.multitask is Multitask.NONE:
        return {"loss": mean}
    losses, present = interval_losses(error, counts, levels, edges)
    if objective.multitask is Multitask.UNCERTAINTY:
        loss = uncertainty_loss(losses, model.log_variances, present)
    else:
        gram = gram_matrix(task_gradients(model, losses, present))
        weights = nash_weights(gram) if objective.multitask is Multitask.NASH else pcgrad_weights(gram, rng)
        loss = (torch.from_numpy(weights).to(losses) * losses).sum()
    return {"loss": loss, "error": mean.detach()}


def task_gradients(model: nn.Module, losses: Tensor, present: Tensor) -> Tensor:
    """Gradient of each loss (tasks, parameters), 0 for tasks that are not present; the graph is kept."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = losses.new_zeros(len(losses), sum(p.numel() for p in parameters))
    for row, loss, is_present in zip(rows, losses, present.tolist(), strict=True):
        if is_present:
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            torch.cat([gradient.flatten() for gradient in found], out=row)
    return rows


def measured_edges(
    model: nn.Module, losses_at: Callable[[float], list[Tensor]], num_intervals: int, cleanest: float
) -> tuple[float, ...]:
    """Edges of intervals by the affinity of levels: the mean cosine of their gradients over some batches.

    `losses_at(level)` gives the loss of each batch with all its latents at that level, every time the same batches.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for level in task_levels(NUM_MEASURED, cleanest):
        found = [torch.autograd.grad(loss, parameters) for loss in losses_at(float(level))]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in found]))
    affinity = np.mean([gradient_affinity(batch) for batch in torch.stack(rows, 1)], axis=0)
    return affinity_edges(affinity, num_intervals, cleanest)


def edges_at(
    step: int, num_steps: int, objective: Objective, cleanest: float, path: Path, measure: Callable[[], tuple]
) -> tuple[float, ...]:
    """Edges of the intervals at a step; those by affinity are measured once and kept in `path` for a resumed run."""
    if objective.multitask is Multitask.NONE:
        return ()
    measured_at = int(MEASURE_AFTER * num_steps)
    if objective.interval_cost is not IntervalCost.AFFINITY:
        return interval_edges(objective.interval_cost, objective.num_intervals, cleanest)
    if step < measured_at:
        return interval_edges(IntervalCost.LOG_SNR, objective.num_intervals, cleanest)
    if step == measured_at:
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"measured_at": step, "edges": measure()}) + "\n")
        aside.rename(path)
    if not path.exists():
        raise ValueError(f"{path}, measured at step {measured_at}, is missing; train anew with another --out")
    return tuple(json.loads(path.read_text())["edges"])
