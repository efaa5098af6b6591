"""Carries a plan out in one process: the slow truth that every other executor is held to.

It decides nothing: the plan says what each pass covers, reads, writes, updates and lets go.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.flow import UniPCState, add_noise, guide, solver_step
from longvid.models.cache import Cache
from longvid.models.dit import DiT, TextFeatures
from longvid.noise import block_noise, coordinated_noise
from longvid.passes import Cover, Pass
from longvid.plan import Plan
from longvid.schedule import Noise
from longvid.types import Latents, Timesteps

NoiseOf = Callable[[int, int | None], Latents]
"""Noise of (block, step); step None is the noise that the block begins with."""


def noise_of(plan: Plan, seed: int, channels: int, height: int, width: int) -> NoiseOf:
    """The noise that a plan's method asks for, addressed by `seed`; sizes in latents."""
    method = plan.method

    def noise(block: int, step: int | None) -> Latents:
        shape = (1, channels, plan.block_sizes[block], height, width)
        block = plan.address(block)[1]  # videos of one plan begin with the same noise, as they do alone
        if step is None and method.noise is Noise.COORDINATED:
            return coordinated_noise(seed, block, shape, method.block_size, method.left)
        return block_noise(seed, block, shape, step)

    return noise


class Queue:
    """Latents and solver state of the blocks at hand: all that solver steps read and write."""

    def __init__(self, plan: Plan, noise: NoiseOf, device: torch.device, ready: Sequence[Latents]):
        assert len(ready) == plan.num_ready, f"{len(ready)} ready blocks, the plan has {plan.num_ready}"
        self.plan, self.noise, self.device = plan, noise, device
        self.latents: dict[int, Latents] = {block: x.float().to(device) for block, x in enumerate(ready)}
        self.steps: dict[int, int] = dict.fromkeys(self.latents, plan.method.num_steps)
        self.states: dict[int, UniPCState | None] = {}
        self.finite: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def restored(cls, plan: Plan, noise: NoiseOf, device: torch.device, *, latents: dict[int, Latents],
                 steps: dict[int, int], states: dict[int, UniPCState | None],
                 finite: dict[tuple[int, int], Tensor]) -> "Queue":  # fmt: skip
        """A queue as it was, in the midst of its run."""
        queue = cls.__new__(cls)
        queue.plan, queue.noise, queue.device = plan, noise, device
        queue.latents, queue.steps, queue.states, queue.finite = latents, steps, states, finite
        return queue

    def gather(self, p: Pass) -> Latents:
        """The latents that go through the model in a pass, blocks that begin filled with their noise."""
        return torch.cat([self._cover(p, cover) for cover in p.covers], dim=2)

    def update(self, p: Pass, velocity: Latents) -> None:
        """A solver step of each block that the pass updates; `velocity` is of all that it covered."""
        offset = 0
        for cover in p.covers:
            size = cover.stop - cover.start
            if cover.block in p.updates:
                self._step(cover.block, velocity[:, :, offset : offset + size])
            offset += size

    def take(self, p: Pass) -> Iterator[tuple[int, Latents]]:
        """The blocks that leave after a pass; then forgets what nobody needs again.

        Raises FloatingPointError that names block and step where latents first stopped being finite: what has once
        gone wrong stays so, and spreads to other blocks.
        """
        for block in p.emits:
            if not self.latents[block].isfinite().all():
                origin, step = next(place for place, finite in self.finite.items() if not finite)
                video, number = self.plan.address(origin)
                of = f" of video {video + 1}" if self.plan.num_videos > 1 else ""
                raise FloatingPointError(f"the latents of block {number}{of} are not finite after step {step}")
            for step in range(self.steps[block]):
                del self.finite[block, step]
            yield block, self.latents[block]
        for block in p.drops:
            self.latents.pop(block, None)

    def _cover(self, p: Pass, cover: Cover) -> Latents:
        if cover.block not in self.latents:
            self.latents[cover.block] = self.noise(cover.block, None).to(self.device)
            self.steps[cover.block] = 0
        step = self.steps[cover.block]
        assert step == cover.step, f"block {cover.block} is at step {step}, the plan says {cover.step}"
        x = self.latents[cover.block]
        if cover.renoise:
            method = self.plan.method
            fresh = self.noise(cover.block, max(method.num_steps, method.first_steps) + p.tick).to(self.device)
            x = add_noise(x, fresh, cover.renoise)
        return x[:, :, cover.start : cover.stop]

    def _step(self, block: int, velocity: Latents) -> None:
        solver, step, fresh = self.plan.method.solver, self.steps[block], None
        schedule = self.plan.schedule_of(block)
        if solver.needs_noise and step + 1 < schedule.num_steps:
            fresh = self.noise(block, step).to(self.device)
        state, levels = self.states.pop(block, None), schedule.levels
        x, state = solver_step(solver, self.latents[block], velocity, state, levels, step, fresh)
        self.latents[block], self.steps[block] = x, step + 1
        if state is not None:
            self.states[block] = state
        self.finite[block, step] = x.isfinite().all()


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run stands after its first `done` passes: all that the others depend on.

    `queue` is None where latents are held by another process. Both change as the run goes on.
    """

    done: int
    cache: Cache
    queue: Queue | None


def timesteps_of(p: Pass, device: torch.device) -> Timesteps:
    """What the model is told of each latent of a pass, (1, f), or of all, (1, 1), where it is the same."""
    told = [cover.timestep for cover in p.covers for _ in range(cover.start, cover.stop)]
    return torch.tensor([told if len(set(told)) > 1 else told[:1]], dtype=torch.float32).to(device)


@torch.no_grad()
def sample(
    plan: Plan,
    dit: DiT,
    text: Callable[[Pass], TextFeatures],
    noise: NoiseOf,
    *,
    ready: Sequence[Latents] = (),
    fps: int = 24,
    observe: Callable[[Pass], None] = lambda p: None,
    during: Callable[[Pass], AbstractContextManager] = lambda p: nullcontext(),
    start: Point | None = None,
    reached: Callable[[Point], None] = lambda point: None,
) -> Iterator[tuple[int, Latents]]:
    """Yield (block, clean latents (1, c, f, h, w)) oldest first.

    `text` gives the text of a pass (lane 0 is the prompt's, lane 1 the negative prompt's), `ready` the latents of the
    blocks that are clean from the start. `observe` is called after each pass, `during` entered for it. `reached` is
    called when blocks have left and been consumed: the same run can go on from there (`start`). Raises
    FloatingPointError where latents stop being finite, naming block and step.
    """
    if start is None:
        queue = Queue(plan, noise, next(dit.parameters()).device, ready)
        start = Point(done=0, cache=Cache(), queue=queue)
    cache, queue, lanes = start.cache, start.queue, {}
    for i, p in enumerate(plan.passes[start.done :], start.done):
        with during(p):
            x = queue.gather(p)
            timesteps = timesteps_of(p, x.device)
            lanes[p.lane], features = dit(x, timesteps, text(p), cache.contexts(p), fps=fps, keep=bool(p.writes))
            cache = cache.after(p, features)
            del features  # what the cache has not kept need not live through the next pass
            if p.updates:
                queue.update(p, guide(lanes[1], lanes[0], plan.method.guidance_scale) if len(lanes) > 1 else lanes[0])
        observe(p)
        yield from queue.take(p)
        if p.emits:
            reached(Point(done=i + 1, cache=cache, queue=queue))
