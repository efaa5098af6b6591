"""`longvid bench`: a sweep leaves records and a table; a comparison gives a verdict only where there is one."""

import copy
import json

import pytest

from pipelines.bench import cases
from pipelines.bench_table import FIGURES, compare, read


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over one and two processes."""
    import subprocess
    import sys

    from tests.pipelines.test_spread import ENVIRONMENT

    out = tmp_path_factory.mktemp("bench") / "out"
    words = ["bench", "--out", out, "--shape", "micro@16x24", "--nproc", "1,2", "--layout", "stages", "--repeats", 2,
             "--threads", 1, "--no-warm-up", "--generate", "--num-frames 29 --num-steps 2 --seed 4"]  # fmt: skip
    ran = subprocess.run([sys.executable, "-m", "pipelines.cli", *map(str, words)], env=ENVIRONMENT, text=True,
                         capture_output=True, timeout=200, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return out, ran


def test_a_sweep_interleaves_and_keeps_everything(swept):
    out, ran = swept
    records = read(out)
    assert [(r["case"]["nproc"], r["repeat"]) for r in records] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert len({r["metrics"]["latent_sha256"] for r in records}) == 1
    for record in records:
        for name, of in FIGURES.items():
            assert of(record) >= 0, name
        assert str(out) not in json.dumps(record), "a record tells nothing of the machine's folders"
        assert record["process_s"] > record["metrics"]["wall_s"] > record["metrics"]["first_frame_s"] > 0
        assert (
            record["hardware"]["cores"]
            and record["versions"]["torch"]
            and record["command"][:2] == ["longvid", "generate"]
        )
    lines = (out / "table.md").read_text().splitlines()
    assert ran.stdout.splitlines() == lines
    assert lines[0].startswith("`longvid bench --out ") and records[0]["date"] in lines[0]
    columns = [cell.strip() for cell in lines[4].split("|")]
    rows = [dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines[6:8]]
    assert lines[8] == "" and len(lines) == 13 and " to 1 |" in lines[11] and " to 0 |" in lines[12]
    assert len(rows) == 2 and rows[0]["speed-up"] == rows[0]["efficiency"] == "1.00"
    assert float(rows[1]["efficiency"]) == pytest.approx(float(rows[1]["speed-up"]) / 2, abs=0.01)
    name = records[1]["case"]["name"]
    assert all((out / f"{name}{end}").exists() for end in (".mp4", ".json", ".png", ".trace.json"))


def changed(records, factors):
    """The records, their figures multiplied by one factor each."""
    found = copy.deepcopy(records)
    for record, factor in zip(found, factors, strict=True):
        record["process_s"] *= factor
        record["metrics"]["wall_s"] *= factor
    return found


def verdicts(before, after):
    return [line.rpartition(": ")[2] for line in compare(before, after) if line.startswith("  command s")]


def test_a_verdict_needs_more_than_noise(swept):
    before = read(swept[0])
    for record in before:
        record["process_s"] = record["metrics"]["wall_s"] = 10.0
    assert verdicts(before, before) == ["same", "same"]
    assert verdicts(before, changed(before, [1.03] * 4)) == ["same", "same"], "less than 5 %"
    assert verdicts(before, changed(before, [1.2] * 4)) == ["slower", "slower"]
    assert verdicts(before, changed(before, [0.8] * 4)) == ["faster", "faster"]
    assert verdicts(before, changed(before, [0.8, 1, 1.6, 1])) == ["same", "same"], "the spread is larger"
    small = [{**record, "process_s": 0.1} for record in before]
    assert verdicts(small, changed(small, [1.5] * 4)) == ["same", "same"], "50 ms of a command"


def test_other_latents_are_said(swept):
    before = read(swept[0])
    after = copy.deepcopy(before)
    after[0]["metrics"]["latent_sha256"] = "0"
    said = [line for line in compare(before, after) if not line.startswith("  ")]
    assert "OTHER LATENTS" in said[0] and "the same latents" in said[1]


@pytest.mark.parametrize("words, said", [
    ([], "longvid bench --out DIR"),
    (["--out", "x", "--nproc", "0"], "nproc=0 must be"),
    (["--out", "x", "--nproc", "two"], "nproc=two must be"),
    (["--out", "x", "--shape", "small,huge"], "shape 'huge' is unknown; use wan-1.3b"),
    (["--out", "x", "--layout", "rows"], "layout 'rows' is unknown"),
    (["--out", "x", "--repeats", "0"], "repeats=0 must be"),
    (["--out", "x", "--nproc", "1,1"], "two cases are called"),
    (["compare", "x"], "compare takes two folders, not 1"),
    (["compare", "x", "y"], "x/results.jsonl is not there"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(longvid, here, words, said):
    ran = longvid("bench", *words, model=None)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1 and not list(here.iterdir())


def test_a_command_that_fails_is_named(longvid, here):
    ran = longvid("bench", "--out", "x", "--generate", "--num-frames 6", model=None)
    assert ran.code == 1 and "num_frames=6" in ran.err and "ended with 2" in ran.err and len(ran.err.splitlines()) == 1


def test_cases_are_all_combinations():
    found = cases(
        models=[None], methods=["rolling", "dualparal"], nprocs=[1, 2], layouts=["lanes", "stages"], threads=1, words=()
    )
    assert len(found) == 6 and json.dumps([case.command for case in found])
