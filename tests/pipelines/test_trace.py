"""A trace shows every pass that was planned, on the process that it was planned for."""

from collections import Counter

import pytest

from parallel.grid import Degrees
from pipelines.configure import configure
from pipelines.spread import grids_of, grids_that_fit
from tests.pipelines.conftest import read_json
from tests.pipelines.test_spread import run

FEW = ["generate", "--num-frames", 29, "--num-steps", 3, "--threads", 1]


@pytest.mark.parametrize(
    "words",
    [
        ["--nproc", 1],
        ["--nproc", 2, "--no-cfg-parallel"],
        ["--nproc", 2, "--cfg-parallel"],
        ["--nproc", 2, "--cfg-parallel", "--parallel-vae"],
    ],
    ids=["one", "stages", "lanes", "cut"],
)
def test_what_was_done_is_what_was_planned(model, here, words):
    ran = run(model, *FEW, *words, "--output", here / "v.mp4", "--trace", here / "t.json")
    assert ran.returncode == 0 and "planned" in ran.stderr, ran.stderr
    trace, num = read_json(here / "t.json"), words[1]
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    done, planned = ([e for e in events if e["pid"] == side] for side in (0, 1))
    for name in ("pass", "decode"):
        counts = [Counter((e["tid"], str(e["args"])) for e in side if e["name"] == name) for side in (done, planned)]
        assert counts[0] == counts[1] and len(counts[0]) >= 4, name
    summary = trace["otherData"]
    assert len(summary["measured_idle"]) == len(summary["planned_idle"]) == num
    assert all(0 <= idle < 1 for idle in summary["measured_idle"])
    last = max(e["ts"] + e["dur"] for e in done)
    assert min(e["ts"] for e in done) == 0 and summary["measured_makespan_s"] == pytest.approx(last / 1e6)
    spent = sum(e["dur"] for e in done if e["name"] in ("pass", "decode")) / 1e6
    assert spent / num * 0.99 < summary["planned_at_its_speed_s"] < 3 * spent, "no process works for longer than that"
    for rank in range(num):  # a process does one thing at a time
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in done if e["tid"] == rank)
        assert all(b[0] >= a[1] - 0.01 for a, b in zip(spans, spans[1:], strict=False))


def test_each_process_reads_its_layers_alone(model, here):
    read = {}
    for num in (1, 2):
        out = ["--output", here / f"{num}.mp4", "--metrics", here / f"m{num}.json"]
        ran = run(model, *FEW, "--nproc", num, "--no-cfg-parallel", "--no-parallel-vae", *out)
        assert ran.returncode == 0, ran.stderr
        read[num] = read_json(here / f"m{num}.json")["weight_bytes_read"]
    assert all(part < read[1][0] for part in read[2])
    both_have = sum(read[2]) - read[1][0]
    assert 0 < both_have < min(read[2]), "only the embedders of time and text are on both"


def test_a_model_that_is_too_large_for_the_gpu_is_refused(model):
    given = configure(model=model, num_frames=29, num_steps=3)
    grids = grids_of(2, given, Degrees())
    assert grids_that_fit(grids, given, given.plan(), 2**30) == grids
    with pytest.raises(ValueError, match=r"a process needs 0\.0 GiB \(weights .*use more processes"):
        grids_that_fit(grids, given, given.plan(), 1000)


def test_a_layout_that_is_too_large_for_the_gpu_is_not_chosen(model):
    """Stages share weights and features, lanes features alone: there is a size at which stages fit and lanes do not."""
    given = configure(model=model, num_frames=201, num_steps=16)
    grids = grids_of(2, given, Degrees(cuts_decoder=False))
    assert len(grids) == 2

    def fitting(available):
        try:
            return grids_that_fit(grids, given, given.plan(), available)
        except ValueError:
            return []

    found = [fitting(1024 * size) for size in range(10, 2000, 10)]
    assert [len(some) for some in found] == sorted(len(some) for some in found)
    assert [(grid.num_stages, grid.num_lanes) for grid in next(some for some in found if some)] == [(2, 1)]
    assert found[0] == [] and found[-1] == grids
