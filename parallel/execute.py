"""Carries a plan out on this process's part: the plan's passes in their order, on its layers, for its lanes.

The head (the last stage of lane 0, first band) holds latents, noise and solver state. It hands the first stage of each
lane the latents of a pass as soon as every earlier pass that changes them is done; hidden states go from stage to
stage, the velocity of another lane or band back to the head; features never leave their process. What is sent, and in
which order, follows from the plan alone, so each edge is first in, first out; a pass that comes tells that all which
had to be done before its latents could be taken has arrived everywhere. It computes what `longvid.sampler.sample`
computes, to the bit: only where a layer runs differs. Where a stage is cut in bands, matrices are cut, and what comes
out is the same but for rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longvid.flow import guide
from longvid.models.attention import Exchange
from longvid.models.cache import Cache
from longvid.models.dit import DiT, TextFeatures
from longvid.passes import Pass
from longvid.plan import Plan
from longvid.sampler import NoiseOf, Point, Queue, timesteps_of
from longvid.types import Latents
from parallel.connect import connect
from parallel.cost import decoding_order, feeding_order
from parallel.exchange import Ulysses
from parallel.grid import Grid, cut_rows, row_ranges
from parallel.link import Local, Message, Receiver, Sender


@dataclass(frozen=True, kw_only=True)
class Stage:
    """This process's place on the grid, its layers and its links.

    `rows` are the rows of patches of each band. `source` brings what its layers are applied to, `target` takes what
    they give. The head has besides `feeds`, which take latents, and `answers`, which bring velocities, by lane of the
    grid and by band; its target is itself. `decoding` are the links between the two parts of a decoder that is cut.
    """

    grid: Grid
    layers: range
    rows: tuple[int, ...]
    band: int
    lane: int | None
    exchange: Exchange
    source: Receiver | Local
    target: Sender | Local
    feeds: tuple[tuple[Sender | Local, ...], ...] = ()
    answers: tuple[tuple[Receiver | Local, ...], ...] = ()
    decoding: tuple[Receiver, Sender] | None = None

    @property
    def is_head(self) -> bool:
        """Whether it holds latents and solver state."""
        return bool(self.feeds)

    @property
    def outgoing(self) -> list[Sender | Local]:
        """The links that it sends over, each once."""
        decoding = self.decoding[1:] if self.decoding else ()
        links = (self.target, *(link for of_lane in self.feeds for link in of_lane), *decoding)
        return list({id(link): link for link in links}.values())

    @property
    def num_bytes(self) -> int:
        """Bytes sent to other processes."""
        return sum(link.num_bytes for link in self.outgoing) + self.exchange.num_bytes

    @property
    def bytes_to(self) -> dict[int, int]:
        """Bytes of latents, hidden states and what decoding needs, by the process they went to; exchanges within a
        stage come on top."""
        senders = [link for link in self.outgoing if isinstance(link, Sender)]
        return {to: sum(link.num_bytes for link in senders if link.to == to) for to in {link.to for link in senders}}

    @property
    def num_held(self) -> int:
        """Tensors held for one of its links, at most, since they may be under way."""
        return max(link.num_held for link in self.outgoing)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for other processes, exchanges within a stage included."""
        decoding = self.decoding[:1] if self.decoding else ()
        links = (self.source, *(link for of_lane in self.answers for link in of_lane), *decoding)
        return sum(link.waited_s for link in {id(link): link for link in links}.values()) + self.exchange.waited_s

    def lane_of(self, p: Pass) -> int:
        """The lane of the grid that a pass goes through."""
        return p.lane if self.grid.num_lanes > 1 else 0

    def runs(self, p: Pass) -> bool:
        """Whether a pass goes through this process's layers."""
        return self.lane is None or self.lane == p.lane


