"""The command: quick to answer, quiet on standard output, and its plans are those that are carried out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longvid.contact_sheet import write_png
from longvid.plan import num_latents_of, rolling_steps
from pipelines import cli
from pipelines.configure import configure
from pipelines.methods import METHODS
from tests.pipelines.conftest import FPS, HEIGHT, WIDTH, film, load, read_json

ROOT = Path(__file__).parents[2]
QUICK = ("--num-inference-steps", 2)


def python(*words, **options):
    """Run Python outside of this process; its CPU seconds are measured as it ends."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, **options)


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["generate", "--frobnicate"]])
def test_help_and_wrong_flags_answer_at_once(words):
    """CPU time is what a busy machine cannot stretch."""
    program = f"""
import sys, time
from pipelines.cli import main
try:
    main({words})
except SystemExit as stop:
    heavy = {{"torch", "numpy", "transformers", "decord", "longvid.media"}} & set(sys.modules)
    assert not heavy, heavy
    sys.stderr.write(f"{{time.process_time()}}")
    raise
"""
    done = python("-c", program)
    assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert float(done.stderr.splitlines()[-1]) < 0.5
    assert ("usage: longvid" in done.stdout) == ("--help" in words)


def test_help_names_every_flag_and_says_what_it_is(longvid):
    commands = next(action for action in cli.parser()._actions if action.dest == "command").choices
    assert (
        set(commands)
        == {"generate", "extend", "plan", "bench", "train", "data", "lora", "evaluate"}
        == set(cli.COMMANDS)
    )
    for name, command in commands.items():
        answer = longvid(name, "--help", model=None)
        assert (answer.code, answer.err) == (0, "")
        assert all(flag in answer.out for flag in command._option_string_actions)


def test_standard_output_is_the_name_of_the_video(longvid, here):
    answer = longvid("generate", *QUICK, "--seed", 5)
    assert (answer.code, answer.out) == (0, "longvid.mp4\n")
    configuration, method, *_, progress, digest = answer.err.splitlines()
    assert all(word in configuration for word in ("prompt=a red ball", "num_frames=17", "seed=5", "passes="))
    assert all(word in method for word in ("name=rolling", "num_steps=2", "lag=1"))
    assert progress.startswith("17/17 frames (2.1 s)") and "frames/s" in progress
    assert digest == f"latent_sha256 {read_json(here / 'longvid.json')['metrics']['latent_sha256']}"


def test_names_that_are_free_and_quiet(longvid, here):
    (here / "longvid-2.json").touch()
    outputs = [longvid("generate", *QUICK, "--num-frames", 1, "--quiet") for _ in range(3)]
    assert [answer.out for answer in outputs] == ["longvid.mp4\n", "longvid-3.mp4\n", "longvid-4.mp4\n"]
    assert all(answer.err == "" for answer in outputs)
    assert len(load(here / "longvid-4.mp4")) == 1


def test_underscores_in_flags_and_none_in_values(longvid, here):
    words = ["--num_frames=5", "--num_inference_steps", 2, "--save_latents", "my_latents", "--negative_prompt=a_b"]
    assert longvid("generate", *words, "--quiet").code == 0
    assert (here / "my_latents").exists()
    assert read_json(here / "longvid.json")["config"]["negative_prompt"] == "a_b"


def test_a_dry_run_makes_nothing(longvid, here):
    answer = longvid("generate", "--seconds", 2, "--dry-run", "--output", "a.mp4", "--contact-sheet", "b.png")
    described = json.loads(answer.out)
    assert (answer.code, answer.err) == (0, "") and not list(here.iterdir())
    assert (described["num_frames"], described["fps"], described["output"]) == (17, FPS, "a.mp4")
    assert described["method"]["name"] == "rolling" and isinstance(described["seed"], int)
    assert described["passes"] > 0 and described["longest_context_in_latents"] > 0


