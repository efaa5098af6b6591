"""A method and a length give a plan: the matrix of steps and the ordered list of passes. Plain Python, no tensor.

Everything else carries the plan out; no loop elsewhere does arithmetic about who and when. Units: latents for sizes
and context, steps for progress (0 pure noise, a block's number of steps clean), ticks for rows of the matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from longvid.method import Method
from longvid.passes import Pass, Window, ready_passes, tick_passes
from longvid.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that will happen, in order. `num_ready` blocks are clean from the start (an image, an extended video).

    A plan of several videos (`longvid.interleave`) has the blocks of all: number `b * num_videos + v` is block `b` of
    video `v`.
    """

    method: Method
    block_sizes: tuple[int, ...]
    num_ready: int
    schedule: Schedule
    first_schedule: Schedule
    passes: tuple[Pass, ...]
    num_videos: int = 1

    def address(self, block: int) -> tuple[int, int]:
        """The video that a block belongs to, and which of that video's blocks it is."""
        number, video = divmod(block, self.num_videos)
        return video, number

    def schedule_of(self, block: int) -> Schedule:
        """The schedule that a block walks down: a video's first block may have its own."""
        return self.schedule if self.address(block)[1] else self.first_schedule

    def video(self, p: Pass) -> int:
        """The video that a pass belongs to."""
        return p.covers[0].block % self.num_videos

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each block's first latent."""
        return tuple(accumulate((0, *self.block_sizes[:-1])))

    @property
    def num_latents(self) -> int:
        """Latents of all that is made, ready ones included."""
        return sum(self.block_sizes)

    @property
    def num_frames(self) -> int:
        """Pixel frames of all that is made: one of a video's first latent, four of each other."""
        return 4 * (self.num_latents - self.num_videos) + self.num_videos


LONGEST = 400_001
"""Frames of the longest video that is planned, 7 hours at 16 a second: a plan is held in memory."""


def num_latents_of(num_frames: int) -> int:
    """Latents of `num_frames` pixel frames. Raises ValueError unless it is 4n + 1, and at most `LONGEST`."""
    if num_frames > LONGEST:
        raise ValueError(f"num_frames={num_frames} must be at most {LONGEST}; make a video of that length, extend it")
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1; try 81")
    if (num_frames - 1) % 4:
        near = num_frames - (num_frames - 1) % 4
        raise ValueError(f"num_frames={num_frames} must be 4n + 1; try {near} or {near + 4}")
    return (num_frames - 1) // 4 + 1


def rolling_steps(
    num_blocks: int, num_steps: int, lag: int, num_ready: int = 0, first_steps: int = 0
) -> list[tuple[int, ...]]:
    """Steps each block has taken before each tick, and after the last one: a row per tick.

    `step(tick, block) = clamp(tick - lag * block, 0, num_steps)`, blocks counted after the ready ones, which stand at
    `num_steps` from the start. Equal to SkyReels-V2's timestep matrix with `ar_step = lag`. With `first_steps`, where
    nothing is ready, the first block takes as many, and the second begins then.
    """
    num_made = num_blocks - num_ready
    begins, ends = [lag * block for block in range(num_made)], [num_steps] * num_made
    if first_steps and not num_ready:
        begins = [0, *(first_steps + begin for begin in begins[: num_made - 1])]
        ends[0] = first_steps
    ticks = range(ends[-1] + begins[-1] + 1 if begins else 1)
    made = list(zip(begins, ends, strict=True))
    return [(num_steps,) * num_ready + tuple(min(max(tick - begin, 0), end) for begin, end in made) for tick in ticks]


def cut_into_blocks(num_latents: int, first: int, size: int) -> tuple[int, ...]:
    """Sizes of the blocks of `num_latents`: the first, equal ones, and what remains."""
    sizes = [min(first, num_latents)] if num_latents else []
    while (rest := num_latents - sum(sizes)) > 0:
        sizes.append(min(size, rest))
    return tuple(sizes)


