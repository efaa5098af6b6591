"""Scale on paper: what the records say is what the simulator gives, and the page says what the records say."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCALING = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))


@pytest.fixture(scope="module")
def records():
    return [json.loads(line) for line in (ROOT / "bench/results/scaling/results.jsonl").read_text().splitlines()]


def test_the_table_and_the_pictures_are_those_of_the_records(records):
    folder = ROOT / "bench" / "results" / "scaling"
    assert (folder / "table.md").read_text().splitlines() == list(SCALING["table"](records))
    for name, svg in SCALING["charts"](records):
        assert (ROOT / "docs" / name).read_text() == svg


@pytest.mark.parametrize("size", ["480p", "720p"])
def test_eight_gpus_are_as_fast_as_was_asked(records, size):
    """The simulator's own answer now, for the layout that was best: at least 7.6 times one GPU of the same engine."""
    of = {"model": "14B", "size": size, "link": "100 Gb/s", "layout": "best", "gpus": 8}
    found = next(r for r in records if all(r[key] == value for key, value in of.items()))
    plan = SCALING["make_plan"](SCALING["dualparal"](num_steps=50), SCALING["num_latents_of"](SCALING["FRAMES"]))
    case = SCALING["Case"]("14B", size, SCALING["LINKS"][-1], plan)
    grid = SCALING["Grid"](num_stages=found["stages"], num_bands=found["sequence"], num_lanes=found["lanes"])
    now = case.run(grid)
    assert {key: found[key] for key in now} == pytest.approx(now)
    assert found["speed_up"] >= 7.6 and found["speed_up"] == pytest.approx(found["one_gpu_s"] / found["makespan_s"])


def test_the_page_says_what_the_table_says():
    page, table = ((ROOT / name).read_text() for name in ("docs/scaling.md", "bench/results/scaling/table.md"))
    rows = re.findall(
        r"^\| (14B|1\.3B), (\d+p) \| ([\d,]+) s \| ([\d.]+) times .*?\| ([\d.]+) times", page, re.MULTILINE
    )
    assert len(rows) == 4
    for model, size, one, best, peers in rows:
        part = table[table.index(f"{model}, {size}, ") :]
        assert f"{one} s on one GPU" in part.splitlines()[0]
        assert re.search(rf"\| 100 Gb/s \| {best} .*?\| {peers} ", part)
