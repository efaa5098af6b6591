"""Gradients and steps in one process: the plain engine, which every other is held to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.optimizers import WHOLE, LoopConfig, Part, new_optimizers

Loss = Callable[..., dict[str, Tensor]]
"""`loss(step)` or `loss(step, part)`: the figures of a step, or of a part of its batch; `loss` is what is minimised.

Whatever the step needs that is random it draws for the whole batch from (seed, step), so a part is the same rows
wherever it is computed, and figures of the parts add up to those of the whole.
"""


class Alone:
    """One process; a batch in one part, or in as many as gradients are accumulated over."""

    rank, num_processes = 0, 1

    def __init__(self, model: nn.Module, loss: Loss, config: LoopConfig):
        self.model, self.loss, self.config = model, loss, config
        self.optimizers = new_optimizers(model, config)

    @property
    def trained(self) -> dict[str, Tensor]:
        """What this process keeps of each trained parameter, by name."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self, step: int) -> dict[str, float]:
        """Figures of the step's batch, its gradients in the parameters.

        Raises FloatingPointError, before gradients are changed, if the loss is not finite.
        """
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for i in range(self.config.accumulation):
            figures = self.loss(step, Part(index=i, count=self.config.accumulation)) \
                if self.config.accumulation > 1 else self.loss(step)  # fmt: skip
            add_finite(sums, figures, step, self.config.out)
            figures["loss"].backward()
        return sums

    def update(self, share: float) -> None:
        """A step of the optimizers at a share of the learning rates, gradients clipped."""
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.config.max_grad_norm)
        self.optimizers.step(share)

    @torch.no_grad()
    def measure(self, loss: Loss, step: int) -> dict[str, float]:
        """Figures of another loss, without gradients."""
        return {name: float(value) for name, value in loss(step, WHOLE).items()}

    def save(self, path: Path, ema: dict[str, Tensor], about: dict) -> None:
        """Write a checkpoint aside and rename it."""
        state = self.state(ema) | about
        aside = path.with_name(path.name + ".part")
        torch.save(state, aside)
        aside.rename(path)

    def state(self, ema: dict[str, Tensor]) -> dict:
        """Weights that are trained, the optimizers' state and the averages."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        weights = {name: value for name, value in self.model.state_dict().items() if name not in frozen}
        return {"model": weights, "optimizers": self.optimizers.state_dict(), "ema": ema}

    def load(self, path: Path, state: dict, ema: dict[str, Tensor]) -> None:
        """Go on from what a checkpoint holds."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        missing, surplus = self.model.load_state_dict(state["model"], strict=False)
        if surplus or set(missing) - frozen:
            raise ValueError(f"{path} holds other weights than are trained ({(surplus or missing)[0]} is one); use "
                             "another --out")  # fmt: skip
        self.optimizers.load_state_dict(state["optimizers"])
        for name, value in state["ema"].items():
            ema[name].copy_(value)

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The model with these weights in place of its own, for as long as the context lasts."""
        own = {name: value.clone() for name, value in self.trained.items()}
        self.put(values)
        try:
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Put weights into the model; those of all that is trained."""
        for name, kept in self.trained.items():
            kept.copy_(values[name])

    def finish(self) -> None:
        """Nothing more will be trained: the model is a plain, whole one again."""


def add_finite(sums: dict[str, float], figures: dict[str, Tensor], step: int, out: Path) -> None:
    """Add figures to sums. Raises FloatingPointError if the loss is not finite."""
    for name, value in figures.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach())
    if not torch.isfinite(torch.tensor(sums["loss"])):
        raise FloatingPointError(f"the loss of step {step} is not finite; {out} keeps the last checkpoint")
