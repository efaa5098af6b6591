"""Two processes train as one does, plain and with ZeRO; cut and resumed they go on as if they had not been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.optimizers import LoopConfig, Part, check_parts, share_at
from pipelines.zero import zero_config
from tests.pipelines.take_part import CASES, CUT, NUM_STEPS, RESUMED, STUDENTS, distil, train

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'longvid[train]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes found in every case."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
               "tests.pipelines.take_part", str(out)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds with AdamW, and with Muon."""
    out = tmp_path_factory.mktemp("one")
    return {name: train(out / name, optimizer=name) for name in ("adamw", "muon")}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_losses_of_one(found, alone, case):
    assert found["world_size"] == 2
    one = alone[CASES[case].get("optimizer", "adamw")]
    two = found[case]
    assert len(two["losses"]) == NUM_STEPS and len(set(one["losses"])) == NUM_STEPS
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert two["checked"] == pytest.approx(one["checked"], abs=1e-4) and len(two["checked"]) == 4
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-3)


@pytest.mark.parametrize("case", STUDENTS)
def test_two_processes_distil_the_student_of_one(found, tmp_path, case):
    one, two = distil(tmp_path), found[case]
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4) and len(set(one["losses"])) == 4
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)


@pytest.mark.parametrize("case", RESUMED)
def test_cut_and_resumed_they_go_on(found, case):
    cut, uncut = found[f"{case}-cut"], found[case]
    assert len(cut["losses"]) == 10 and cut["losses"] == uncut["losses"][CUT:]
    assert cut["weights"] == uncut["weights"] and cut["checked"] == uncut["checked"][2:]


def loop(**changes) -> LoopConfig:
    values = {"out": "out", "num_steps": 10, "batch_size": 8, "learning_rate": 1e-3, "optimizer": "adamw"}
    return LoopConfig(**{**values, **changes})


def test_parts_are_the_rows_of_the_whole_and_a_batch_must_split():
    rows = list(range(12))
    assert sum((Part(index=i, count=3).of(rows) for i in range(3)), []) == rows
    check_parts(8, 2, 2)
    with pytest.raises(ValueError, match="batch_size=6 .* 2 processes x 2 accumulation steps; try 8"):
        check_parts(6, 2, 2)


def test_a_deepspeed_file_must_say_what_the_flags_say(tmp_path):
    def told(content, **changes):
        (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return zero_config(loop(deepspeed=str(tmp_path / "ds.json"), **changes), 2, dtype="float32")

    file = {"train_batch_size": "auto", "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}, "wall": True}
    assert told(file) == {**file, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 4,
                          "gradient_accumulation_steps": 1}  # fmt: skip
    assert zero_config(loop(deepspeed="zero3"), 2, dtype="float32")["zero_optimization"] == {"stage": 3}
    for changes, says in (
        ({"train_batch_size": 16}, "train_batch_size=16, the flags make it 8; change --batch-size"),
        ({"gradient_accumulation_steps": 4}, "change --gradient-accumulation-steps"),
        ({"gradient_clipping": 0.5}, "change --max-grad-norm"),
        ({"optimizer": {"type": "Adam"}}, "optimizer, which is for --optimizer"),
        ({"scheduler": {}}, "which is for --lr-scheduler"),
        ({"zero_optimization": {"stage": 0}}, "stage=0, which must be 1, 2 or 3"),
        ({"fp16": {"enabled": True}}, "use --dtype bfloat16"),
        ({"bf16": {"enabled": True}}, "dtype=float32; use --dtype bfloat16"),
    ):
        with pytest.raises(ValueError, match=says):
            told({**file, **changes})
    for content, says in (("{", "not valid JSON"), ("[]", "a JSON list, which must be an object")):
        with pytest.raises(ValueError, match=says):
            told(content)
    with pytest.raises(ValueError, match="Muon needs whole matrices; use --optimizer adamw"):
        told(file, optimizer="muon")
    with pytest.raises(ValueError, match="neither a preset nor a file; use zero1, zero2, zero3"):
        zero_config(loop(deepspeed="zero4"), 2, dtype="float32")


def test_a_constant_schedule_warms_up_and_stays():
    assert [share_at(step, loop(schedule="constant", warmup_steps=4)) for step in (0, 3, 4, 9)] == [0.25, 1, 1, 1]