def make_stage(grid: Grid, layers: Sequence[range], num_rows: int, device: torch.device) -> Stage:
    """Link this process with those that it works with, and warm the links up. Every process must call it.

    `layers` are those of each stage, `num_rows` the rows of patches of a latent.

    Raises ValueError unless there are as many processes as the grid has places.
    """
    rank, rows = dist.get_rank(), cut_rows(num_rows, grid.num_bands)
    if dist.get_world_size() != grid.world_size:
        raise ValueError(f"a grid of {grid.world_size} on {dist.get_world_size()} processes: they must be equal")
    senders, receivers = connect(list(grid.edges()), device)
    place = grid.place(rank)
    common = {"grid": grid, "layers": layers[place.stage], "rows": rows, "band": place.band, "lane": place.lane,
              "exchange": _exchange(grid, rank, rows, device), "decoding": _decoding(grid, device)}  # fmt: skip
    last = grid.num_stages - 1
    if rank:
        lane = place.lane or 0
        before = 0 if place.stage == 0 else grid.rank(lane, place.stage - 1, place.band)
        after = 0 if place.stage == last else grid.rank(lane, place.stage + 1, place.band)
        return Stage(**common, source=receivers[before], target=senders[after])
    itself, end = Local(), Local()
    ways = [[(lane, band) for band in range(grid.num_bands)] for lane in range(grid.num_lanes)]
    return Stage(
        **common, target=end,
        source=itself if grid.num_stages == 1 else receivers[grid.rank(0, last - 1)],
        feeds=tuple(tuple(senders.get(grid.rank(lane, 0, band), itself) for lane, band in way) for way in ways),
        answers=tuple(tuple(end if lane == band == 0 else receivers[grid.rank(lane, last, band)] for lane, band in way)
                      for way in ways),
    )  # fmt: skip


def _decoding(grid: Grid, device: torch.device) -> tuple[Receiver, Sender] | None:
    """The links of a part of the decoder with the other."""
    if not grid.back:
        return None
    senders, receivers = connect([(0, grid.back), (grid.back, 0)], device)
    return (*receivers.values(), *senders.values()) if senders else None


def _exchange(grid: Grid, rank: int, rows: tuple[int, ...], device: torch.device) -> Exchange:
    """How this process's attention finds the other bands, tried once."""
    found = Exchange()
    for peers in grid.peers() if grid.num_bands > 1 else ():
        group = dist.new_group(list(peers))
        if rank in peers:
            found = Ulysses(group, rows, rank - peers.start)
            found.by_tokens(torch.zeros(1, 1, sum(rows), 1, 1, device=device))
            found.num_bytes, found.waited_s = 0, 0.0
    return found


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
    during: Callable[[Pass], AbstractContextManager] = lambda p: nullcontext(),
    start: Point | None = None,
    reached: Callable[[Point], None] = lambda point: None,
    decode_back: Callable[[int], None] = lambda i: None,
) -> Iterator[tuple[int, Latents | None]]:
    """Yield (block, clean latents) oldest first on the head; nothing, after as many passes, on the others.

    `part` holds this stage's layers, `size` is channels, height and width of latents; `ready` is needed on the head
    only. `start` and `reached` are as in `longvid.sampler.sample`: every process reaches the same points, each with its
    own cache, and the queue is on the head. `observe` is called after each pass that goes through this part, and on the
    head after all; `during` is entered for what this part computes of a pass. Raises as `sample` does.

    Where the grid cuts the decoder, `decode_back` is called with the index of each pass before its input is waited for,
    and last with their number, and (block, None) on the head says that the block's frames come by then.
    """
    device = next(part.parameters()).device
    if start is None:
        queue = Queue(plan, noise, device, ready) if stage.is_head else None
        start = Point(done=0, cache=Cache(), queue=queue)
    _expect(plan, part, stage, size, start.done)
    cache, queue, order = start.cache, start.queue, feeding_order(plan)
    head = _Head(plan, queue, stage, start.done) if queue else None
    due = decoding_order(plan, stage.grid, start.done) if stage.grid.back else {}
    for i, p in enumerate(plan.passes[start.done :], start.done):
        if stage.runs(p):
            decode_back(i)
            x = stage.source.receive()
            with during(p):
                contexts = cache.contexts(p)
                y, features = part(x, timesteps_of(p, device), text(p), contexts, fps=fps, keep=bool(p.writes),
                                   exchange=stage.exchange)  # fmt: skip
                cache = cache.after(p, features)
            stage.target.send(y, i, order[i])
            del x, y, features, contexts
        if head or stage.runs(p):
            observe(p)
        if head:
            yield from head.finish(i)
            yield from ((block, None) for block in due.get(i, ()))
        if p.emits:
            reached(Point(done=i + 1, cache=cache, queue=queue))
    decode_back(len(plan.passes))
    if head:
        yield from ((block, None) for block in due.get(len(plan.passes), ()))
    for link in stage.outgoing:
        link.flush()


