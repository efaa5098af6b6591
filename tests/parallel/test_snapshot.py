"""Snapshots appear whole or not at all, damage is noticed, and only the last ones are kept."""

from dataclasses import replace

import pytest
import torch

from longvid.plan import make_plan
from longvid.sampler import noise_of, sample
from longvid.schedule import Solver
from parallel import snapshot
from pipelines.methods import rolling
from tests.whole_clip import CHANNELS, FPS, HEIGHT, WIDTH, texts_of, tiny_dit, words

WHOLE = snapshot.part_of(range(2), range(2))


@pytest.fixture(scope="module")
def run():
    """A plan whose solver has a state, a model, and noise."""
    plan, dit = make_plan(replace(rolling(num_steps=3), solver=Solver.UNIPC), 20), tiny_dit()
    noise = noise_of(plan, 3, CHANNELS, HEIGHT, WIDTH)
    return plan, dit, noise


def make(run, folder, **options):
    plan, dit, noise = run
    leave = lambda point: snapshot.write(folder, point, WHOLE)  # noqa: E731
    return dict(sample(plan, dit, texts_of(dit, words(0), words(1)), noise, fps=FPS, reached=leave, **options))


def test_every_point_leads_to_the_same_end(run, tmp_path):
    plan, dit, noise = run
    whole = make(run, tmp_path)
    points = snapshot.found(tmp_path, WHOLE)
    assert points == [i + 1 for i, p in enumerate(plan.passes) if p.emits]
    for done in points:
        start = snapshot.read(tmp_path, done, WHOLE, torch.device("cpu"), (plan, noise))
        rest = dict(sample(plan, dit, texts_of(dit, words(0), words(1)), noise, fps=FPS, start=start))
        assert list(whole)[len(whole) - len(rest) :] == list(rest)
        assert all(torch.equal(rest[block], whole[block]) for block in rest)


def test_a_part_without_latents_reads_its_layers_alone(run, tmp_path):
    plan, _, _ = run
    make(run, tmp_path)
    done = snapshot.found(tmp_path, WHOLE)[2]
    point = snapshot.read(tmp_path, done, snapshot.part_of([1], [0]), torch.device("cpu"), None)
    assert point.queue is None and point.cache.entries
    assert all(lane == 0 and set(entry.features) == {1} for (_, lane), entry in point.cache.entries.items())


@pytest.mark.parametrize("name", ["layer-001-lane-0.safetensors", "queue.safetensors"])
@pytest.mark.parametrize("how", ["lacking", "cut", "flipped"])
def test_damage_is_noticed(run, tmp_path, name, how):
    make(run, tmp_path)
    points = snapshot.found(tmp_path, WHOLE)
    path = tmp_path / f"{points[3]:09d}" / name
    content = bytearray(path.read_bytes())
    if how == "lacking":
        path.unlink()
        assert snapshot.found(tmp_path, WHOLE) == points[:3] + points[4:]
        return
    content[-5] ^= 1
    path.write_bytes(content[:-40] if how == "cut" else content)
    with pytest.raises(snapshot.Damaged, match=name):
        snapshot.check(tmp_path, points[3], WHOLE)
    snapshot.check(tmp_path, points[2], WHOLE)


def test_the_last_two_are_kept(run, tmp_path):
    make(run, tmp_path)
    points = snapshot.found(tmp_path, WHOLE)
    (tmp_path / f"{points[-1]:09d}" / "queue.safetensors").unlink()
    snapshot.drop_old(tmp_path, WHOLE)
    assert snapshot.found(tmp_path, WHOLE) == points[-3:-1]
    assert len(list(tmp_path.iterdir())) == 3, "one that is not whole yet is somebody's work"
