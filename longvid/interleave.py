"""Several videos of one plan as one plan, so that one fills a pipe which another leaves idle. Plain Python, no tensor.

Block `b` of video `v` is number `b * num_videos + v`. What a pass computes is what it computes in a plan of its video
alone, so every video is the same to the bit; only the order between videos is new.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from longvid.passes import Pass
from longvid.plan import Plan


def interleave(plan: Plan, num_videos: int, width: int) -> Plan:
    """One plan of `num_videos` that each follow `plan`, in rounds of one tick of every video that has begun.

    Another video begins as soon as those that have begun will never again have `width` passes in a round: with the
    first ones draining, or at once if a queue is shorter than that. So no more is held than `width` passes need, and
    with a width of 1 one video follows the other. Raises ValueError for fewer than one video.
    """
    if num_videos < 1:
        raise ValueError(f"num_videos={num_videos} must be at least 1; try 2")
    ticks = [list(passes) for _, passes in groupby(plan.passes, key=lambda p: p.tick)]
    coming = [len(passes) for passes in ticks]
    for i in reversed(range(len(coming) - 1)):
        coming[i] = max(coming[i], coming[i + 1])
    passes, begun, waiting = [], {}, list(range(num_videos))
    while begun or waiting:
        while waiting and (not begun or sum(coming[at] for at in begun.values()) < width):
            begun[waiting.pop(0)] = 0
        for video, at in begun.items():
            passes.extend(_numbered(p, video, num_videos) for p in ticks[at])
        begun = {video: at + 1 for video, at in begun.items() if at + 1 < len(ticks)}
    sizes = tuple(size for size in plan.block_sizes for _ in range(num_videos))
    return replace(plan, block_sizes=sizes, num_ready=plan.num_ready * num_videos, passes=tuple(passes),
                   num_videos=num_videos)  # fmt: skip


def _numbered(p: Pass, video: int, num_videos: int) -> Pass:
    """The pass with its blocks under their numbers among all."""

    def pieces(of) -> tuple:
        return tuple(piece._replace(block=piece.block * num_videos + video) for piece in of)

    def blocks(of: Iterator[int]) -> tuple[int, ...]:
        return tuple(block * num_videos + video for block in of)

    views = (view._replace(before=pieces(view.before), after=pieces(view.after)) for view in p.views)
    return p._replace(
        covers=pieces(p.covers), views=tuple(views), writes=pieces(p.writes),
        updates=blocks(p.updates), emits=blocks(p.emits), frees=blocks(p.frees), drops=blocks(p.drops),
    )  # fmt: skip
