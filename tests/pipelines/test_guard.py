"""The guard: counts are those of the baseline in the tree, and a change of any is said.

If this fails and the change is meant, `longvid bench guard --update` makes the counts of now the baseline.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from pipelines.counting import counted
from pipelines.guard import BASELINE, GRIDS, METHODS, differences


def test_counts_are_those_of_the_baseline():
    """In a process of its own: under pytest calls are checked, which holds tensors for longer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-m", "pipelines.cli", "bench", "guard"], env=environment, text=True,
                         capture_output=True, cwd=BASELINE.parents[1], timeout=300, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "counts are those of guard.json" in ran.stdout


def test_the_baseline_has_every_method_on_every_layout():
    before = json.loads(BASELINE.read_text())
    runs = before["counts"]["runs"]
    assert before["command"] == "longvid bench guard --update"
    assert len(runs) == len(METHODS) * (1 + 2 * len(GRIDS)) and len(before["counts"]["plans"]) == len(METHODS)
    for method in METHODS:
        first, second = (runs[f"{method} on two as stages, process {rank}"] for rank in range(2))
        assert first["bytes_to_process_1"] and second["bytes_to_process_0"] and not first["bytes_exchanged"]
        assert all(runs[f"{method} on two as sequence, process {rank}"]["bytes_exchanged"] for rank in range(2))
        assert runs[f"{method} on one process"]["peak_tensor_bytes"]


def test_each_change_is_a_line():
    before = json.loads(BASELINE.read_text())
    now = json.loads(BASELINE.read_text())
    assert not list(differences(before, now))
    now["counts"]["plans"]["rolling"]["passes"] += 1
    del now["counts"]["runs"]["rolling on one process"]["operations"]
    lines = list(differences(before, now))
    assert len(lines) == 2 and lines[0].startswith("plans: rolling: passes: ") and lines[1].endswith("not counted now")
    now["torch"] = "another"
    assert len(list(differences(before, now))) == 1, "what torch does is its version's"


def test_operations_storages_and_waits_are_counted():
    weight = torch.ones(8, 8)
    with counted() as found:
        x = weight @ weight  # 256 bytes
        y = x + 1  # 256 more: both live
        z = x.view(64)  # no storage of its own
        del x, z
        if y.sum() > 3:  # sum, comparison; the host waits
            y.add_(1)
        del y
    assert found["peak_tensor_bytes"] == 512 and found["waits_for_device"] == 1 and found["copies_to_device"] == 0
    assert found["allocations"] == 4 and found["operations"] == 7  # mm, add, view, sum, gt, the answer, add_


@pytest.mark.parametrize("words, said", [
    (["guard", "x"], "guard takes no folders"),
    (["guard", "--baseline", "none.json"], "none.json is not there; write it: longvid bench guard --update"),
    (["--out", "x", "--update"], "--update and --baseline are for the guard"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(longvid, here, words, said):
    ran = longvid("bench", *words, model=None)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1 and not list(here.iterdir())