class _Head:
    """Takes the velocity of one pass after the other, and feeds the first stages as early as the plan allows."""

    def __init__(self, plan: Plan, queue: Queue, stage: Stage, start: int):
        self.plan, self.queue, self.stage = plan, queue, stage
        self.after, self.next = feeding_order(plan), start
        self.lanes: dict[int, Latents] = {}
        self._feed(start - 1)

    def finish(self, i: int) -> Iterator[tuple[int, Latents]]:
        """A solver step, if this pass was the last lane of it; the blocks that leave then."""
        p = self.plan.passes[i]
        answers = [link.receive() for link in self.stage.answers[self.stage.lane_of(p)]]
        self.lanes[p.lane] = torch.cat(answers, 3) if len(answers) > 1 else answers[0]
        if p.updates:
            scale = self.plan.method.guidance_scale
            guided = guide(self.lanes[1], self.lanes[0], scale) if len(self.lanes) > 1 else self.lanes[0]
            self.queue.update(p, guided)
            self._feed(i)
        yield from self.queue.take(p)

    def _feed(self, done: int) -> None:
        """Send what may go now that the passes up to `done` are complete."""
        while self.next < len(self.after) and self.after[self.next] <= done:
            p = self.plan.passes[self.next]
            latents, num_rows = self.queue.gather(p), sum(self.stage.rows)
            feeds, per_row = self.stage.feeds[self.stage.lane_of(p)], latents.shape[3] // num_rows
            for link, rows in zip(feeds, row_ranges(num_rows, len(feeds)), strict=True):
                link.send(latents[:, :, :, rows.start * per_row : rows.stop * per_row], self.next, done)
            self.next += 1


def _expect(plan: Plan, part: DiT, stage: Stage, size: tuple[int, int, int], done: int) -> None:
    """Tell the links what will come from the pass `done` on."""
    passes, num_rows = plan.passes[done:], sum(stage.rows)
    per_row = size[1] // num_rows
    stage.source.expect([_input_of(p, part, size, stage.rows[stage.band]) for p in passes if stage.runs(p)])
    for lane, of_lane in enumerate(stage.answers):
        through = [p for p in passes if stage.lane_of(p) == lane]
        for link, rows in zip(of_lane, stage.rows, strict=True):
            link.expect([_latents_of(p, size, rows * per_row) for p in through])


def _latents_of(p: Pass, size: tuple[int, int, int], height: int) -> Message:
    """So many rows of the latents that a pass covers, or of their velocity."""
    return (1, size[0], p.num_latents, height, size[2]), torch.float32


def _input_of(p: Pass, part: DiT, size: tuple[int, int, int], rows: int) -> Message:
    """What a stage receives for a pass: rows of latents on the first, of hidden states on the others."""
    _, height, width = part.config.patch_size
    if part.is_first:
        return _latents_of(p, size, rows * height)
    return (1, p.num_latents, rows, size[2] // width, part.config.dim), part.proj_dtype
