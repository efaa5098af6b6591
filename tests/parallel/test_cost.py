"""The simulator against closed forms and against processes that exchange messages one by one."""

import random
from dataclasses import replace

import numpy as np
import pytest

from longvid.plan import make_plan
from parallel.cost import (
    Costs,
    ModelShape,
    best_split,
    decoding_order,
    feeding_order,
    memory,
    peak_features,
    simulate,
)
from parallel.grid import Degrees, Grid, Limits, possible_grids
from parallel.layout import fastest
from parallel.split import split_layers
from pipelines.methods import METHODS, dualparal, rolling
from tests.longvid.test_cache import BYTES_PER_LATENT, walk

SHAPE = ModelShape(
    num_layers=40, dim=64, ffn_dim=128, num_rows=4, tokens_per_latent=24, latent_bytes=500, bytes_per_element=4,
    front_bytes=9000, frame_bytes=3000
)  # fmt: skip
FEW_LAYERS = replace(SHAPE, num_layers=2)


def even(grid, num_layers=SHAPE.num_layers):
    return split_layers([1.0] * num_layers, grid.num_stages)


def run(plan, grid, costs=None, num_layers=SHAPE.num_layers):
    return simulate(plan, grid, even(grid, num_layers), costs or Costs(), SHAPE)


def played(plan, grid, layers, costs, k):  # noqa: C901
    """When each process ends each pass and the head each block: every process has a list of things to do, in order.

    A thing is done as soon as all that it waits for has come; nothing here knows what the simulator knows. The bands of
    a stage wait for each other in every layer, so they count as one process here, and `grid` has none.
    """
    after, due = feeding_order(plan), decoding_order(plan, grid) if grid.back else {}
    clock, mail = dict.fromkeys(range(grid.world_size), 0.0), {}
    todo = {rank: [] for rank in clock}
    for i, p in enumerate(plan.passes):
        lane = p.lane if grid.num_lanes > 1 else 0
        way = [grid.rank(lane, stage) for stage in range(grid.num_stages)]
        for stage, rank in enumerate(way):
            for block in due.get(i, ()) if rank == grid.back else ():
                todo[rank].append(("back", block, None, None))
            todo[rank].append(("pass", i, stage, way))
        todo[0].append(("finish", i, None, way))
        todo[0] += [("show", block, None, None) for block in due.get(i, ())]
    for block in due.get(len(plan.passes), ()):
        todo[grid.back].append(("back", block, None, None))
        todo[0].append(("show", block, None, None))
    ends, shown = {}, []

    def post(kind, i, size, sender, receiver, time):
        mail[kind, i] = time + (costs.hop(size / k) if sender != receiver or k > 1 else 0.0)

    def feed(done):
        while feed.next < len(after) and after[feed.next] <= done:
            p = plan.passes[feed.next]
            lane = p.lane if grid.num_lanes > 1 else 0
            post((0, "in"), feed.next, p.num_latents * SHAPE.latent_bytes, 0, grid.rank(lane, 0), clock[0])
            feed.next += 1

    feed.next = 0
    feed(-1)
    while any(todo.values()):
        moved = False
        for rank, things in todo.items():
            while things:
                kind, i, stage, way = things[0]
                wanted = {"pass": ((stage, "in"), i), "finish": ("answer", i)}.get(kind, (kind, i))
                if wanted not in mail:
                    break
                things.pop(0)
                moved = True
                clock[rank] = max(clock[rank], mail[wanted])
                if kind == "back":
                    clock[rank] += 2 * costs.message + (costs.decode - costs.front) * plan.block_sizes[i]
                    mail["show", i] = clock[rank] + costs.hop(plan.block_sizes[i] * SHAPE.frame_bytes)
                    continue
                if kind == "show":
                    clock[0] += costs.message
                    shown.append((clock[0], i))
                    continue
                p = plan.passes[i]
                lane = p.lane if grid.num_lanes > 1 else 0
                is_abroad = way[0] != 0
                if kind == "finish":
                    clock[0] += costs.message * ((k if is_abroad else k - 1) + (k if lane else k - 1)) + costs.turn
                    if p.updates:
                        feed(i)
                    for block in p.emits:
                        if grid.back:
                            clock[0] += costs.front * plan.block_sizes[block] + costs.message
                            mail["back", block] = clock[0] + costs.hop(plan.block_sizes[block] * SHAPE.front_bytes)
                            continue
                        clock[0] += costs.decode * plan.block_sizes[block]
                        shown.append((clock[0], block))
                    continue
                for _ in layers[stage]:
                    clock[rank] += costs.fixed + costs.per_latent * p.num_latents / k
                    clock[rank] += costs.per_pair * p.num_latents * (p.num_latents + p.num_context) / k
                    whole = p.num_latents * SHAPE.hidden_bytes
                    for parts in (3, 1) if k > 1 else ():  # queries, keys and values; what comes of them
                        clock[rank] += costs.latency + parts * whole / k * (1 - 1 / k) / costs.bandwidth
                receives = stage > 0 or is_abroad or k > 1
                sends = stage < grid.num_stages - 1 or lane > 0 or k > 1
                clock[rank] += costs.message * (receives + sends)
                clock[rank] += costs.first * p.num_latents * (stage == 0) / k
                clock[rank] += costs.last * p.num_latents * (stage == grid.num_stages - 1)
                ends[rank, i] = clock[rank]
                if stage == grid.num_stages - 1:
                    post("answer", i, p.num_latents * SHAPE.latent_bytes, rank, 0, clock[rank])
                else:
                    size = p.num_latents * SHAPE.hidden_bytes
                    post((stage + 1, "in"), i, size, rank, way[stage + 1], clock[rank])
        assert moved, "nothing can go on: a deadlock"
    return ends, shown


