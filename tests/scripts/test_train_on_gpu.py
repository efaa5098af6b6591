"""All parts of the training on a GPU, on a CPU and as small as can be: folders that `generate` takes."""

import json
import re
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from pipelines import draw_films
from pipelines.configure import BASE
from pipelines.graph_training import GraphTraining

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_on_gpu.py"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_on_gpu.py", *map(str, words)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_all_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw_films, "AT_ONCE", 2)
    words = (tmp_path, "--device", "cpu", "--workers", 1, "--films", 4, 4, 4, "--decoded", 2, "--scale", 0.02,
             "--seconds", 1000, 0, 0, 0, "--graded", 0.1)  # fmt: skip
    run(monkeypatch, *words)
    said = capsys.readouterr().out
    assert len(re.findall(r"\ntiny(-fast)?: step 2 of 2, loss 0.\d+, grade [01].\d+", said)) == 2
    assert all(f"{part}: step 2 of 2" in said for part in ("decoder", "tiny", "tiny-fast"))
    before, tiny, fast = (open_folder(path) for path in (BASE, tmp_path / "tiny", tmp_path / "tiny-fast"))
    for old, new in ((before, tiny), (tiny, fast)):
        a, b = (load_dit(folder, torch.float32).state_dict() for folder in (old, new))
        ungraded = torch.load(tmp_path / f"{new.path.name}-ungraded.pt", weights_only=True)
        for one, other in ((a, ungraded), (ungraded, b)):
            assert any(not torch.equal(one[name].bfloat16(), other[name].bfloat16()) for name in a)
    old, new = (load_vae(folder, torch.float32).state_dict() for folder in (before, tiny))
    changed = {name.partition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder"} or changed == {"decoder", "post_quant_conv"}
    defaults = json.loads((tmp_path / "tiny-fast" / "longvid.json").read_text())
    assert defaults["method"] == "rolling-fast" and defaults["changes"] == {
        "first_steps": 24,
        "blocks_per_pass": 2,
        "retire": False,
    }
    run(monkeypatch, *words)
    assert not capsys.readouterr().out  # nothing is done twice
    made = subprocess.run([sys.executable, "-m", "pipelines.cli", "generate", "--model", tmp_path / "tiny-fast",
                           "--seconds", "0.3", "--output", tmp_path / "a.mp4", "--quiet"], check=False)  # fmt: skip
    assert made.returncode == 0 and (tmp_path / "a.mp4").stat().st_size > 1000


def test_a_new_model_begins_with_pictures_and_openings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw_films, "AT_ONCE", 2)
    words = (tmp_path, "--device", "cpu", "--workers", 1, "--films", 4, 4, 4, "--scale", 0.02, "--seconds", 1000, 0, 0,
             0, "--graded", 0, "--new", 0.001)  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda seconds: run(monkeypatch, *words, "--only", "films"))
    run(monkeypatch, *words, "--only", "tiny")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "waiting for pictures.pt" and said[1:4] == [
        f"{x}: 4 films" for x in ("pictures", "openings", "long")
    ]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said[4:]]
    assert len(losses) == 2 and all(0.5 < loss < 3 for loss in losses)  # of a model that knows nothing, in both parts
    old, new = (load_dit(open_folder(path), torch.float32) for path in (BASE, tmp_path / "tiny"))
    assert new.blocks["7"].scale_shift_table.abs().max() < 0.1 < old.blocks["7"].scale_shift_table.abs().max()


def test_a_gpu_whose_gradients_are_wrong_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_films, "AT_ONCE", 2)
    monkeypatch.setattr(GraphTraining, "agreement", lambda training: 0.3)
    words = (
        tmp_path,
        "--device",
        "cpu",
        "--workers",
        1,
        "--films",
        4,
        4,
        4,
        "--scale",
        0.02,
        "--seconds",
        1000,
        0,
        0,
        0,
    )
    with pytest.raises(SystemExit, match="tiny: the gradients.*cosine 0.30.*another version of torch"):
        run(monkeypatch, *words, "--only", "films", "tiny")
    assert not (tmp_path / "tiny").exists()


def test_films_that_nobody_makes_are_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="pictures.pt is not there after 600 s.*--only films"):
        run(monkeypatch, tmp_path, "--device", "cpu", "--only", "tiny")


def test_what_a_student_has_learned_is_added():
    add_lesson = runpy.run_path(str(SCRIPT))["add_lesson"]
    tiny, fast = (load_dit(open_folder(BASE.with_name(name)), torch.float32) for name in ("tiny", "tiny-fast"))
    options = Namespace(student=BASE.with_name("tiny-fast"), model=BASE, device="cpu")
    add_lesson(tiny, options)
    for name, p in tiny.named_parameters():
        assert torch.allclose(p, fast.get_parameter(name), atol=1e-6)


@pytest.mark.parametrize("last", (0.9, float("nan")))
def test_a_loss_that_runs_away_ends_it(last, capsys):
    report = runpy.run_path(str(SCRIPT))["report"]
    records = [{"step": i, "of": 9, "loss": loss, "seconds": 1.0} for i, loss in enumerate((0.4, 0.5, last, 0.3))]
    report("tiny", iter(records[:2]), None)
    with pytest.raises(SystemExit, match="from 0.40 to .*uncompiled: 0.25.*nothing of this part"):
        report("tiny", iter(records), lambda: torch.tensor(0.25))
    assert "step 3" not in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path / "new")
    assert "train_tiny.sh" in capsys.readouterr().err and not (tmp_path / "new").exists()