def test_seconds_are_rounded_up_to_whole_latents(model):
    """The first frame is at time 0, so n seconds end with frame n fps."""
    for seconds, num_frames in ((0.01, 5), (0.5, 5), (0.51, 9), (1, 9), (60, 481)):
        assert configure(model=model, seconds=seconds).num_frames == num_frames


def test_what_is_left_out_is_the_models(model, own_model):
    run = configure(model=model)
    assert (run.method.name, run.height, run.width, run.fps, run.num_frames) == ("rolling", HEIGHT, WIDTH, FPS, 17)
    assert configure(model=model, seed=4, num_frames=5).seed == 4
    assert configure(model=model).seed != configure(model=model).seed
    (own_model / "longvid.json").write_text('{"height": 64}')
    run = configure(model=own_model, prompt="a fox")
    assert (run.method.name, run.height, run.width, run.fps, run.num_frames) == ("skyreels-sync", 64, 960, 24, 97)


# Plans


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_plans_are_printed(longvid, here, name, image):
    write_png(here / "a.png", film(1)[0])
    words = ["--method", name, "--num-frames", 33, "--num-inference-steps", 4, *(["--image", "a.png"] if image else [])]
    text, answer = longvid("plan", *words), longvid("plan", *words, "--json")
    assert (text.code, text.err, answer.code, answer.err) == (0, "", 0, "")
    plan = json.loads(answer.out)
    sizes, ready = plan["block_sizes"], plan["num_ready"]
    assert (plan["num_frames"], plan["num_latents"], sum(sizes)) == (33, num_latents_of(33), num_latents_of(33))
    assert ready == image and (sizes[0] == 1 or not image)
    lags = plan["method"]["lag"], ready, plan["method"]["first_steps"]
    assert plan["matrix"] == [list(row) for row in rolling_steps(len(sizes), 4, *lags)]
    assert len(plan["levels"]) == len(plan["timesteps"]) == 5
    assert [block for p in plan["passes"] for block in p["emits"]] == list(range(ready, len(sizes)))

    lines = text.out.splitlines()
    is_first_alone = name in ("rolling", "rolling-fast") and not image
    assert ("(the first block 4, before another begins)" in lines[0]) == is_first_alone
    assert plan["first_timesteps"] == plan["timesteps"]
    assert lines[0].startswith(f"method {name}: ") and "33 frames = 9 latents" in lines[1]
    rows = [list(map(int, line.split("|")[1].split())) for line in lines if "|" in line]
    assert rows == plan["matrix"] and f"matrix: {len(rows)} rows" in text.out
    assert sum(line.startswith("tick ") for line in lines) == len(plan["passes"])


def test_other_steps_of_the_first_block_are_planned_and_printed(longvid):
    lines = longvid("plan", "--method", "rolling-fast", "--first-steps", 6, "--num-frames", 25).out.splitlines()
    assert "4 steps (the first block 6, before another begins), lag 1" in lines[0]
    assert len(next(line for line in lines if line.startswith("timesteps of the first block 1000 ")).split()) == 5 + 7


def test_a_plan_needs_no_prompt_and_makes_no_file(longvid, here, own_model):
    (own_model / "longvid.json").unlink()
    assert longvid("plan", "--num-frames", 5, model=own_model).code == 0
    assert not list(here.iterdir())


def test_a_reader_that_has_enough_ends_a_plan_without_a_word(model):
    words = [sys.executable, "-m", "pipelines.cli", "plan", "--model", str(model), "--num-frames", "1001", *QUICK]
    command = " ".join(map(str, words)) + " | head -1; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


# Outside of this process


def test_a_wrong_request_outside_of_this_process(model, tmp_path):
    done = python("-m", "pipelines.cli", "generate", "--model", model, "--num-frames", 18, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr == "longvid generate: num_frames=18 must be 4n + 1; try 17 or 21\n"
    assert not list(tmp_path.iterdir())