@pytest.mark.parametrize("seed", range(32))
def test_it_is_what_processes_that_exchange_messages_do(seed):
    rng = random.Random(seed)
    name = rng.choice(list(METHODS))
    method = METHODS[name](num_steps=rng.randint(1, 5), guidance_scale=rng.choice([1.0, 3.0]))
    plan = make_plan(method, rng.randint(2, 40))
    plain = Grid(num_stages=rng.randint(1, 5), num_lanes=rng.choice([1, method.num_lanes]),
                 cuts_decoder=rng.random() < 0.6, decode_lag=rng.randrange(4))  # fmt: skip
    grid = replace(plain, num_bands=rng.choice([1, 2, 4]))
    named = ("fixed", "per_latent", "per_pair", "first", "last", "turn", "decode", "latency", "message")
    costs = Costs(**{name: rng.uniform(0, 2) for name in named}, bandwidth=rng.uniform(300, 30000))
    costs = replace(costs, front=rng.random() * costs.decode)
    layers = split_layers([rng.uniform(0.5, 2) for _ in range(7)], grid.num_stages)
    timeline = simulate(plan, grid, layers, costs, SHAPE)
    ends, shown = played(plan, plain, layers, costs, grid.num_bands)
    for rank in range(grid.world_size):
        for i in range(len(plan.passes)):
            if (rank // grid.num_bands, i) in ends:
                assert timeline.ends[rank, i] == pytest.approx(ends[rank // grid.num_bands, i])
            else:
                assert np.isnan(timeline.ends[rank, i])
    assert [block for _, _, block in timeline.decodes] == [block for _, block in shown]
    assert list(timeline.shown) == pytest.approx([end for end, _ in shown])


@pytest.mark.parametrize("name", METHODS)
def test_one_process_does_one_thing_after_the_other(name):
    plan = make_plan(METHODS[name](num_steps=3), 20)
    costs = Costs(fixed=1.0, per_latent=2.0, per_pair=0.1, first=0.5, last=0.25, turn=0.4, decode=3.0)
    timeline = run(plan, Grid(num_stages=1), costs)
    passes = sum(SHAPE.num_layers * costs.layer(p) + 0.75 * p.num_latents + 0.4 for p in plan.passes)
    assert timeline.makespan == pytest.approx(passes + 3.0 * 20)
    assert timeline.idle == pytest.approx((0.4 * len(plan.passes) / timeline.makespan,)) and timeline.sent == (0,)


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_a_queue_as_long_as_the_pipe_fills_it(num_stages):
    """Equal passes, a queue of as many as stages: P passes take P + S - 1 turns but for the ends of the queue."""
    plan = make_plan(dualparal(num_steps=50, block_size=8, guidance_scale=1.0), 16 + 8 * 199)
    t = SHAPE.num_layers / num_stages * 16
    middle = [p for p in plan.passes if p.num_latents == 16]
    turns = run(plan, Grid(num_stages=num_stages)).makespan / t
    assert len(middle) < turns < 1.03 * (len(plan.passes) + num_stages - 1)


def test_idle_of_dualparal_is_as_published_and_lanes_fill_the_pipe():
    """DualParal (arXiv 2505.21070), section 4.1: 8 GPUs idle 4 % with 26 blocks and 48 % with 5, without lanes."""
    eight = Grid(num_stages=8)
    idle = lambda plan, grid: np.mean(run(plan, grid).idle)  # noqa: E731
    plain = [make_plan(dualparal(guidance_scale=1.0), 16 + 8 * (blocks - 1)) for blocks in (26, 5)]
    assert [idle(plan, eight) for plan in plain] == pytest.approx([0.04, 0.48], abs=0.01)
    guided = [make_plan(dualparal(), 16 + 8 * (blocks - 1)) for blocks in (26, 5)]
    guided.append(make_plan(rolling(num_steps=4), 3 * 79 + 1))
    grids = possible_grids(8, Limits(num_layers=SHAPE.num_layers, num_heads=8, num_rows=4, num_lanes=2), Degrees())
    best = [fastest(plan, grids, Costs(), SHAPE).planned.mean_idle for plan in guided]
    assert all(found <= most for found, most in zip(best, (0.03, 0.15, 0.10), strict=True)), best


def test_the_head_that_decodes_gets_fewer_layers():
    plan, grid = make_plan(rolling(), 60), Grid(num_stages=4)
    layers = best_split(plan, grid, Costs(decode=100.0), SHAPE)
    assert len(layers[-1]) < min(len(part) for part in layers[:-1])
    split, equal = (simulate(plan, grid, x, Costs(decode=100.0), SHAPE).makespan for x in (layers, even(grid)))
    assert split < equal


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_a_decoder_that_is_cut_gives_the_head_less_to_do(num_lanes):
    """Where layers are too few to make up for it, or both lanes have all of them."""
    plan, costs, shape = (
        make_plan(rolling(num_steps=4), 60),
        Costs(per_latent=20.0, decode=60.0, front=25.0),
        FEW_LAYERS,
    )
    grids = [Grid(num_stages=2 // num_lanes, num_lanes=num_lanes, cuts_decoder=cut) for cut in (False, True)]
    whole, cut = (simulate(plan, grid, best_split(plan, grid, costs, shape), costs, shape) for grid in grids)
    assert cut.makespan < whole.makespan and max(cut.idle) < max(whole.idle)
    assert cut.decode_time == pytest.approx(whole.decode_time) == pytest.approx(60 * 60.0)
    assert fastest(plan, grids, costs, shape).grid.cuts_decoder
    assert not fastest(plan, grids, replace(costs, front=0.0), shape).grid.cuts_decoder, "nothing is to be had"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_stages, num_lanes", [(3, 1), (1, 2), (2, 2)])
def test_every_block_has_its_back_once_and_after_it_left(name, num_stages, num_lanes):
    plan, grid = make_plan(METHODS[name](num_steps=3), 40), Grid(num_stages=num_stages, num_lanes=num_lanes,
                                                                 cuts_decoder=True)  # fmt: skip
    left = {block: i for i, p in enumerate(plan.passes) for block in p.emits}
    for start in (0, len(plan.passes) // 2):
        due = decoding_order(plan, grid, start)
        assert [block for i in sorted(due) for block in due[i]] == [block for block, i in left.items() if i >= start]
        assert all(feeding_order(plan)[i] >= left[block]
                   for i, blocks in due.items() if i < len(plan.passes) for block in blocks)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_features_kept_are_those_that_the_cache_keeps(name):
    plan = make_plan(METHODS[name](num_steps=4), 50)
    assert peak_features(plan) * BYTES_PER_LATENT == max(walk(plan))


def test_memory_is_shared_by_stages_and_lanes():
    plan = make_plan(rolling(), 60)
    one = memory(plan, Grid(num_stages=1), [range(40)], SHAPE)[0]
    for grid in (Grid(num_stages=4), Grid(num_stages=4, num_lanes=2)):
        found = memory(plan, grid, even(grid), SHAPE)
        assert len(found) == grid.world_size
        assert all(4 * x["weights"] == one["weights"] for x in found)
        assert all(4 * grid.num_lanes * x["features"] == one["features"] for x in found)
    bands = memory(plan, Grid(num_stages=1, num_bands=4), [range(40)], SHAPE)
    assert all(x["weights"] == one["weights"] and 4 * x["features"] == one["features"] for x in bands)
    assert all(4 * x["activations"] == one["activations"] for x in bands)


def test_a_thousand_processes_are_simulated_too():
    plan = make_plan(rolling(), 240)
    layers = [range(2 * i, 2 * i + 2) for i in range(1024)]
    timeline = simulate(plan, Grid(num_stages=1024), layers, Costs(), SHAPE)
    assert timeline.ends.shape == (1024, len(plan.passes)) and 0.9 < np.mean(timeline.idle) < 1


@pytest.mark.parametrize("given", [{"per_latent": -1.0}, {"bandwidth": 0.0}, {"latency": float("nan")}])
def test_costs_that_cannot_be(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))}="):
        Costs(**given)
