"""The training loop that VAE, text encoder and DiT share: schedule, EMA, checkpoints, checks at intervals, a log.

Randomness is addressed by (seed, step), so a resumed run sees the batches that the uncut run would have seen. What
computes gradients is an engine: `pipelines/engine.py` in one process, `pipelines/engine_many.py` in several.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from pipelines.engine import Alone, Loss
from pipelines.optimizers import LoopConfig, leave_out_cudnn_attention, share_at
from pipelines.training_log import TrainingLog

__all__ = ["Check", "Engine", "LoopConfig", "alone", "optimise"]

Engine = Callable[[nn.Module, Loss, LoopConfig], Alone]
"""Makes what computes gradients and steps: `alone`, or one for several processes."""

NOT_COMPARED = ("out", "log_every", "save_every", "accumulation", "tensorboard")
"""What a resumed run may have otherwise."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A look at the model every so many steps, its averaged weights in place: `look(engine, step)` gives figures.

    All processes look together; only the first may write.
    """

    every: int
    look: Callable[[Alone, int], dict[str, float]]


def alone(model: nn.Module, loss: Loss, config: LoopConfig) -> Alone:
    """The engine of one process."""
    return Alone(model, loss, config)


def optimise(
    model: nn.Module, loss_at: Loss, config: LoopConfig, *, resume: bool = False,
    options: Mapping[str, str | int | bool] = MappingProxyType({}), engine: Engine = alone,
    checks: Sequence[Check] = (),
) -> Iterator[dict]:  # fmt: skip
    """Minimise `loss_at(step)["loss"]`, yielding a log record every `log_every` steps, and one for each check.

    `options` is what else of the configuration must be the same in a resumed run.
    The model holds its EMA weights at the end. Raises FloatingPointError if the loss is not finite: the last
    checkpoint stays. Raises ValueError if `resume` finds a checkpoint of another configuration.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    leave_out_cudnn_attention()
    engine = engine(model, loss_at, config)
    ema = {name: value.float().clone() for name, value in engine.trained.items()}
    about = {**_comparable(config), **options}
    first = _load(engine, ema, config.out / "state.pt", about) if resume else 0
    log = TrainingLog(config.out, is_new=not first, has_tensorboard=config.tensorboard, is_kept=not engine.rank)
    start, sums, count = time.perf_counter(), {}, 0
    for step in range(first, config.num_steps):
        figures = engine.gradients(step)
        engine.update(share_at(step, config))
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [value.float() for value in engine.trained.values()], 1 - decay)
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
        count += 1
        done = step + 1
        if done % config.log_every == 0 or done == config.num_steps:
            record = {"step": done, **{name: value / count for name, value in sums.items()},
                      "seconds": time.perf_counter() - start}  # fmt: skip
            sums, count = {}, 0
            yield log.add(record)
        for check in checks:
            if done % check.every == 0 or done == config.num_steps:
                with engine.holding(ema):
                    found = check.look(engine, done)
                yield log.add({"step": done, **found})
        if done % config.save_every == 0 or done == config.num_steps:
            engine.save(config.out / "state.pt", ema, {"step": done, "config": about})
    log.close()
    engine.put(ema)
    engine.finish()


def _load(engine: Alone, ema: dict[str, Tensor], path: Path, now: dict) -> int:
    """Go on from a checkpoint, if there is one: the step to begin with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    defaults = {f.name: f.default for f in fields(LoopConfig)}
    now, then = {**defaults, **now}, {**defaults, **state["config"]}
    if differ := [name for name in {**now, **then} if now.get(name) != then.get(name)]:
        values = "; ".join(
            f"{name} was {then.get(name, 'left out')}, now {now.get(name, 'left out')}" for name in differ
        )
        raise ValueError(f"{path} was made with another configuration ({', '.join(differ)} differ): {values}; use "
                         "another --out, or what it was")  # fmt: skip
    engine.load(path, state, ema)
    return state["step"]


def _comparable(config: LoopConfig) -> dict:
    return {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}
