"""Gradients and steps on several processes, by accelerate: data parallel, or DeepSpeed's ZeRO 1 to 3.

Each process takes its parts of the batch that is the step's; gradients are averaged over all. With ZeRO 1 processes
share the optimizer's state, with 2 the gradients, with 3 the parameters, too: of a parameter one then keeps a piece, of
which it also keeps the average. accelerate and deepspeed are imported here alone, when needed.
"""

import os
import shutil
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longvid.multitask import Multitask
from pipelines.engine import Alone, Loss, add_finite
from pipelines.optimizers import LoopConfig, Part, check_parts, new_adamw, new_optimizers, set_rate
from pipelines.zero import zero_config

SHARES = "shares"
"""Folder of what each process keeps of a ZeRO checkpoint."""


def check_spread(part: str, config, num_processes: int) -> None:
    """Raise ValueError for a training (of a VAE, a text encoder or a DiT) that so many processes cannot share."""
    loop, is_one = config.loop, num_processes * config.loop.accumulation == 1
    if part in ("text", "decoder") and num_processes > 1:
        raise ValueError(f"nproc={num_processes} is for vae and dit; {part} trains in one process")
    if part == "vae":
        for count in {config.clips(step)[0] for step in (0, loop.num_steps - 1)}:
            check_parts(count, num_processes, loop.accumulation)
    check_parts(loop.batch_size, num_processes, loop.accumulation)
    if part == "dit" and not is_one and config.objective.multitask is not Multitask.NONE:
        raise ValueError(f"multitask={config.objective.multitask.value} weighs gradients of a whole batch, which must "
                         "be in one process and one part; leave it or --nproc out")  # fmt: skip
    if loop.deepspeed:
        zero_config(loop, num_processes, dtype=config.dtype)
        if part != "vae" and config.compile:
            raise ValueError("compile is for training without deepspeed; leave --compile or --deepspeed out")


class Entered(nn.Module):
    """A model whose call is its loss: what is to happen around a pass happens around all that the loss does."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, step: int, part: Part) -> dict[str, Tensor]:
        """Figures of a part of a step's batch."""
        return self.loss(step, part)


def many(dtype: str, device: str):
    """The engine of several processes, or of one under DeepSpeed; the process group is there already."""
    return lambda model, loss, config: (Zero if config.deepspeed else Many)(model, loss, config, dtype, device)


