"""The training loop that VAE, text encoder and DiT share: AdamW, cosine schedule, EMA, checkpoints, a log.

Randomness is addressed by (seed, step), so a resumed run sees the batches that the uncut run would have seen.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast; `out` receives `state.pt` and `log.jsonl`."""

    out: Path
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; try 16")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be between 0 and 1; try 0.001")


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimise(
    model: nn.Module, loss_at: Callable[[int], dict[str, Tensor]], config: LoopConfig, *, resume: bool = False
) -> Iterator[dict]:
    """Minimise `loss_at(step)["loss"]`, yielding a log record every `log_every` steps.

    The model holds its EMA weights at the end. Raises FloatingPointError if the loss is not finite: the last
    checkpoint stays. Raises ValueError if `resume` finds a checkpoint of another configuration.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = _load(model, optimizer, ema, config) if resume else 0
    log = (config.out / "log.jsonl").open("a" if first else "w")
    start, sums, count = time.perf_counter(), {}, 0
    for step in range(first, config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        losses = loss_at(step)
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"the loss of step {step} is not finite; the last checkpoint in {config.out} stays")
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
        sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in losses.items()}
        count += 1
        if (step + 1) % config.log_every == 0 or step + 1 == config.num_steps:
            record = {"step": step + 1, **{name: value / count for name, value in sums.items()},
                      "lr": learning_rate_at(step, config), "seconds": time.perf_counter() - start}  # fmt: skip
            log.write(json.dumps(record) + "\n")
            log.flush()
            sums, count = {}, 0
            yield record
        if (step + 1) % config.save_every == 0 or step + 1 == config.num_steps:
            _save(model, optimizer, ema, config, step + 1)
    log.close()
    load_ema(model, ema)


def load_ema(model: nn.Module, ema: dict[str, Tensor]) -> None:
    """Put averaged weights into the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ema[name])


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict, config: LoopConfig, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema, "step": step,
             "config": _comparable(config)}  # fmt: skip
    aside = config.out / "state.pt.part"
    torch.save(state, aside)
    aside.rename(config.out / "state.pt")


def _load(model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict, config: LoopConfig) -> int:
    path = config.out / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["config"] != _comparable(config):
        changed = [k for k, v in _comparable(config).items() if state["config"].get(k) != v]
        raise ValueError(f"{path} was made with another configuration ({', '.join(changed)} differ); use another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, value in state["ema"].items():
        ema[name].copy_(value)
    return state["step"]


def _comparable(config: LoopConfig) -> dict:
    values = asdict(config)
    for name in ("out", "log_every", "save_every"):
        del values[name]
    return values
