"""What a pass covers and sees, latent by latent, against a second way of saying it."""

from bisect import bisect
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from longvid.method import Kind, LevelRule, Method
from longvid.plan import make_plan
from longvid.schedule import Solver

BASE = Method(
    name="base", kind=Kind.CAUSAL, block_size=3, first_block_size=3, num_steps=4, lag=1, solver=Solver.EULER,
    level_rule=LevelRule.UNIFORM, flow_shift=1.0, guidance_scale=1.0, sink=3, history=6, left=6, retire=True,
)  # fmt: skip


def indices(plan, pieces):
    """The video's latents that the pieces are, in the order of their place, each with its step."""
    return [(plan.starts[p.block] + i, p.step) for p in pieces for i in range(p.start, p.stop)]


def block_at(plan, latent):
    """The block that a latent of the video belongs to."""
    return bisect(plan.starts, latent) - 1


def with_rows(plan):
    """Each pass with the steps of all blocks before its tick."""
    steps = [plan.method.num_steps] * plan.num_ready + [0] * (len(plan.block_sizes) - plan.num_ready)
    tick = row = None
    for p in plan.passes:
        if p.tick != tick:
            tick, row = p.tick, tuple(steps)
        yield p, row
        for block in p.updates:
            steps[block] += 1


def expected_context(plan, p, row, block, num_latents):
    """The sink, and what lies before so many latents from `block` on, latent by latent backwards, until one is not
    allowed."""
    method, num_steps = plan.method, plan.method.num_steps
    block_of = [block for block, size in enumerate(plan.block_sizes) for _ in range(size)]
    start = plan.starts[block]
    room = max(0, method.max_keys - num_latents) if method.max_keys else plan.num_latents
    is_retired = p.covers[0].step == num_steps
    sink = range(min(start, room, 0 if is_retired and not method.retire_sees_sink else method.sink))
    allowed = {"clean": method.history, "noisy": method.left}
    room, run = room - len(sink), []
    for latent in range(start - 1, len(sink) - 1, -1):
        state = "clean" if row[block_of[latent]] == num_steps else "noisy"
        if not (allowed[state] and room):
            break
        allowed[state] -= 1
        room -= 1
        run.append(latent)
    newest = {b: num_steps if method.retire or b < plan.num_ready else num_steps - 1 for b in range(len(row))}
    return [(i, min(row[block_of[i]], newest[block_of[i]])) for i in (*sink, *run[::-1])]


def random_plan(rng, kind):
    num_steps, size = rng.randint(1, 8), rng.randint(1, 6)
    method = replace(
        BASE, kind=kind, num_steps=num_steps, lag=rng.randint(0, num_steps), block_size=size,
        first_block_size=rng.randint(1, 9), guidance_scale=rng.choice([1.0, 2.0]), sink=rng.randint(0, 7),
        history=rng.randint(0, 20), left=rng.randint(0, size), right=rng.randint(0, size),
        max_keys=rng.choice([0, rng.randint(size + 1, 25)]), retire=rng.random() < 0.5,
        retire_sees_sink=rng.random() < 0.5, blocks_per_pass=rng.randint(1, 4) if kind is Kind.CAUSAL else 1,
    )  # fmt: skip
    ready = rng.choice([(), (), (1,), (5, 3), (2, 7, 1, 6)])
    return make_plan(method, sum(ready) + rng.randint(1, 50), ready)


@pytest.mark.parametrize("kind", [Kind.CAUSAL, Kind.JOINT])
def test_context_is_the_sink_and_an_unbroken_run(kind):
    rng = Random(kind)
    for _ in range(80):
        plan = random_plan(rng, kind)
        method = plan.method
        for p, view, row in ((q, view, row) for q, row in with_rows(plan) for view in q.views):
            covered = indices(plan, p.covers)
            seen, first = indices(plan, view.before) + covered[view.own : view.start], covered[view.start][0]
            num_latents, block = view.stop - view.start, block_at(plan, first)
            assert seen == expected_context(plan, p, row, block, num_latents) and not view.after
            latents = [latent for latent, _ in seen]
            holes = [a for a, b in pairwise([*latents, first]) if b != a + 1]
            sink = latents.index(holes[0]) + 1 if holes else 0
            assert latents[:sink] == list(range(min(sink, method.sink))) and len(holes) < 2, "it is after the sink"
            assert len(seen) <= method.sink + method.history + method.left
            assert not seen or not method.max_keys or len(seen) + num_latents <= method.max_keys
            blocks = [piece.block for piece in view.before]
            assert all(a.block != b.block or a.stop < b.start for a, b in pairwise(view.before)), "pieces are merged"
            assert blocks == sorted(blocks)


