"""The passes that one tick of the matrix gives, for each kind of method. Plain Python, no tensor.

A pass names everything by (block, step): the latents it covers, the features it reads and those it leaves. The rules
follow DualParal section 3 (two-sided), SkyReels-V2 section 3.3 and Rolling Forcing section 3 (joint), Self-Forcing and
LongLive (causal: clean features as history, first latents as sink).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from longvid.method import Kind, Method
from longvid.schedule import Schedule


class Slice(NamedTuple):
    """Latents `start` to `stop` of a block, as they are at `step`."""

    block: int
    step: int
    start: int
    stop: int


class Cover(NamedTuple):
    """Latents that go through the model, the timestep it is told of them, and the level of fresh noise mixed in."""

    block: int
    step: int
    start: int
    stop: int
    timestep: float
    renoise: float = 0.0


class View(NamedTuple):
    """What the latents `start` to `stop` of a pass see: `before`, the pass's own from `own` to `stop`, and `after`.

    `before` and `after` are features that earlier passes left, in order of place. Positions count within a view.
    """

    start: int
    stop: int
    own: int = 0
    before: tuple[Slice, ...] = ()
    after: tuple[Slice, ...] = ()

    @property
    def num_context(self) -> int:
        """Latents seen besides the pass's own."""
        return sum(piece.stop - piece.start for piece in self.before + self.after)


