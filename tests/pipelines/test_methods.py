"""Every preset is held to its published rule, number by number."""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from longvid.method import Kind, LevelRule, Method
from longvid.plan import make_plan, num_latents_of
from longvid.schedule import Noise, Solver
from pipelines.methods import METHODS, make_method


def plan_of(name, num_latents, ready=(), **changes):
    return make_plan(make_method(name, **changes), num_latents, ready)


def size(pieces):
    return sum(piece.stop - piece.start for piece in pieces)


def told(p):
    """Timesteps that a pass tells the model, block by block."""
    return tuple(cover.timestep for cover in p.covers)


def by_tick(plan):
    """Passes of each tick, of the first lane."""
    ticks = defaultdict(list)
    for p in plan.passes:
        if p.lane == 0:
            ticks[p.tick].append(p)
    return [ticks[tick] for tick in sorted(ticks)]


# Rolling Forcing: arXiv 2509.25161 and its release --------------------------------------------------------------------

FULL = (5000 / 9, 10000 / 13, 15000 / 17, 20000 / 21, 1000.0)
"""555.556, 769.231, 882.353, 952.381, 1000: a full window, oldest block first."""


def rolling_forcing_windows(num_blocks):
    """The joint pass of each window, and the update pass before it if there is one."""
    plan = plan_of("rolling-forcing", 3 * num_blocks)
    windows, updates = [], []
    for passes in by_tick(plan):
        *update, window = passes
        windows.append(window)
        updates.append(update)
    return plan, windows, updates


def test_rolling_forcing_windows_and_timesteps():
    plan, windows, _ = rolling_forcing_windows(12)
    assert plan.schedule.timesteps == pytest.approx((1000, 952.381, 882.353, 769.231, 555.556, 0), abs=1e-3)
    assert len(windows) == 12 + 5 - 1
    for w, p in enumerate(windows):
        blocks = range(max(0, w - 4), min(11, w) + 1)
        assert tuple(c.block for c in p.covers) == tuple(blocks) == p.updates
        levels = FULL[-len(blocks) :] if w < 5 else FULL[: len(blocks)]
        assert told(p) == pytest.approx(levels), "warm-up has the last of a full window's, the tail the first"
        assert p.emits == ((w - 4,) if w >= 4 else ())