def test_blocks_go_through_the_model_together_as_far_as_each_sees_an_unbroken_run_of_them():
    rng, most = Random(4), 0
    for _ in range(80):
        plan = random_plan(rng, Kind.CAUSAL)
        alone = make_plan(replace(plan.method, blocks_per_pass=1), plan.num_latents, plan.block_sizes[: plan.num_ready])
        for p in plan.passes:
            assert len({block // plan.method.blocks_per_pass for block in p.updates}) <= 1, "always the same"
        for lane in range(plan.method.num_lanes):
            together, apart = ([(p.tick, *c) for p in each.passes if p.lane == lane for c in p.covers]
                               for each in (plan, alone))  # fmt: skip
            assert together == apart, "the same blocks at the same steps, in the same order"
        most = max(most, *(len(p.covers) for p in plan.passes))
    assert most == 4


def test_two_sided_sees_a_prefix_and_the_first_latents_after():
    rng = Random(2)
    for _ in range(80):
        plan = random_plan(rng, Kind.TWO_SIDED)
        method, passed = plan.method, set()
        for p, row in with_rows(plan):
            *prefix, own = p.covers
            start = plan.starts[own.block]
            assert p.updates in ((), (own.block,)) and own[1:4] == (row[own.block], 0, plan.block_sizes[own.block])
            before = [(i, row[c.block]) for c in prefix for i, _ in indices(plan, [c])]
            assert [i for i, _ in before] == list(range(start))[-method.left or start :]
            assert indices(plan, prefix) == before, "the prefix is as the tick before left it"
            assert {c.timestep for c in p.covers} == {plan.schedule.timesteps[own.step]}, "one timestep is told"
            right = own.block + 1
            has_right = (p.tick, p.lane, right) in passed
            first = plan.block_sizes[right] if has_right else 0
            stop = plan.starts[right] if has_right else 0
            seen = [(i, row[right]) for i in range(stop, stop + min(method.right, first))] if has_right else []
            (view,) = p.views
            assert indices(plan, view.after) == seen and not view.before
            passed.add((p.tick, p.lane, own.block))


def test_windows_see_themselves_and_the_end_of_the_one_before():
    rng = Random(3)
    for _ in range(60):
        size, level = rng.randint(1, 20), rng.choice([0.0, 0.02, 0.5])
        overlap = rng.randrange(size)
        method = random_plan(rng, Kind.JOINT).method
        method = replace(method, window=size, overlap=overlap, condition_level=level)
        ready = rng.choice([(), (1,), (4, 4)])
        plan = make_plan(method, sum(ready) + rng.randint(1, 60), ready)
        stop = sum(ready)
        for p, row in with_rows(plan):
            if plan.starts[p.covers[-1].block] >= stop:
                start, stop = stop, min(stop + size - min(stop, overlap), plan.num_latents)
            covered = [(i, c) for c in p.covers for i, _ in indices(plan, [c])]
            assert [i for i, _ in covered] == list(range(start - min(start, overlap), stop))
            assert not p.reads + p.writes and p.num_latents <= size
            for i, cover in covered:
                told = (plan.schedule.timesteps[row[cover.block]], 0.0) if i >= start else (1000 * level, level)
                assert cover.step == row[cover.block] and (cover.timestep, cover.renoise) == told


def test_a_retired_block_is_covered_once_more_at_the_context_level():
    plan = make_plan(replace(BASE, context_level=0.1), 12)
    retired = [p for p in plan.passes if p.covers[0].step == 4]
    assert [(p.tick, p.covers[0].block) for p in retired] == [(4, 0), (5, 1), (6, 2)]
    assert all(p.covers[0].timestep == 100 and p.covers[0].renoise == 0.1 and not p.updates for p in retired)
    assert all(p.writes[0].step == 4 for p in retired), "what is written is what later blocks read"
    for p in plan.passes:
        assert p in retired or not any(cover.renoise for cover in p.covers)


def test_what_nobody_reads_is_neither_written_nor_computed():
    alone = make_plan(replace(BASE, sink=0, history=0, left=0), 12)
    assert len(alone.passes) == 4 * 4 and not any(p.writes or p.reads for p in alone.passes)
    short = make_plan(BASE, 3)
    assert len(short.passes) == 4 and not any(p.writes for p in short.passes)


def test_without_retiring_the_features_of_the_last_step_are_history():
    for kind in (Kind.CAUSAL, Kind.JOINT):
        plan = make_plan(replace(BASE, kind=kind, retire=False, left=0, sink=0, lag=4), 12)
        assert len(plan.passes) == 4 * 4
        assert {s.step for p in plan.passes for s in p.reads} == {3} == {s.step for p in plan.passes for s in p.writes}


def test_lanes_are_the_same_pass_twice():
    one, two = (make_plan(replace(BASE, guidance_scale=scale), 20, (1,)) for scale in (1.0, 3.0))
    for lane in (0, 1):
        passes = [p for p in two.passes if p.lane == lane]
        assert [p[2:5] + (p.frees,) for p in passes] == [p[2:5] + (p.frees,) for p in one.passes]
        assert [p.updates for p in passes] == [p.updates if lane else () for p in one.passes]
