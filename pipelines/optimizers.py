"""How long and how fast to train, and what moves the weights: Muon and AdamW, or AdamW alone; schedules.

Matrices and convolutions take Muon's steps (their kernels flattened to matrices), the rest AdamW's. On the embedded
VAE that reached in 125 steps what AdamW alone had not reached in 1,400.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

MUON, ADAMW = "muon", "adamw"
COSINE, CONSTANT = "cosine", "constant"

Rows = TypeVar("Rows", Tensor, Sequence)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast; `out` receives `state.pt` and `log.jsonl`.

    `learning_rate` is Muon's, with updates scaled to the size of AdamW's; `adamw_learning_rate` is for the rest. With
    the optimizer `adamw` everything takes `learning_rate`. A step's `batch_size` is of all processes together, and
    each takes its share in `accumulation` parts. `deepspeed` is zero1, zero2, zero3, a file, or empty for none.
    `ema_decay` 0 keeps no average: the weights are those of the last step.
    """

    out: Path
    num_steps: int
    batch_size: int
    learning_rate: float
    adamw_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    optimizer: str = MUON
    schedule: str = COSINE
    accumulation: int = 1
    deepspeed: str = ""
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "save_every", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; try 16")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be between 0 and 1; try 0.001")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be at least 0 and below 1; try 0.999")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0; try 100")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive; try 1")
        if self.optimizer not in (MUON, ADAMW) or self.schedule not in (COSINE, CONSTANT):
            raise ValueError(f"optimizer={self.optimizer!r}, schedule={self.schedule!r} must be {MUON} or {ADAMW}, "
                             f"and {COSINE} or {CONSTANT}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `index` of `count` of a step's batch. What a loss says of the parts adds up to what it says of the whole."""

    index: int = 0
    count: int = 1

    def of(self, rows: Rows) -> Rows:
        """Its rows of something that has a row, or several, for each clip."""
        size, rest = divmod(len(rows), self.count)
        assert not rest, f"{len(rows)} rows do not make {self.count} parts"
        return rows[self.index * size : (self.index + 1) * size]


WHOLE = Part()


def check_parts(batch_size: int, num_processes: int, accumulation: int) -> None:
    """Raise ValueError for a batch that cannot be split evenly."""
    parts = num_processes * accumulation
    if batch_size % parts:
        near = -(-batch_size // parts) * parts
        raise ValueError(f"batch_size={batch_size} cannot be split evenly over {num_processes} processes x "
                         f"{accumulation} accumulation steps; try {near}")  # fmt: skip


def warmed_cosine(step: int, config: LoopConfig) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to a fiftieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def leave_out_cudnn_attention() -> None:
    """From here on this process attends by other kernels than cuDNN's, torch's first choice on Hopper and later GPUs.

    Its gradients in bfloat16 are wrong at some shapes (torch 2.11 to 2.13: pytorch issue 196678, kyutai-labs/pocket-tts
    pull request 264). Where no gradient is taken it stays: it is the fastest there.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def share_at(step: int, config: LoopConfig) -> float:
    """Share of the learning rate by the schedule of that name; both warm up."""
    if config.schedule == CONSTANT:
        return min(1.0, (step + 1) / max(1, config.warmup_steps))
    return warmed_cosine(step, config)


NOT_MATRICES = ("gamma", "scale_shift_table", "embedding", "shared", "relative_attention_bias", "queries")


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves a parameter: a matrix, or a kernel that can be flattened to one."""
    return parameter.ndim >= 2 and parameter[0].numel() > 1 and not any(part in name for part in NOT_MATRICES)


class Optimizers:
    """Muon over flattened views of the matrices, AdamW over everything else; both step together."""

    def __init__(self, model: nn.Module, config: LoopConfig):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        wide = [is_matrix(name, p) for name, p in named]
        self.matrices = [p for (_, p), is_wide in zip(named, wide, strict=True) if is_wide]
        rest = [p for (_, p), is_wide in zip(named, wide, strict=True) if not is_wide]
        self.flat = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        for view, matrix in zip(self.flat, self.matrices, strict=True):
            set_speed([view], speed_of(matrix))
        self.muon = torch.optim.Muon(
            by_speed(self.flat), lr=config.learning_rate, weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(
            by_speed(rest), lr=config.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.rates = ((self.muon, config.learning_rate), (self.adamw, config.adamw_learning_rate))

    def step(self, share: float) -> None:
        """One step at a share of the learning rates."""
        for view, matrix in zip(self.flat, self.matrices, strict=True):
            view.grad = matrix.grad.reshape(view.shape)
        for optimizer, rate in self.rates:
            set_rate(optimizer, rate * share)
            optimizer.step()

    def state_dict(self) -> dict:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore both."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


class AdamW:
    """AdamW over everything that is trained, weight decay on what has two axes or more."""

    def __init__(self, model: nn.Module, config: LoopConfig):
        self.rate = config.learning_rate
        self.adamw = new_adamw(model, config)

    def step(self, share: float) -> None:
        """One step at a share of the learning rate."""
        set_rate(self.adamw, self.rate * share)
        self.adamw.step()

    def state_dict(self) -> dict:
        """Its state."""
        return {"adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore it."""
        self.adamw.load_state_dict(state["adamw"])


def new_adamw(model: nn.Module, config: LoopConfig) -> torch.optim.AdamW:
    """torch's AdamW over what is trained, in two groups: with weight decay and without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{**group, "weight_decay": config.weight_decay} for group in by_speed([p for p in trained if p.ndim > 1])]
    groups += [{**group, "weight_decay": 0.0} for group in by_speed([p for p in trained if p.ndim <= 1])]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


def set_speed(parameters: Iterable[Tensor], speed: float) -> None:
    """Let parameters learn at `speed` times the learning rate, in whatever optimizer is made for them then."""
    for parameter in parameters:
        parameter.speed = speed


def speed_of(parameter: Tensor) -> float:
    """What was set; 1 where nothing was."""
    return getattr(parameter, "speed", 1.0)


def by_speed(parameters: Sequence[Tensor]) -> list[dict]:
    """Groups of parameters of one speed, as torch's optimizers take them."""
    groups: dict[float, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(speed_of(parameter), []).append(parameter)
    return [{"params": some, "speed": speed} for speed, some in groups.items()]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step be taken at this learning rate, each group at its speed."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("speed", 1.0)


def new_optimizers(model: nn.Module, config: LoopConfig) -> Optimizers | AdamW:
    """Those of the configuration."""
    return Optimizers(model, config) if config.optimizer == MUON else AdamW(model, config)