class Pass(NamedTuple):
    """One forward of the model.

    `views` say what its latents see, one behind the other; `writes` are the features kept; `updates` the blocks that
    take a solver step now that all lanes of this pass are there; `emits` the blocks that leave clean then; `frees` the
    blocks whose features in this lane nobody reads again before they are written anew, `drops` those whose latents
    nobody needs afterwards.
    """

    tick: int
    lane: int
    covers: tuple[Cover, ...]
    views: tuple[View, ...]
    writes: tuple[Slice, ...] = ()
    updates: tuple[int, ...] = ()
    emits: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    drops: tuple[int, ...] = ()

    @property
    def num_latents(self) -> int:
        """Latents that go through the model."""
        return sum(cover.stop - cover.start for cover in self.covers)

    @property
    def reads(self) -> tuple[Slice, ...]:
        """The features that earlier passes left and any latent of this one sees."""
        return tuple(piece for view in self.views for piece in view.before + view.after)

    @property
    def num_context(self) -> int:
        """Latents that a latent sees besides the pass's own, at most."""
        return max(view.num_context for view in self.views)

    @property
    def num_pairs(self) -> int:
        """Pairs of latents of which one sees the other."""
        return sum((view.stop - view.start) * (view.stop - view.own + view.num_context) for view in self.views)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Blocks `first` to `stop` that run one matrix, after clean ones; `sizes` are those of all blocks of the video.

    `first_schedule` is that of the video's first block, `schedule` that of all others.
    """

    method: Method
    schedule: Schedule
    first_schedule: Schedule
    sizes: tuple[int, ...]
    first: int
    stop: int
    num_ready: int

    @property
    def num_ticks(self) -> int:
        """Rows of the matrix."""
        return self.num_steps(self.stop - 1) + self._begins(self.stop - 1)

    def schedule_of(self, block: int) -> Schedule:
        """The schedule that a block walks down."""
        return self.schedule if block else self.first_schedule

    def num_steps(self, block: int) -> int:
        """Steps of a block."""
        return self.schedule_of(block).num_steps

    def age(self, tick: int, block: int) -> int:
        """Ticks since the block's first pass: its step until it is clean; negative before it enters."""
        return tick - self._begins(block) if block >= self.first else self.num_steps(block) + 1

    def _begins(self, block: int) -> int:
        """The tick of a block's first pass."""
        return self.method.lag * (block - self.first) + (self._delay if block > self.first else 0)

    @property
    def _delay(self) -> int:
        """Ticks by which all others begin later than by the lag alone, for the sake of a video's first block."""
        return self.method.first_steps - self.method.lag if self.method.first_steps and self.first == 0 else 0

    def active(self, tick: int) -> list[int]:
        """Blocks that take a step in this tick, oldest first."""
        return [b for b in self._entered(tick) if self.age(tick, b) < self.num_steps(b)]

    def finished(self, tick: int) -> list[int]:
        """Blocks that took their last step in the tick before."""
        return [b for b in self._entered(tick) if self.age(tick, b) == self.num_steps(b)]

    def _entered(self, tick: int) -> list[int]:
        """Blocks that have begun by this tick, without those that finished before the tick before."""
        num_steps, lag = self.method.num_steps, self.method.lag
        first = [self.first] if tick <= self.num_steps(self.first) else []
        tick -= self._delay
        if tick < 0:
            return first
        newest = tick // lag if lag else self.stop
        oldest = (tick - num_steps + lag - 1) // lag if lag else 0
        return [*first, *range(self.first + max(oldest, 1), min(self.first + newest + 1, self.stop))]

    def tail(self, block: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The `count` latents before `block`, nearest first, as (block, start, stop)."""
        while count > 0 and block > 0:
            block -= 1
            taken = min(count, self.sizes[block])
            yield block, self.sizes[block] - taken, self.sizes[block]
            count -= taken

    def cover(self, tick: int, block: int, start: int = 0, stop: int = 0) -> Cover:
        """Latents of a block (all of it by default) at their present step."""
        step, timesteps = max(self.age(tick, block), 0), self.schedule_of(block).timesteps
        step = min(step, len(timesteps) - 1)
        return Cover(block, step, start, stop or self.sizes[block], timesteps[step])

    def seen_step(self, tick: int, block: int) -> int:
        """The step at which the features of an earlier block were written, as a pass of this tick finds them."""
        num_steps = self.num_steps(block)
        retired = self.method.retire or block < self.num_ready
        return min(self.age(tick, block), num_steps if retired else num_steps - 1)


def ready_passes(window: Window) -> Iterator[Pass]:
    """Passes that write the features of blocks clean from the start; those that nobody reads are pruned later."""
    for block in range(window.num_ready):
        yield from _retire(window, 0, block)


def tick_passes(window: Window, tick: int) -> Iterator[Pass]:
    """The passes of one tick, in order, lane by lane. A block's features are retired one tick after it is clean."""
    method = window.method
    if method.retire:
        for block in window.finished(tick):
            yield from _retire(window, tick, block)
    active = window.active(tick)
    if method.kind is Kind.CAUSAL:
        outlines = _causal(window, tick, active)
    elif method.kind is Kind.TWO_SIDED:
        outlines = (_two_sided(window, tick, block) for block in reversed(active))
    else:
        outlines = iter([_joint(window, tick, active)])
    for outline in outlines:
        yield from _lanes(outline, method.num_lanes)


def _lanes(outline: Pass, num_lanes: int) -> Iterator[Pass]:
    """The same pass for each lane; the solver steps after the last."""
    for lane in range(num_lanes):
        yield outline._replace(lane=lane, updates=outline.updates if lane == num_lanes - 1 else ())


def _retire(window: Window, tick: int, block: int) -> Iterator[Pass]:
    """A forward of a clean block at the context level, for its features."""
    method, level = window.method, window.method.context_level
    step = window.num_steps(block)
    cover = Cover(block, step, 0, window.sizes[block], 1000 * level, level)
    before = _look_back(window, tick, block, window.sizes[block], method.sink if method.retire_sees_sink else 0)
    writes = (Slice(block, step, 0, window.sizes[block]),)
    views = (View(0, window.sizes[block], before=before),)
    yield from _lanes(Pass(tick, 0, (cover,), views, writes), method.num_lanes)


def _causal(window: Window, tick: int, active: list[int]) -> Iterator[Pass]:
    """Blocks that each see sink, history and the cleaner neighbours of this tick, some in one pass.

    It is the same blocks in every tick that go together, so a pass waits for no others of the tick before.
    """
    for _, together in groupby(active, key=lambda block: block // window.method.blocks_per_pass):
        blocks = list(together)
        while blocks:
            views = tuple(_causal_views(window, tick, blocks))
            covers = tuple(window.cover(tick, block) for block in blocks[: len(views)])
            writes = tuple(Slice(*cover[:4]) for cover in covers)
            yield Pass(tick, 0, covers, views, writes, updates=tuple(blocks[: len(views)]))
            blocks = blocks[len(views) :]


def _causal_views(window: Window, tick: int, blocks: list[int]) -> Iterator[View]:
    """What each block sees in one pass with those before it, up to one whose view of these has a hole."""
    start = 0
    for block in blocks:
        size = window.sizes[block]
        before = _look_back(window, tick, block, size, window.method.sink)
        own = [piece for piece in before if piece.block >= blocks[0]]
        first = start - sum(piece.stop - piece.start for piece in own)
        if own and first != sum(window.sizes[blocks[0] : own[0].block]) + own[0].start:
            return
        yield View(start, start + size, first, before[: len(before) - len(own)])
        start += size


def _two_sided(window: Window, tick: int, block: int) -> Pass:
    """One block with the last latents before it recomputed as a prefix, and the first features of the noisier one.

    The prefix is as the previous tick left it. The model is told one timestep for all, as DualParal does for weights
    that know no other.
    """
    method = window.method
    own = window.cover(tick, block)
    before = [window.cover(tick, *piece) for piece in window.tail(block, method.left)]
    covers = (*(cover._replace(timestep=own.timestep) for cover in reversed(before)), own)
    num_latents = sum(cover.stop - cover.start for cover in covers)
    after = ()
    if method.right and block + 1 < window.stop and window.age(tick, block + 1) >= 0:
        step = window.age(tick, block + 1)
        after = (Slice(block + 1, step, 0, min(method.right, window.sizes[block + 1])),)
    writes = (Slice(block, own.step, 0, min(method.right, window.sizes[block])),) if method.right else ()
    return Pass(tick, 0, covers, (View(0, num_latents, after=after),), writes, updates=(block,))


def _joint(window: Window, tick: int, active: list[int]) -> Pass:
    """All active blocks at once, or the whole window with the clean latents that it shares with the one before."""
    method = window.method
    if not method.window:
        covers = tuple(window.cover(tick, block) for block in active)
        covered = sum(window.sizes[block] for block in active)
        before = _look_back(window, tick, active[0], covered, method.sink)
        writes = tuple(Slice(*cover[:4]) for cover in covers)
        return Pass(tick, 0, covers, (View(0, covered, before=before),), writes, updates=tuple(active))
    level = method.condition_level
    shared = [window.cover(tick, *piece) for piece in window.tail(window.first, method.overlap)]
    shared = [cover._replace(timestep=1000 * level, renoise=level) for cover in reversed(shared)]
    blocks = range(window.first, window.stop)
    covers = (*shared, *(window.cover(tick, b) for b in blocks))
    num_latents = sum(cover.stop - cover.start for cover in covers)
    return Pass(tick, 0, covers, (View(0, num_latents),), updates=tuple(active))


def _look_back(window: Window, tick: int, block: int, covered: int, sink: int) -> tuple[Slice, ...]:
    """Features that `block` sees before itself: the sink, then an unbroken run of neighbours and history.

    Going back from the block, up to `left` latents of neighbours still in the queue, then up to `history` clean ones;
    a neighbour beyond `left` ends the run, so nothing is ever seen with a hole in time, except after the sink.
    """
    method = window.method
    room = max(0, method.max_keys - covered) if method.max_keys else sink + method.history + method.left
    anchors = list(_sink(window, block, min(sink, room)))
    room -= sum(stop - start for _, start, stop in anchors)
    budget = {True: method.history, False: method.left}
    run: list[Slice] = []
    for b, _, size in window.tail(block, method.history + method.left):
        is_clean = window.age(tick, b) >= window.num_steps(b)
        low = next((stop for anchor, _, stop in anchors if anchor == b), 0)
        taken = min(budget[is_clean], room, size - low)
        if taken:
            run.append(Slice(b, window.seen_step(tick, b), size - taken, size))
            budget[is_clean] -= taken
            room -= taken
        if taken < size:
            break
    first = [Slice(b, window.seen_step(tick, b), start, stop) for b, start, stop in anchors]
    return _merge(first + run[::-1])


def _sink(window: Window, block: int, sink: int) -> Iterator[tuple[int, int, int]]:
    """The video's first `sink` latents, as far as they lie before `block`, as (block, start, stop)."""
    for b in range(block):
        taken = min(sink, window.sizes[b])
        if taken <= 0:
            return
        yield b, 0, taken
        sink -= taken


def _merge(pieces: list[Slice]) -> tuple[Slice, ...]:
    """Neighbouring slices of one block as one."""
    merged: list[Slice] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and last.block == piece.block and last.stop == piece.start:
            merged[-1] = last._replace(stop=piece.stop)
        else:
            merged.append(piece)
    return tuple(merged)
