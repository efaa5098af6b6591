"""Runs every case of `test_execute.py` as one process of a group and writes what the head made.

Started by the test as `torchrun cases.py OUT OTHERS SEQUENCE LANES`; imported by it for the list of cases.
"""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from longvid.models.dit import DiT
from longvid.plan import Plan, make_plan
from longvid.sampler import noise_of
from parallel import snapshot
from parallel.exchange import Ulysses
from parallel.execute import carry_out, make_stage
from parallel.grid import Degrees, Grid, Limits, possible_grids, row_ranges
from parallel.split import split_layers
from pipelines.methods import METHODS
from tests.whole_clip import CHANNELS, FPS, HEIGHT, WIDTH, clean, texts_of, tiny_dit, words

LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video: its plan and the blocks that are there already."""

    plan: Plan
    ready: tuple[int, ...] = ()


def cases() -> dict[str, Case]:
    """Every method with and without guidance; few blocks, few steps, a short last block, an image, an extension."""
    found = {}
    for name, preset in METHODS.items():
        for scale in (1.0, 3.0):
            method = preset(num_steps=3, guidance_scale=scale)
            found[f"{name}-{scale:g}"] = Case(plan=make_plan(method, 29))
        found[f"{name}-image"] = Case(plan=make_plan(method, 20, (1,)), ready=(1,))
        found[f"{name}-extension"] = Case(plan=make_plan(method, 22, (3, 3)), ready=(3, 3))
    rolling = METHODS["rolling"]
    found["one-block"] = Case(plan=make_plan(rolling(num_steps=4), 1))
    found["one-step"] = Case(plan=make_plan(rolling(num_steps=1), 10))
    for lag in (0, 2, 4):
        found[f"lag-{lag}"] = Case(plan=make_plan(rolling(num_steps=4, lag=lag), 12))
    found["together"] = Case(plan=make_plan(rolling(num_steps=5, blocks_per_pass=2), 29))
    found["together-extension"] = Case(
        plan=make_plan(rolling(num_steps=4, blocks_per_pass=3), 22, (3, 3)), ready=(3, 3)
    )
    found["windows"] = Case(plan=make_plan(replace(METHODS["skyreels-sync"](num_steps=3), window=8, overlap=3), 19))
    return found


OF_BANDS = ("rolling-3", "rolling-1", "rolling-extension", "dualparal-3", "skyreels-async-3", "rolling-forcing-3",
            "self-forcing-3", "one-block", "windows", "together")  # fmt: skip


def is_for(name: str, case: Case, sequence: int, lanes: int) -> bool:
    """Whether a grid runs a case: it has as many lanes, and with bands each kind of pass is enough."""
    return lanes <= case.plan.method.num_lanes and (sequence == 1 or name in OF_BANDS)


def whole_dit() -> DiT:
    """The model of all cases."""
    return tiny_dit(num_layers=LAYERS)


def part_of(dit: DiT, layers: range) -> DiT:
    """The same weights, these layers alone."""
    part = DiT(dit.config, layers).eval().requires_grad_(False)
    part.load_state_dict({name: dit.state_dict()[name] for name in part.state_dict()})
    return part


def whole_of(case: Case) -> snapshot.Part:
    """What all processes have together."""
    return snapshot.part_of(range(LAYERS), range(case.plan.method.num_lanes))


def middle(folder: Path, case: Case) -> int:
    """The snapshot in the middle of those that a run left."""
    points = snapshot.found(folder, whole_of(case))
    return points[len(points) // 2]


def grid_of(num_processes: int, sequence: int, lanes: int) -> Grid:
    """The grid of so many processes of which the last two are given."""
    limits = Limits(num_layers=LAYERS, num_heads=2, num_rows=HEIGHT // 2, num_lanes=2)
    return possible_grids(num_processes, limits, Degrees(sequence=sequence, lanes=lanes))[0]


def check_uneven_rows() -> None:
    """Five rows on all processes: each gets its heads of all rows, in their order, and its rows back."""
    k, band = dist.get_world_size(), dist.get_rank()
    ranges = row_ranges(5, k)
    ulysses = Ulysses(dist.group.WORLD, [len(rows) for rows in ranges], band)
    whole = torch.randn(3, 1, 2, 5 * 3, 2 * k, 4, generator=torch.Generator().manual_seed(0))
    mine = slice(3 * ranges[band].start, 3 * ranges[band].stop)
    spread = ulysses.by_heads(*whole[:, :, :, mine])
    assert len(set(map(len, ranges))) == 2 and ulysses.num_rows(len(ranges[band])) == 5
    assert all(torch.equal(x, y[..., 2 * band : 2 * band + 2, :]) for x, y in zip(spread, whole, strict=True))
    assert torch.equal(ulysses.by_tokens(spread[0]), whole[0][:, :, mine])
    assert ulysses.num_bytes == 4 * 2 * 4 * (3 * 3 * len(ranges[band]) * 2 * (k - 1) + 3 * (5 - len(ranges[band])) * 2)


def main(out: Path, others: Path, sequence: int, lanes: int) -> None:
    """Carry out all cases on the same links: from the start, leaving snapshots, and from the midst of others' runs."""
    torch.set_num_threads(1)
    if os.environ.get("ON_MACHINES_OF_THEIR_OWN"):
        os.environ["GROUP_RANK"] = os.environ["RANK"]
    dist.init_process_group("gloo")
    grid = grid_of(dist.get_world_size(), sequence, lanes)
    stage = make_stage(grid, split_layers([1.0] * LAYERS, grid.num_stages), HEIGHT // 2, torch.device("cpu"))
    if sequence > 1:
        check_uneven_rows()
    layers = stage.layers
    part, size, made = part_of(whole_dit(), layers), (CHANNELS, HEIGHT, WIDTH), {}
    text = texts_of(part, words(0), words(1))
    for name, case in cases().items():
        if not is_for(name, case, sequence, lanes):
            continue
        noise = noise_of(case.plan, 7, *size)
        common = {"ready": clean(*case.ready) if stage.is_head else (), "fps": FPS}
        before = stage.num_bytes
        here = range(case.plan.method.num_lanes) if stage.lane is None else [stage.lane]
        kept = snapshot.part_of(layers, here, stage.band, grid.num_bands)
        leave = partial(snapshot.write, out / "snapshots" / name, part=kept)
        held, exchanged = [], stage.exchange.num_bytes
        blocks = dict(carry_out(case.plan, part, stage, text, noise, size, reached=leave,
                                observe=lambda p, held=held: held.append(stage.num_held), **common))  # fmt: skip
        sent, exchanged = stage.num_bytes - before, stage.exchange.num_bytes - exchanged
        start = snapshot.read(others / name, middle(others / name, case), kept, torch.device("cpu"),
                              (case.plan, noise) if stage.is_head else None)  # fmt: skip
        rest = dict(carry_out(case.plan, part, stage, text, noise, size, start=start, **common))
        made[name] = {"blocks": blocks, "bytes": sent, "exchanged": exchanged, "held": max(held), "rest": rest}
    torch.save(made, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