def test_rolling_forcing_keys():
    _, windows, _ = rolling_forcing_windows(14)
    assert all(not p.reads for p in windows[:5]), "while block 0 is in the window, keys are the window"
    recent = [0, *[3] * 8, 6, 9, 12, 15]
    for w, p in enumerate(windows[5:], start=5):
        head, r = p.covers[0].block, recent[w - 5]
        seen = [(s.block, s.step, latent) for s in p.reads for latent in range(s.start, s.stop)]
        assert [block for block, _, _ in seen] == [0, 0, 0, *(b for b in range(head - r // 3, head) for _ in range(3))]
        assert {step for _, step, _ in seen} == {5}, "all of it clean"
        assert p.num_latents + p.num_context == (18 if w == 5 else 21)
    assert [p.num_latents for p in windows[-5:]] == [15, 12, 9, 6, 3]


def test_rolling_forcing_update_passes():
    _, windows, updates = rolling_forcing_windows(14)
    assert not any(updates[:5]) and all(len(update) == 1 for update in updates[5:])
    for w, (p,) in enumerate(updates[5:], start=5):
        block = w - 5
        assert told(p) == (0,) and p.covers[0][:4] == (block, 5, 0, 3) and not p.covers[0].renoise
        assert [s.block for s in p.reads] == list(range(max(0, block - 6), block)), "18 before, without the sink"
    assert [p.num_latents for p in windows[:5]] == [3, 6, 9, 12, 15]
    assert all(p.num_latents + updates[w][0].num_latents == 18 for w, p in enumerate(windows[:14]) if w >= 5)


def test_rolling_forcing_renoises_and_has_one_lane():
    method = make_method("rolling-forcing")
    assert (method.solver, method.num_lanes, method.num_steps, method.lag) == (Solver.RENOISE, 1, 5, 1)
    assert (method.block_size, method.sink, method.max_keys, method.flow_shift) == (3, 3, 21, 5.0)


# Self-Forcing: arXiv 2506.08009 and its release -----------------------------------------------------------------------


def test_self_forcing_is_four_steps_and_a_clean_pass_for_each_chunk():
    plan = plan_of("self-forcing", 36)
    assert plan.method.solver is Solver.RENOISE and plan.method.num_lanes == 1
    order = [(p.covers[0].block, *told(p)) for p in plan.passes]
    steps = (1000, 937.5, 2500 / 3, 625)
    expected = [(chunk, t) for chunk in range(12) for t in (*steps, 0)][:-1]
    assert order == [(chunk, pytest.approx(t)) for chunk, t in expected], "the last chunk needs no clean pass"
    for p in plan.passes:
        chunk = p.covers[0].block
        assert size(p.reads) == min(18, 3 * chunk) and p.num_latents + p.num_context <= 21
        assert [s.block for s in p.reads] == list(range(max(0, chunk - 6), chunk)) and {s.step for s in p.reads} <= {4}


def test_self_forcing_by_single_latents():
    plan = plan_of("self-forcing", 30, block_size=1)
    assert max(p.num_latents + p.num_context for p in plan.passes) == 21


# DualParal: arXiv 2505.21070 and its release --------------------------------------------------------------------------


@pytest.mark.parametrize("block_size, context, num_blocks", [(8, 8, 5), (10, 8, 3), (4, 4, 6), (8, 8, 12)])
def test_dualparal_passes(block_size, context, num_blocks):
    """The README's 8/40/8 (189 frames), larger and smaller blocks, and a longer one."""
    num_steps = 10
    num_latents = num_blocks * block_size + context
    plan = plan_of("dualparal", num_latents, num_steps=num_steps, block_size=block_size)
    assert plan.num_frames == 4 * (num_latents - 1) + 1
    assert plan.block_sizes == (block_size + context, *[block_size] * (num_blocks - 1))
    assert Counter(p.lane for p in plan.passes) == {0: num_blocks * num_steps, 1: num_blocks * num_steps}
    ticks = by_tick(plan)
    assert len(ticks) == num_steps + num_blocks - 1
    for passes in ticks:
        blocks = [p.covers[-1].block for p in passes]
        assert blocks == list(range(blocks[0], blocks[-1] - 1, -1)), "from the tail to the head"
        for p, right in zip(passes, [None, *passes], strict=False):
            *prefix, own = p.covers
            assert size(p.covers) == block_size + context and p.updates in ((), (own.block,))
            assert set(told(p)) == {plan.schedule.timesteps[own.step]}
            if own.block:
                (before,) = prefix
                last = plan.block_sizes[own.block - 1]
                assert before[:4] == (own.block - 1, own.step + 1, last - context, last), "one step cleaner"
            assert (right is None) == (not p.reads)
            if right:
                assert p.reads == ((own.block + 1, own.step - 1, 0, context),) == right.writes
                assert p.num_latents + p.num_context == block_size + 2 * context


def test_dualparal_mends_the_length_and_keeps_the_rest():
    method = make_method("dualparal")
    assert (method.solver, method.noise, method.level_rule) == (Solver.UNIPC, Noise.COORDINATED, LevelRule.WAN)
    assert (method.num_steps, method.lag, method.guidance_scale, method.flow_shift) == (50, 1, 5.0, 3.0)
    plan = make_plan(replace(method, num_steps=4), 40)
    assert plan.block_sizes == (16, 8, 8, 8) and plan.num_frames == 157
    short = make_plan(replace(method, num_steps=4), 35)
    assert short.block_sizes == (16, 8, 8, 3)
    assert {size(p.covers) for p in short.passes if p.covers[-1].block == 3} == {11}
    assert {size(p.reads) for p in short.passes if p.covers[-1].block == 2} == {0, 3}


# SkyReels-V2: arXiv 2504.13074 and its release ------------------------------------------------------------------------

WINDOWS = [(97, 1), (257, 3), (377, 5), (737, 9), (1457, 18)]


def windows_of(plan):
    """The passes of each window, first lane: a window ends where the last block covered changes."""
    windows = defaultdict(list)
    for p in plan.passes:
        if p.lane == 0:
            windows[p.covers[-1].block].append(p)
    return list(windows.values())


@pytest.mark.parametrize("name", ["skyreels-sync", "skyreels-async"])
@pytest.mark.parametrize("num_frames, num_windows", WINDOWS)
def test_skyreels_windows(name, num_frames, num_windows):
    plan = plan_of(name, num_latents_of(num_frames), num_steps=6)
    windows = windows_of(plan)
    assert len(windows) == num_windows
    assert [p.num_latents for passes in windows for p in passes[:1]][:-1] == [25] * (num_windows - 1)
    for before, passes in pairwise(windows):
        shared = [c for c in passes[0].covers if c.block <= before[-1].covers[-1].block]
        assert size(shared) == 5 and plan.starts[passes[0].covers[0].block] + passes[0].covers[0].start + 5 == (
            plan.starts[before[0].covers[-1].block] + plan.block_sizes[before[0].covers[-1].block]
        )
        for p in passes:
            conditions = [c for c in p.covers if c.block <= before[-1].covers[-1].block]
            assert {(c.step, c.timestep, c.renoise) for c in conditions} == {(6, 20.0, 0.02)}, "addnoise_condition = 20"
            assert not any(c.renoise for c in p.covers if c not in conditions)


def test_skyreels_rows_and_forwards():
    sync, staircase = plan_of("skyreels-sync", 25), plan_of("skyreels-async", 25)
    assert (len(by_tick(sync)), len(by_tick(staircase))) == (30, 50)
    assert (len(sync.passes), len(staircase.passes)) == (60, 100), "with guidance, for a clip of 97 frames"
    assert len(by_tick(plan_of("skyreels-async", 40))) == 50 + 40, "a last window of 20 latents, 5 of them shared"
    windows = windows_of(plan_of("skyreels-async", num_latents_of(257), guidance_scale=1.0))
    assert [len(passes) for passes in windows] == [50, 45, 45]
    useful = [sum(5 * len(p.updates) for p in passes) / sum(p.num_latents for p in passes) for passes in windows]
    assert useful == pytest.approx([0.60, 0.533, 0.533], abs=1e-3)


def test_skyreels_timesteps():
    """The step table is 999, then the schedule's, then 0. The presets have diffusers' schedule, near the release's."""
    for name, lag in (("skyreels-sync", 0), ("skyreels-async", 5)):
        plan = plan_of(name, 25, guidance_scale=1.0)
        timesteps = plan.schedule.timesteps
        assert timesteps[:5] == (999, 995, 991, 986, 981) and timesteps[-6:] == (616, 553, 473, 367, 221, 0)
        release = replace(plan.method, level_rule=LevelRule.SKYREELS).schedule().timesteps
        assert release[:5] == (999, 995, 991, 986, 980) and release[-6:] == (615, 551, 470, 363, 216, 0)
        for row, (p,) in enumerate(by_tick(plan)):
            states = [min(max(row + 1 - lag * block, 0), 31) for block in range(len(plan.block_sizes))]
            assert told(p) == tuple((999, *timesteps[:30], 0)[k] for k in states)
            assert p.updates == tuple(b for b, k in enumerate(states) if 0 < k < 31)


def test_skyreels_from_an_image_or_a_video():
    plan = plan_of("skyreels-async", 25, (1,), has_image=True)
    assert plan.block_sizes == (1, 4, 4, 4, 4, 4, 4) and len(by_tick(plan)) == 30 + 5 * 5
    assert plan_of("skyreels-sync", 25, (1,), has_image=True).block_sizes == (1, 24)
    assert plan_of("skyreels-async", 45, (1,), has_image=True).block_sizes == (1, *[4] * 11)
    for p in plan.passes:
        assert p.covers[0] == (0, 30, 0, 1, 20.0, 0.02) and 0 not in p.updates and p.num_latents == 25
    extended = plan_of("skyreels-sync", 30, (5,))
    assert [passes[0].num_latents for passes in windows_of(extended)] == [25, 10], "120 frames asked, 17 of them given"
    assert len(by_tick(plan_of("skyreels-async", 25, (5,)))) == 45


def test_skyreels_defaults():
    for name in ("skyreels-sync", "skyreels-async"):
        method = make_method(name)
        assert (method.num_steps, method.guidance_scale, method.flow_shift, method.solver) == (30, 6, 8, Solver.UNIPC)
        assert 4 * (method.window - 1) + 1 == 97 and 4 * (method.overlap - 1) + 1 == 17
    assert make_method("skyreels-async", num_steps=3).lag == 3, "the release caps ar_step at the number of steps"


# Ours -----------------------------------------------------------------------------------------------------------------


def test_rolling_is_a_queue_of_lag_1_after_a_first_latent_with_one_pass_more_for_each_block():
    plan = plan_of("rolling", 61)
    assert plan.method.kind is Kind.CAUSAL and plan.method.lag == 1
    alone = [p for passes in by_tick(plan)[:16] for p in passes]
    assert [(p.covers[0].block, p.covers[0].step, p.num_latents) for p in alone] == [(0, step, 1) for step in range(16)]
    for steps in (1, 4):
        assert make_method("rolling", num_steps=steps).first_steps == steps
        assert make_method("rolling-fast", num_steps=steps).first_steps == steps
        assert make_method("rolling-fast", num_steps=steps, first_steps=3).first_steps == max(3, steps)
    assert Counter(p.covers[0].block for p in plan.passes if p.lane == 0) == {**dict.fromkeys(range(20), 17), 20: 16}
    for passes in by_tick(plan):
        queue = [p.covers[0] for p in passes if p.updates or p.covers[0].step < 16]
        assert all(a.block + 1 == b.block and a.step == b.step + 1 for a, b in pairwise(queue)), "head first"
    for p in plan.passes:
        start = plan.starts[p.covers[0].block]
        seen = [plan.starts[s.block] + i for s in p.reads for i in range(s.start, s.stop)]
        assert seen == [*range(min(1, start)), *range(max(1, start - 6), start)]


# Names and changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_presets_are_named_as_on_the_command_line(name):
    assert make_method(name).name == name == make_method(name, has_image=True).name
    assert make_method(name, num_steps=7, guidance_scale=1.0, flow_shift=2.0).num_lanes == 1


def test_an_unknown_method_lists_the_known():
    with pytest.raises(
        ValueError, match="method 'fifo' is unknown; the methods are rolling, rolling-fast, dualparal, skyreels-sync,"
    ):
        make_method("fifo")


@pytest.mark.parametrize(
    "name, changes, able",
    [
        ("dualparal", {"lag": 2}, "rolling, rolling-fast, skyreels-async"),
        (
            "skyreels-sync",
            {"block_size": 5},
            "rolling, rolling-fast, dualparal, skyreels-async, rolling-forcing, self-forcing",
        ),
        ("self-forcing", {"lag": 2}, "rolling, rolling-fast, skyreels-async"),
    ],
)
def test_a_change_that_a_method_does_not_take_names_those_that_do(name, changes, able):
    flag = next(iter(changes)).replace("_", "-")
    with pytest.raises(ValueError) as error:
        make_method(name, **changes)
    assert str(error.value) == f"--{flag} cannot be changed in method {name}; methods that take it: {able}"


BAD = [
    ("rolling", {"num_steps": 0}, "num_steps=0 must be a whole number of at least 1; try 1"),
    ("rolling", {"num_steps": 2.5}, "num_steps=2.5 must be a whole number"),
    ("rolling", {"block_size": -3}, "block_size=-3 must be a whole number of at least 1; try 1"),
    ("rolling", {"lag": -1}, "lag=-1 must be a whole number of at least 0"),
    ("rolling", {"lag": 17}, "lag=17 must be at most num_steps=16; try 16"),
    ("rolling", {"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number; try 1.0"),
    ("rolling", {"guidance_scale": math.inf}, "guidance_scale=inf must be a finite number"),
    ("rolling", {"flow_shift": math.nan}, "shift=nan must be a positive finite number; try 5.0"),
    ("rolling", {"flow_shift": 0.0}, "shift=0.0 must be a positive finite number"),
    ("self-forcing", {"block_size": 21}, "block_size=21 leaves no context within max_keys=21; try block_size 3"),
    ("rolling-forcing", {"block_size": 40}, "block_size=40 leaves no context within max_keys=21; try block_size 3"),
]


@pytest.mark.parametrize("name, changes, said", BAD)
def test_a_change_out_of_range_is_refused(name, changes, said):
    with pytest.raises(ValueError) as error:
        make_method(name, **changes)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"kind": "joint"}, "kind='joint' must be a Kind: causal, two-sided, joint"),
        ({"solver": "dpm"}, "solver='dpm' must be a Solver: euler, unipc, renoise"),
        ({"context_level": 1.0}, "context_level=1.0 must be at least 0 and below 1; try 0.02"),
        ({"condition_level": -0.1}, "condition_level=-0.1 must be at least 0 and below 1; try 0.02"),
        ({"condition_level": math.nan}, "condition_level=nan must be a finite number"),
        ({"overlap": 25}, "overlap=25 must be below window=25; try 5"),
        ({"window": -25}, "window=-25 must be a whole number of at least 0"),
        ({"kind": Kind.CAUSAL}, "window=25 is for joint passes, these are causal; try 0"),
        ({"sink": -1}, "sink=-1 must be a whole number of at least 0"),
    ],
)
def test_no_such_method(changes, said):
    method = make_method("skyreels-sync")
    assert isinstance(method, Method)
    with pytest.raises(ValueError) as error:
        replace(method, **changes)
    assert said in str(error.value)
