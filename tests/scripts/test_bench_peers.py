"""The comparison with diffusers: both are asked for the same, and the table says how they stand."""

import runpy
from pathlib import Path

import pytest

PEERS = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "bench_peers.py"))


def test_windows_are_those_that_diffusers_is_asked_for():
    options = PEERS["arguments"]().parse_args(["--seconds", "20", "--steps", "5"])
    windows, own = (PEERS["requested"](options, case) for case in (PEERS["WINDOWS"], PEERS["OWN"]))
    method = windows.method
    assert (method.window - 1, method.overlap - 1) == ((PEERS["WINDOW"] - 1) // 4, (PEERS["OVERLAP"] - 1) // 4)
    assert method.condition_level == PEERS["CONDITION"] / 1000
    assert own.method.first_steps == own.method.num_steps, "equal steps"
    for name in ("num_steps", "guidance_scale", "flow_shift"):
        assert getattr(method, name) == getattr(own.method, name)
    assert (windows.prompt, windows.num_frames, windows.seed) == (own.prompt, own.num_frames, own.seed)
    options.blocks_per_pass = 3
    together = [PEERS["requested"](options, PEERS[case]).method.blocks_per_pass for case in ("WINDOWS", "OWN")]
    assert together == [1, 3]
    assert {run.dtype for run in (windows, own)} == {run.vae_dtype for run in (windows, own)} == {"float32"}


def test_several_processes_have_the_threads_of_one():
    parse = PEERS["arguments"]().parse_args
    found = PEERS["together"](parse(["--also", "tiny-fast", "--nproc", "2", "--threads", "4"]))
    assert [(how.name, how.num, how.threads) for how in found] == \
        [("longvid, 2 processes", 2, 2), ("longvid, also, 2 processes", 2, 2)]  # fmt: skip
    found = PEERS["together"](parse(["--sequence-parallel", "2", "--threads", "1"]))
    assert [how.name for how in found] == ["longvid, 2 processes as stages", "longvid, 2 processes as sequence"]


def record(case, repeat, seconds, memory):
    drift = {name: {"slope_per_minute": 0.5} for name in PEERS["SLOPES"]}
    return {
        "case": case, "repeat": repeat, "date": "2026-01-01", "hardware": {"cpu": "a", "cores": 2},
        "versions": {"torch": "2", "diffusers": "0"}, "process_s": seconds, "denoise_s": seconds / 2, "vae_s": 1.0,
        "first_frame_s": 2.0, "peak_memory_mb": [memory],
        "video": {"drift": drift, "still_share": 0.0, "collapse": None, "adherence": None},
    }  # fmt: skip


def test_each_is_compared_with_diffusers():
    records = [record(case, repeat, seconds + repeat, memory) for repeat in range(3)
               for case, seconds, memory in ((PEERS["DIFFUSERS"], 29, 1000), (PEERS["OWN"], 9, 500))]  # fmt: skip
    lines = list(PEERS["table"](records, "the command"))
    assert lines[0].startswith("`the command`, 2026-01-01") and "medians of 3" in lines[0]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines[4:6]}
    assert rows["diffusers"][2] == "30 \u00b1 1" and rows["diffusers"][-3:-1] == ["1.00", "1.00"]
    assert rows["longvid"][2] == "10 \u00b1 1" and rows["longvid"][-3:-1] == ["3.00", "0.50"]
    assert len(lines) == 11 and lines[9].count("0.5 |") == 5


@pytest.mark.parametrize("words, said", [
    (["--repeats", "0"], "repeats=0 must be at least 1"),
    (["--sequence-parallel", "2"], "sequence_parallel=2 must divide the model's 3 heads"),
    (["--nproc", "17"], "nproc=17 makes 17 stages"),
    (["--steps", "0"], "num_steps=0 must be"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_runs(monkeypatch, tmp_path, words, said):
    monkeypatch.setattr("sys.argv", ["bench_peers.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(SystemExit, match=said):
        PEERS["main"]()
    assert not (tmp_path / "out").exists()