class Many(Alone):
    """Data parallel: each process has the whole model. A checkpoint is that of one process, and serves any number."""

    def __init__(self, model: nn.Module, loss: Loss, config: LoopConfig, dtype: str, device: str):
        self.model, self.loss, self.config, self.device = model, loss, config, device
        self.rank, self.num_processes = dist.get_rank(), dist.get_world_size()
        world_size = int(os.environ["WORLD_SIZE"])
        assert self.num_processes == world_size, f"{self.num_processes} processes met, {world_size} were started"
        check_parts(config.batch_size, self.num_processes, config.accumulation)
        self._prepare(dtype)

    def _prepare(self, dtype: str) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=self.device == "cpu", gradient_accumulation_steps=self.config.accumulation)
        assert accelerator.num_processes == self.num_processes
        self.accelerator = accelerator
        self.entry = accelerator.prepare(Entered(self.model, self.loss))
        self.optimizers = new_optimizers(self.model, self.config)

    @property
    def parts(self) -> list[Part]:
        """Those of this process."""
        count, each = self.num_processes * self.config.accumulation, self.config.accumulation
        return [Part(index=i, count=count) for i in range(self.rank * each, (self.rank + 1) * each)]

    def gradients(self, step: int) -> dict[str, float]:
        """Figures of the step's whole batch, the same on all processes; its gradients where they belong."""
        sums: dict[str, float] = {}
        self._forget_gradients()
        for part in self.parts:
            with self._one_of_many(is_last=part == self.parts[-1]):
                figures = self.entry(step, part)
                add_finite(sums, self._summed(figures), step, self.config.out)
                # Processes average gradients, and the accumulation divides them; but what parts say adds up.
                self._backward(figures["loss"] * part.count)
        return sums

    def _forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def _one_of_many(self, *, is_last: bool) -> AbstractContextManager:
        """Entered for each pass of an accumulation; gradients cross links in the last."""
        return self.accelerator.accumulate(self.entry)

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _summed(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Figures summed over processes."""
        values = torch.stack([value.detach().float() for value in figures.values()])
        dist.all_reduce(values)
        return dict(zip(figures, values.cpu(), strict=True))

    @torch.no_grad()
    def measure(self, loss: Loss, step: int) -> dict[str, float]:
        """Figures of another loss without gradients, each process taking its part."""
        figures = loss(step, Part(index=self.rank, count=self.num_processes))
        return {name: float(value) for name, value in self._summed(figures).items()}

    def save(self, path: Path, ema: dict[str, Tensor], about: dict) -> None:
        """The first process writes what all have."""
        if not self.rank:
            super().save(path, ema, about)
        dist.barrier()


class Zero(Many):
    """ZeRO. A checkpoint is for as many processes as wrote it: each has its own file of shares."""

    def _prepare(self, dtype: str) -> None:
        import deepspeed

        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # one for each message
        # Without its own op for reductions on CPUs, which would be compiled for minutes, gloo does them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        assert deepspeed.comm.get_world_size() == self.num_processes, "deepspeed takes each process for the only one"
        from accelerate import Accelerator, DeepSpeedPlugin

        told = zero_config(self.config, self.num_processes, dtype=dtype)
        self.stage = told["zero_optimization"]["stage"]
        self.accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=told), gradient_accumulation_steps=self.config.accumulation
        )
        self.adamw = new_adamw(self.model, self.config)
        self.entry, _ = self.accelerator.prepare(Entered(self.model, self.loss), self.adamw)
        assert self.entry.dp_world_size == self.num_processes

    @property
    def trained(self) -> dict[str, Tensor]:
        """With ZeRO 3 this process's piece of each parameter."""
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: getattr(p, "ds_tensor", p).detach() for name, p in named}

    def _forget_gradients(self) -> None:
        """DeepSpeed does so after its step."""

    def _one_of_many(self, *, is_last: bool) -> AbstractContextManager:
        self.entry.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.entry.backward(loss)

    def update(self, share: float) -> None:
        """A step of DeepSpeed's optimizer, which clips by itself."""
        set_rate(self.entry.optimizer, self.config.learning_rate * share)
        self.entry.step()

    def save(self, path: Path, ema: dict[str, Tensor], about: dict) -> None:
        """Every process writes its shares; the first then writes what names them, and removes older ones."""
        folder, tag = path.parent / SHARES, f"step-{about['step']}"
        with redirect_stdout(sys.stderr):
            self.entry.save_checkpoint(folder, tag, save_latest=False, exclude_frozen_parameters=True)
        torch.save(ema, folder / tag / f"ema-{self.rank}.pt")
        dist.barrier()
        if not self.rank:
            aside = path.with_name(path.name + ".part")
            torch.save({"shares": tag, "num_processes": self.num_processes, **about}, aside)
            aside.rename(path)
            for other in folder.glob("step-*"):
                if other.name != tag:
                    shutil.rmtree(other)
        dist.barrier()

    def load(self, path: Path, state: dict, ema: dict[str, Tensor]) -> None:
        """Go on from the shares of as many processes."""
        if state["num_processes"] != self.num_processes:
            raise ValueError(f"{path} was made by {state['num_processes']} processes with ZeRO, {self.num_processes} "
                             f"are here; resume with --nproc {state['num_processes']}")  # fmt: skip
        folder = path.parent / SHARES
        self.entry.load_checkpoint(folder, state["shares"], load_module_strict=False)
        kept = torch.load(folder / state["shares"] / f"ema-{self.rank}.pt", weights_only=True)
        for name, value in kept.items():
            ema[name].copy_(value)

    def put(self, values: dict[str, Tensor]) -> None:
        """Put weights, with ZeRO 3 pieces of them, into the model; what was gathered before is out of date then."""
        super().put(values)
        if self.stage == 3:
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            for p in self.model.parameters():
                if p.requires_grad and p.ds_status is ZeroParamStatus.AVAILABLE:
                    p.partition()

    def finish(self) -> None:
        """With ZeRO 3 gather the parameters, and take DeepSpeed's hooks off the model."""
        if self.stage < 3:
            return
        import deepspeed

        named = list(self.model.named_parameters())
        with deepspeed.zero.GatheredParameters([p for _, p in named]):
            whole = {name: p.detach().clone() for name, p in named}
        self.entry.destroy()
        for path, module in self.model.named_modules():
            prefix = f"{path}." if path else ""
            module._parameters = {
                name: None if p is None else nn.Parameter(whole[prefix + name], requires_grad=p.requires_grad)
                for name, p in module._parameters.items()
            }
