"""N processes make the video that one makes, and send nothing but latents and hidden states.

Stages and lanes to the bit; bands cut matrices, and the video is the same but for rounding.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from longvid.sampler import noise_of, sample
from parallel import snapshot
from parallel.cost import feeding_order
from parallel.grid import Grid, cut_rows
from parallel.split import split_layers
from tests.parallel.cases import LAYERS, cases, grid_of, is_for, middle, whole_dit, whole_of
from tests.whole_clip import CHANNELS, FPS, HEIGHT, WIDTH, clean, texts_of, words

ROOT = Path(__file__).parents[2]
CASES = cases()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each process has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_alone(name, **options):
    """What one process makes of a case."""
    case, dit = CASES[name], whole_dit()
    text, noise = texts_of(dit, words(0), words(1)), noise_of(case.plan, 7, CHANNELS, HEIGHT, WIDTH)
    return dict(sample(case.plan, dit, text, noise, ready=clean(*case.ready), fps=FPS, **options))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Where one process leaves a snapshot of every point of every case."""
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def alone(snapshots):
    """What one process makes of every case."""
    return {
        name: run_alone(name, reached=partial(snapshot.write, snapshots / name, part=whole_of(case)))
        for name, case in CASES.items()
    }


@dataclass(frozen=True, kw_only=True)
class Group:
    """What processes left: by rank, by case; and the folder of their snapshots."""

    made: list[dict]
    snapshots: Path
    grid: Grid


GROUPS = ["2", "3", "3-machines", "4", "2-lanes", "4-lanes", "4-bands", "4-bands-lanes"]


@pytest.fixture(scope="module", params=GROUPS)
def group(request, tmp_path_factory, alone, snapshots):
    """Several processes, as stages, lanes and bands, after all cases that have as many lanes; on machines of their own
    they have no memory to share."""
    out = tmp_path_factory.mktemp(f"group-{request.param}")
    num, lanes, bands = request.param[0], 1 + ("lanes" in request.param), 1 + ("bands" in request.param)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}",
             "-m", "tests.parallel.cases", str(out), str(snapshots), str(bands), str(lanes)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ON_MACHINES_OF_THEIR_OWN": "1"} if "machines" in request.param else {}
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    made = [torch.load(out / f"{rank}.pt") for rank in range(int(num))]
    assert set(made[0]) == {name for name, case in CASES.items() if is_for(name, case, bands, lanes)}
    assert len(made[0]) >= 6
    return Group(made=made, snapshots=out / "snapshots", grid=grid_of(int(num), bands, lanes))


def same(grid, x, y):
    """To the bit, or within 1e-5 of the greatest value where matrices are cut."""
    if grid.num_bands == 1:
        return torch.equal(x, y)
    return (x - y).abs().max() <= 1e-5 * y.abs().max()


def test_the_video_is_that_of_one_process(alone, group):
    for name, found in group.made[0].items():
        assert not any(other[name]["blocks"] for other in group.made[1:]), "only the head has latents"
        assert list(found["blocks"]) == list(alone[name]), name
        assert all(same(group.grid, x, alone[name][block]) for block, x in found["blocks"].items()), name


def test_only_latents_velocities_and_hidden_states_are_sent(group):
    width, grid = whole_dit().config.dim, group.grid
    for name in group.made[0]:
        passes = CASES[name].plan.passes
        for rank, found in enumerate(group.made):
            place = grid.place(rank)
            mine = sum(p.num_latents for p in passes if place.lane in (None, p.lane))
            rows = cut_rows(HEIGHT // 2, grid.num_bands)
            latents, hidden = [4 * CHANNELS * 2 * own * WIDTH for own in rows], 4 * (WIDTH // 2) * width
            exchanged = 0
            if grid.num_bands > 1:  # queries, keys, values of half of the heads, and what comes of half of the rows
                depth = len(split_layers([1.0] * LAYERS, grid.num_stages)[place.stage])
                exchanged = depth * mine * hidden * (3 * rows[place.band] + rows[1 - place.band]) // 2
            assert found[name]["exchanged"] == exchanged
            if rank == 0:
                firsts = [(p, band) for p in passes for band in range(grid.num_bands)
                          if grid.rank(p.lane if grid.num_lanes > 1 else 0, 0, band) != 0]  # fmt: skip
                expected = sum(latents[band] * p.num_latents for p, band in firsts)
            else:
                last = place.stage == grid.num_stages - 1
                expected = mine * (latents[place.band] if last else hidden * rows[place.band])
            assert found[name]["bytes"] == expected + exchanged, (name, rank)


def test_nothing_is_held_that_has_arrived(group):
    """However long a video, a process holds what may be under way at once and no more."""
    lengths = []
    for found in group.made:
        for name, of_case in found.items():
            ahead = max(i - done for i, done in enumerate(feeding_order(CASES[name].plan)))
            assert of_case["held"] <= ahead, name
            lengths.append(len(CASES[name].plan.passes) / ahead)
    assert max(lengths) > 3, "some videos are much longer than what is under way"


def resumed(name, folder):
    """What one process makes of a case from the midst of a run on."""
    case = CASES[name]
    noise = noise_of(case.plan, 7, CHANNELS, HEIGHT, WIDTH)
    done = middle(folder, case)
    start = snapshot.read(folder, done, whole_of(case), torch.device("cpu"), (case.plan, noise))
    return run_alone(name, start=start)


def is_end_of(grid, whole, rest, case, folder):
    """Whether the rest of a run is that of the whole, from the snapshot in the middle on."""
    left = {block for p in case.plan.passes[: middle(folder, case)] for block in p.emits}
    assert list(rest) == [block for block in whole if block not in left]
    return all(same(grid, rest[block], whole[block]) for block in rest)


def test_a_run_goes_on_from_a_snapshot_on_another_number_of_processes(alone, group, snapshots):
    for name, found in group.made[0].items():
        case, folder = CASES[name], group.snapshots / name
        assert is_end_of(group.grid, alone[name], found["rest"], case, snapshots / name), name
        assert snapshot.found(folder, whole_of(case)) == snapshot.found(snapshots / name, whole_of(case))
        assert is_end_of(group.grid, alone[name], resumed(name, folder), case, folder), name


@pytest.mark.parametrize("name", CASES)
def test_latents_are_taken_after_the_last_change_and_in_order(name):
    plan = CASES[name].plan
    after = feeding_order(plan)
    assert after == sorted(after) and all(-1 <= done < i for i, done in enumerate(after))
    for i, p in enumerate(plan.passes):
        covered = {cover.block for cover in p.covers}
        changes = [j for j in range(i) if covered & set(plan.passes[j].updates)]
        assert after[i] >= max(changes, default=-1)


def test_a_queue_keeps_as_many_stages_busy_as_it_has_passes():
    """With lag 1 the latents of a whole tick may be on their way before any of it is done."""
    plan = CASES["rolling-3"].plan
    ahead = max(i - done for i, done in enumerate(feeding_order(plan)))
    assert ahead > plan.method.num_lanes * plan.method.num_steps and LAYERS > 4
