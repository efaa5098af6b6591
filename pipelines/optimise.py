"""The training loop that VAE, text encoder and DiT share: Muon and AdamW, cosine schedule, EMA, checkpoints, a log.

Matrices and convolutions take Muon's steps (their kernels flattened to matrices), the rest AdamW's. On the embedded
VAE that reached in 125 steps what AdamW alone had not reached in 1,400.

Randomness is addressed by (seed, step), so a resumed run sees the batches that the uncut run would have seen.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast; `out` receives `state.pt` and `log.jsonl`.

    `learning_rate` is Muon's, with updates scaled to the size of AdamW's; `adamw_learning_rate` is for the rest.
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

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; try 16")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be between 0 and 1; try 0.001")


def warmed_cosine(step: int, config: LoopConfig) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to a fiftieth."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Optimizers:
    """Muon over flattened views of the matrices, AdamW over everything else; both step together."""

    NOT_MATRICES = ("gamma", "scale_shift_table", "embedding", "shared", "relative_attention_bias", "queries")

    def __init__(self, model: nn.Module, config: LoopConfig):
        named = list(model.named_parameters())
        wide = [p.ndim >= 2 and p[0].numel() > 1 and not any(k in n for k in self.NOT_MATRICES) for n, p in named]
        self.matrices = [p for (_, p), is_wide in zip(named, wide, strict=True) if is_wide]
        rest = [p for (_, p), is_wide in zip(named, wide, strict=True) if not is_wide]
        self.flat = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        decay = config.weight_decay
        self.muon = torch.optim.Muon(
            self.flat, lr=config.learning_rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, lr=config.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.rates = ((self.muon, config.learning_rate), (self.adamw, config.adamw_learning_rate))

    def step(self, share: float) -> None:
        """One step at a share of the learning rates."""
        for view, matrix in zip(self.flat, self.matrices, strict=True):
            view.grad = matrix.grad.reshape(view.shape)
        for optimizer, rate in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()

    def state_dict(self) -> dict:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore both."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def optimise(
    model: nn.Module, loss_at: Callable[[int], dict[str, Tensor]], config: LoopConfig, *, resume: bool = False,
    options: Mapping[str, str | int | bool] = MappingProxyType({}),
) -> Iterator[dict]:  # fmt: skip
    """Minimise `loss_at(step)["loss"]`, yielding a log record every `log_every` steps.

    `options` is what else of the configuration must be the same in a resumed run.
    The model holds its EMA weights at the end. Raises FloatingPointError if the loss is not finite: the last
    checkpoint stays. Raises ValueError if `resume` finds a checkpoint of another configuration.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    optimizers = Optimizers(model, config)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = _load(model, optimizers, ema, config, options) if resume else 0
    log = (config.out / "log.jsonl").open("a" if first else "w")
    start, sums, count = time.perf_counter(), {}, 0
    for step in range(first, config.num_steps):
        losses = loss_at(step)
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"the loss of step {step} is not finite; {config.out} keeps the last checkpoint")
        model.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizers.step(warmed_cosine(step, config))
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
        sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in losses.items()}
        count += 1
        if (step + 1) % config.log_every == 0 or step + 1 == config.num_steps:
            record = {"step": step + 1, **{name: value / count for name, value in sums.items()},
                      "seconds": time.perf_counter() - start}  # fmt: skip
            log.write(json.dumps(record) + "\n")
            log.flush()
            sums, count = {}, 0
            yield record
        if (step + 1) % config.save_every == 0 or step + 1 == config.num_steps:
            _save(config.out, model, optimizers, ema, step + 1, {**_comparable(config), **options})
    log.close()
    load_ema(model, ema)


def load_ema(model: nn.Module, ema: dict[str, Tensor]) -> None:
    """Put averaged weights into the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ema[name])


def _save(out: Path, model: nn.Module, optimizers: Optimizers, ema: dict, step: int, config: dict) -> None:
    state = {"model": model.state_dict(), "optimizers": optimizers.state_dict(), "ema": ema, "step": step,
             "config": config}  # fmt: skip
    aside = out / "state.pt.part"
    torch.save(state, aside)
    aside.rename(out / "state.pt")


def _load(model: nn.Module, optimizers: Optimizers, ema: dict, config: LoopConfig, options: Mapping) -> int:
    path = config.out / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    now, then = {**_comparable(config), **options}, state["config"]
    if changed := [name for name in {**now, **then} if now.get(name) != then.get(name)]:
        raise ValueError(f"{path} was made with another configuration ({', '.join(changed)} differ); use another --out")
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    for name, value in state["ema"].items():
        ema[name].copy_(value)
    return state["step"]


def _comparable(config: LoopConfig) -> dict:
    values = asdict(config)
    for name in ("out", "log_every", "save_every"):
        del values[name]
    return values
