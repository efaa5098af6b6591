"""A plan as text and as JSON: the matrix of steps and the list of passes."""

from collections.abc import Iterator
from dataclasses import asdict

from longvid.passes import Cover, Pass, Slice
from longvid.plan import Plan


def matrix_rows(plan: Plan) -> list[list[int]]:
    """Steps each block has taken before each tick, and after the last one, as the passes make them.

    Of a plan of several videos they are those of the first.
    """
    num_blocks, num_ready = (count // plan.num_videos for count in (len(plan.block_sizes), plan.num_ready))
    steps = [plan.method.num_steps] * num_ready + [0] * (num_blocks - num_ready)
    rows, tick = [list(steps)], 0
    for p in plan.passes:
        if plan.video(p):
            continue
        while tick < p.tick:
            rows.append(list(steps))
            tick += 1
        for block in p.updates:
            steps[plan.address(block)[1]] += 1
    return [*rows, list(steps)]


def plan_text(plan: Plan) -> Iterator[str]:
    """Lines of text for people."""
    method = plan.method
    together = f", {method.blocks_per_pass} blocks a pass" if method.blocks_per_pass > 1 else ""
    has_own = method.first_steps and not plan.num_ready
    first = f" (the first block {method.first_steps}, before another begins)" if has_own else ""
    steps = f"{method.num_steps} steps{first}"
    yield f"method {method.name}: {method.kind}, {steps}, lag {method.lag}, {method.num_lanes} lanes{together}"
    if plan.num_videos > 1:
        yield f"{plan.num_videos} videos; block b of video v, from 0, is number {plan.num_videos} b + v; together"
    yield f"{plan.num_frames} frames = {plan.num_latents} latents in blocks of {_runs(plan.block_sizes)}"
    if plan.num_ready:
        yield f"{plan.num_ready} blocks are clean from the start"
    yield "timesteps " + " ".join(f"{t:g}" for t in plan.schedule.timesteps)
    if plan.first_schedule != plan.schedule:
        yield "timesteps of the first block " + " ".join(f"{t:g}" for t in plan.first_schedule.timesteps)
    rows = matrix_rows(plan)
    of = " of each video" if plan.num_videos > 1 else ""
    yield f"matrix{of}: {len(rows)} rows (one per tick, and the end) x {len(rows[0])} blocks, steps taken"
    width = len(str(max(plan.schedule.num_steps, plan.first_schedule.num_steps)))
    yield from (f"{tick:5d} | " + " ".join(f"{step:{width}d}" for step in row) for tick, row in enumerate(rows))
    yield f"passes: {len(plan.passes)}  (block@step[latents], < context before, + latents of these, > context after)"
    yield from map(pass_text, plan.passes)


def pass_text(p: Pass) -> str:
    """One line for a pass."""
    parts = [f"tick {p.tick} lane {p.lane}:", " ".join(_piece(cover) for cover in p.covers)]
    for view in p.views:
        own = [f"+{view.stop - view.own}"] if len(p.views) > 1 else []
        if view.before or own:
            parts.append("< " + " ".join([*map(_piece, view.before), *own]))
        if view.after:
            parts.append("> " + " ".join(map(_piece, view.after)))
    if p.writes:
        parts.append("writes " + " ".join(map(_piece, p.writes)))
    if p.updates:
        parts.append("updates " + " ".join(map(str, p.updates)))
    if p.emits:
        parts.append("emits " + " ".join(map(str, p.emits)))
    return "  ".join(parts)


def plan_json(plan: Plan) -> dict:
    """All of it as JSON holds it."""
    return {
        "method": asdict(plan.method),
        "num_videos": plan.num_videos,
        "num_frames": plan.num_frames,
        "num_latents": plan.num_latents,
        "block_sizes": plan.block_sizes,
        "num_ready": plan.num_ready,
        "levels": plan.schedule.levels,
        "timesteps": plan.schedule.timesteps,
        "first_timesteps": plan.first_schedule.timesteps,
        "matrix": matrix_rows(plan),
        "passes": [_pass_json(p) for p in plan.passes],
    }


def _pass_json(p: Pass) -> dict:
    nested = {name: [piece._asdict() for piece in getattr(p, name)] for name in ("covers", "writes")}
    views = [view._asdict() | {name: [piece._asdict() for piece in getattr(view, name)] for name in ("before", "after")}
             for view in p.views]  # fmt: skip
    return {**p._asdict(), **nested, "views": views}


def _piece(piece: Cover | Slice) -> str:
    return f"{piece.block}@{piece.step}[{piece.start}:{piece.stop}]"


def _runs(sizes: tuple[int, ...]) -> str:
    """Equal neighbours as `80 x 3`."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return ", ".join(f"{count} x {size}" if count > 1 else str(size) for count, size in runs)
