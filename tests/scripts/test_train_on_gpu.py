"""All parts of the training on a GPU, on a CPU and as small as can be: folders that `generate` takes."""

import json
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from pipelines import draw_films
from pipelines.configure import BASE

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
