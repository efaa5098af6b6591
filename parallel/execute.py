"""Carries a plan out on this process's stage: the same passes in the same order on every stage, each on its layers.

The last stage holds latents, noise and solver state. It hands the first stage the latents of a pass as soon as every
earlier pass that changes them is done; hidden states go from stage to stage; features never leave their process. What
is sent, and in which order, follows from the plan alone, so each edge is first in, first out. It computes what
`longvid.sampler.sample` computes, to the bit: only where a layer runs differs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from longvid.flow import guide
from longvid.models.cache import Cache
from longvid.models.dit import DiT, TextFeatures
from longvid.passes import Pass
from longvid.plan import Plan
from longvid.sampler import NoiseOf, Point, Queue, timesteps_of
from longvid.types import Latents
from parallel.link import Receiver, Sender

T = TypeVar("T")

RECEIVES_AHEAD = 2
"""Messages for which a receive is posted before they are needed."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """This process's place in the pipeline and its links; `source` is the stage before, of the first stage the last.

    `target` is the stage after, of the last stage the first.
    """

    index: int
    num_stages: int
    source: Receiver
    target: Sender

    @property
    def is_first(self) -> bool:
        """Whether it embeds."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it unembeds, and holds latents and solver state."""
        return self.index == self.num_stages - 1


def make_stage(num_stages: int, device: torch.device) -> Stage:
    """Link this process with its neighbours in the ring of stages, and warm the links up.

    Rank 0, on the first machine, is the last stage: files are written where the first command was given. Every process
    must call it. Raises ValueError unless there are at least two.
    """
    rank = dist.get_rank()
    if num_stages < 2 or dist.get_world_size() != num_stages:
        raise ValueError(f"{num_stages} stages on {dist.get_world_size()} processes: the numbers must be equal")
    groups = [dist.new_group(sorted((sender, (sender + 1) % num_stages))) for sender in range(num_stages)]
    source = Receiver(groups[rank - 1], (rank - 1) % num_stages, device)
    target = Sender(groups[rank], (rank + 1) % num_stages)
    source.expect((1,), torch.float32)
    target.send(torch.zeros(1, device=device))
    source.receive()
    target.flush()
    return Stage(index=(rank - 1) % num_stages, num_stages=num_stages, source=source, target=target)


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every process. A ValueError there ends the others without a word."""
    found: list = [None]
    if dist.get_rank() == 0:
        try:
            found = [make()]
        except ValueError:
            dist.broadcast_object_list(found)
            raise
    dist.broadcast_object_list(found)
    if found[0] is None:
        raise SystemExit(2)
    return found[0]


def from_all(this: T) -> list[T]:
    """What each process has, in order of rank."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, this)
    return found


def feeding_order(plan: Plan) -> list[int]:
    """For each pass the index of the pass after which its latents may be taken, -1 for the start.

    That is the last pass before it that updates a block which it covers, and never earlier than for the pass before
    it, so that latents leave in the order of passes.
    """
    after, updated, latest = [], {}, -1
    for i, p in enumerate(plan.passes):
        latest = max([latest, *(updated.get(cover.block, -1) for cover in p.covers)])
        after.append(latest)
        updated.update(dict.fromkeys(p.updates, i))
    return after


@torch.no_grad()
def carry_out(
    plan: Plan,
    part: DiT,
    stage: Stage,
    text: Callable[[Pass], TextFeatures],
    noise: NoiseOf,
    size: tuple[int, int, int],
    *,
    ready: Sequence[Latents] = (),
    fps: int = 24,
    observe: Callable[[Pass], None] = lambda p: None,
    start: Point | None = None,
    reached: Callable[[Point], None] = lambda point: None,
) -> Iterator[tuple[int, Latents]]:
    """Yield (block, clean latents) oldest first on the last stage; nothing, after as many passes, on the others.

    `part` holds this stage's layers, `size` is channels, height and width of latents; `ready` is needed on the last
    stage only. `start` and `reached` are as in `longvid.sampler.sample`: every stage reaches the same points, each with
    its own cache, and the queue is on the last. Raises as `sample` does.
    """
    source, passes = stage.source, plan.passes
    inputs = [_input_of(p, part, size) for p in passes]
    if start is None:
        queue = Queue(plan, noise, source.device, ready) if stage.is_last else None
        start = Point(done=0, cache=Cache(), queue=queue)
    for shape, dtype in inputs[start.done :][:RECEIVES_AHEAD]:
        source.expect(shape, dtype)
    cache, queue, lanes = start.cache, start.queue, {}
    feeder = _Feeder(plan, queue, stage.target, start.done) if queue else None
    if feeder:
        feeder.feed(start.done - 1)
    for i, p in enumerate(passes[start.done :], start.done):
        x = source.receive()
        if i + RECEIVES_AHEAD < len(passes):
            source.expect(*inputs[i + RECEIVES_AHEAD])
        y, features = part(x, timesteps_of(p, x.device), text(p), cache.context(p), fps=fps, keep=bool(p.writes))
        cache = cache.after(p, features)
        del features, x
        observe(p)
        if queue:
            lanes[p.lane] = y
            if p.updates:
                queue.update(p, guide(lanes[1], lanes[0], plan.method.guidance_scale) if len(lanes) > 1 else lanes[0])
                feeder.feed(i)
            yield from queue.take(p)
        else:
            stage.target.send(y)
        if p.emits:
            reached(Point(done=i + 1, cache=cache, queue=queue))
    stage.target.flush()


class _Feeder:
    """Hands the first stage the latents of one pass after the other, as early as the plan allows."""

    def __init__(self, plan: Plan, queue: Queue, target: Sender, start: int):
        self.plan, self.queue, self.target = plan, queue, target
        self.after, self.next = feeding_order(plan), start

    def feed(self, done: int) -> None:
        """Send what may go now that the passes up to `done` are complete."""
        while self.next < len(self.after) and self.after[self.next] <= done:
            self.target.send(self.queue.gather(self.plan.passes[self.next]))
            self.next += 1


def _input_of(p: Pass, part: DiT, size: tuple[int, int, int]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what a stage receives for a pass: latents on the first, hidden states on the others."""
    channels, height, width = size
    if part.is_first:
        return (1, channels, p.num_latents, height, width), torch.float32
    _, *patch = part.config.patch_size
    hidden = (1, p.num_latents, height // patch[0], width // patch[1], part.config.dim)
    return hidden, part.proj_dtype