def make_plan(method: Method, num_latents: int, ready: Sequence[int] = ()) -> Plan:
    """Plan a video of `num_latents`, of which the blocks of sizes `ready` are clean from the start.

    Any length works with any block size: the last block is what remains. Raises ValueError if nothing is left to make.
    """
    if sum(ready) >= num_latents:
        raise ValueError(f"{sum(ready)} latents are there already, so {num_latents} must be more; try {sum(ready) + 1}")
    schedule = method.schedule()
    first_schedule = schedule if ready else method.schedule(method.first_steps)
    window_sizes = list(_window_sizes(method, num_latents - sum(ready), sum(ready)))
    sizes = (*ready, *(size for window in window_sizes for size in window))
    passes: list[Pass] = []
    first, tick = len(ready), 0
    for window_blocks in window_sizes:
        stop = first + len(window_blocks)
        window = Window(method=method, schedule=schedule, first_schedule=first_schedule, sizes=sizes, first=first,
                        stop=stop, num_ready=len(ready))  # fmt: skip
        if first == len(ready):
            passes.extend(ready_passes(window))
        for row in range(window.num_ticks):
            passes.extend(p._replace(tick=tick + row) for p in tick_passes(window, row))
        first, tick = stop, tick + window.num_ticks
    num_steps = (first_schedule.num_steps, *[schedule.num_steps] * (len(sizes) - 1))
    passes = _prune(passes, num_steps)
    return Plan(
        method=method,
        block_sizes=sizes,
        num_ready=len(ready),
        schedule=schedule,
        first_schedule=first_schedule,
        passes=tuple(_with_ends(passes, len(ready), num_steps)),
    )


def _window_sizes(method: Method, num_latents: int, num_ready: int) -> Iterator[tuple[int, ...]]:
    """Block sizes of each window (all in one, unless the method has windows); no block crosses a window's end."""
    room = method.window - min(num_ready, method.overlap) if method.window else num_latents
    first = method.block_size if num_ready else method.first_block_size
    while num_latents:
        taken = min(room, num_latents)
        yield cut_into_blocks(taken, first, method.block_size)
        num_latents -= taken
        room, first = method.window - method.overlap, method.block_size


def _prune(passes: list[Pass], num_steps: Sequence[int]) -> list[Pass]:
    """Without the features that nobody reads, and without the passes that only wrote such; blocks' steps are given."""
    read: set[tuple[int, int, int]] = set()
    kept = []
    for p in reversed(passes):
        writes = tuple(piece for piece in p.writes if (piece.block, piece.step, p.lane) in read)
        if writes or any(cover.step < num_steps[cover.block] for cover in p.covers):
            read.update((piece.block, piece.step, p.lane) for piece in p.reads)
            kept.append(p._replace(writes=writes))
    return kept[::-1]


def _with_ends(passes: list[Pass], num_ready: int, num_steps: Sequence[int]) -> Iterator[Pass]:
    """The passes with what leaves after each: blocks that are clean, features and latents that nobody needs again."""
    emits = _emissions(passes, num_ready, num_steps)
    last_cover = dict.fromkeys(range(len(num_steps)), 0)
    for i, p in enumerate(passes):
        last_cover.update((cover.block, i) for cover in p.covers)
        last_cover.update((block, i) for block in emits.get(i, ()))
    frees = _frees(passes)
    drops: dict[int, list[int]] = {}
    for block, i in last_cover.items():
        drops.setdefault(i, []).append(block)
    for i, p in enumerate(passes):
        yield p._replace(emits=emits.get(i, ()), frees=frees[i], drops=tuple(drops.get(i, ())))


def _frees(passes: list[Pass]) -> list[tuple[int, ...]]:
    """Blocks whose features nobody reads after each pass as they are: ever again, or before they are written anew."""
    frees, awaited = [], set()
    for p in reversed(passes):
        awaited.difference_update((piece.block, p.lane) for piece in p.writes)
        read = dict.fromkeys(piece.block for piece in p.reads)
        frees.append(tuple(block for block in read if (block, p.lane) not in awaited))
        awaited.update((block, p.lane) for block in read)
    return frees[::-1]


def _emissions(passes: list[Pass], num_ready: int, num_steps: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Blocks that leave after each pass, oldest first: those clean, once all before them are."""
    emits, clean, head = {}, set(), num_ready
    for i, p in enumerate(passes):
        steps = {cover.block: cover.step for cover in p.covers}
        clean.update(block for block in p.updates if steps[block] == num_steps[block] - 1)
        start = head
        while head in clean:
            head += 1
        if head > start:
            emits[i] = tuple(range(start, head))
    return emits
