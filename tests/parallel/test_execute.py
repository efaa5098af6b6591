"""N processes make the video that one makes, to the bit, and send nothing but latents and hidden states."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from longvid.sampler import noise_of, sample
from parallel import snapshot
from parallel.execute import feeding_order
from tests.parallel.cases import LAYERS, cases, middle, whole_dit
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
        name: run_alone(name, reached=partial(snapshot.write, snapshots / name, layers=range(LAYERS))) for name in CASES
    }


@pytest.fixture(scope="module", params=[2, 3, 4])
def group(request, tmp_path_factory, alone, snapshots):
    """What each process of a group left, and their folder."""
    out = tmp_path_factory.mktemp(f"stages-{request.param}")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}",
           "-m", "tests.parallel.cases", str(out), str(snapshots)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(out / f"{stage}.pt") for stage in range(request.param)], out


@pytest.fixture(scope="module")
def together(group):
    """What each process of a group left."""
    return group[0]


def resumed(name, folder):
    """What one process makes of a case from the midst of a run on."""
    case, done = CASES[name], middle(folder)
    noise = noise_of(case.plan, 7, CHANNELS, HEIGHT, WIDTH)
    start = snapshot.read(folder, done, range(LAYERS), torch.device("cpu"), (case.plan, noise))
    return run_alone(name, start=start)


def tail_of(whole, rest, plan, folder):
    """Hold the rest of a run to the whole, from the snapshot in the middle on."""
    left = {block for p in plan.passes[: middle(folder)] for block in p.emits}
    assert list(rest) == [block for block in whole if block not in left]
    return all(torch.equal(rest[block], whole[block]) for block in rest)


def test_the_video_is_that_of_one_process_to_the_bit(alone, together):
    for name in CASES:
        assert not any(part[name]["blocks"] for part in together[:-1]), "only the last stage has latents"
        made = together[-1][name]["blocks"]
        assert list(made) == list(alone[name]), name
        assert all(torch.equal(made[block], alone[name][block]) for block in made), name


def test_only_latents_and_hidden_states_are_sent(together):
    width = whole_dit().config.dim
    for name, case in CASES.items():
        latents = sum(p.num_latents for p in case.plan.passes)
        hidden = 4 * latents * (HEIGHT // 2) * (WIDTH // 2) * width
        assert [part[name]["bytes"] for part in together[:-1]] == [hidden] * (len(together) - 1)
        assert together[-1][name]["bytes"] == 4 * latents * CHANNELS * HEIGHT * WIDTH


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


def test_a_run_goes_on_from_a_snapshot_on_another_number_of_processes(alone, group, snapshots):
    made, out = group
    for name, case in CASES.items():
        assert tail_of(alone[name], made[-1][name]["rest"], case.plan, snapshots / name), name
        folder = out / "snapshots" / name
        assert snapshot.found(folder, LAYERS) == snapshot.found(snapshots / name, LAYERS)
        assert tail_of(alone[name], resumed(name, folder), case.plan, folder), name
