"""A run that is cut goes on to the same video, whenever it was cut and on however many processes."""

import json
import os
import signal
import subprocess
import time
from contextlib import nullcontext

import pytest
from safetensors.torch import load_file, save_file

from pipelines.configure import configure
from pipelines.run_folder import check_same, depends_on
from tests.pipelines.conftest import load, read_json, save_film
from tests.pipelines.test_spread import ENVIRONMENT, command, picture, run, workers_of

FRAMES = 201
FEW = ["--num-frames", FRAMES, "--num-steps", 4, "--snapshot-every", 2, "--threads", 1]


@pytest.fixture(scope="module")
def uncut(model, tmp_path_factory):
    """The run that nobody cut: its hash and frames, by what it starts from."""
    folder, found = tmp_path_factory.mktemp("uncut"), {}

    def make(name, *words):
        if name not in found:
            ran = run(model, *words, *FEW, "--output", folder / f"{name}.mp4")
            assert ran.returncode == 0, ran.stderr
            assert not (folder / f"{name}.run").exists(), "nothing is left of a run that came to its end"
            found[name] = read_json(folder / f"{name}.json")["metrics"]["latent_sha256"], load(folder / f"{name}.mp4")
        return found[name]

    return make


def cut(model, here, *words, num=1, blocks=5, number=signal.SIGKILL):
    """Start a run on `num` processes and end it, or one of them, once so many blocks are out. Its standard error."""
    words = command(model, *words, *FEW, "--nproc", num, "--output", here / "v.mp4")
    child = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    clean, deadline = here / "v.run" / "clean", time.monotonic() + 90
    while not (clean / f"{blocks:06d}.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers_of(child.pid)[blocks % num] if num > 1 else child.pid, number)
    err = child.communicate(timeout=60)[1]
    assert child.returncode not in (0, 2), err
    return err


def resume(here, *words):
    ran = subprocess.run(command(None, "generate", "--resume", here / "v.run", *words)[:-4], env=ENVIRONMENT,
                         capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    return ran


def hold(here, ran, expected):
    """The video of `here` is the one expected, and nothing else is left of the run."""
    assert ran.returncode == 0, ran.stderr
    sha, frames = expected
    assert read_json(here / "v.json")["metrics"]["latent_sha256"] == sha
    assert read_json(here / "v.json")["ended"] == "complete"
    assert (load(here / "v.mp4") == frames).all() and not (here / "v.run").exists()


@pytest.mark.parametrize("num, blocks, then", [(1, 1, 2), (2, 9, 1), (2, 12, 2)])
def test_a_killed_run_goes_on_to_the_same_video(model, here, uncut, num, blocks, then):
    said = cut(model, here, "generate", num=num, blocks=blocks)
    if num > 1:
        assert "go on with: longvid generate --resume" in said and said.count("Traceback") == 0
        assert len(load(here / "v.mp4")) >= 1
    hold(here, resume(here, "--nproc", then), uncut("text", "generate"))


def test_lanes_on_processes_of_their_own_go_on_on_one(model, here, uncut):
    cut(model, here, "generate", "--cfg-parallel", num=2, blocks=6)
    hold(here, resume(here, "--nproc", 1), uncut("text", "generate"))


@pytest.mark.parametrize("layout, then", [("--cfg-parallel", []), ("--no-cfg-parallel", ["--nproc", 1])])
def test_a_run_whose_decoder_is_cut_goes_on(model, here, uncut, layout, then):
    """What had left is decoded again by both parts, or by one."""
    cut(model, here, "generate", layout, "--parallel-vae", num=2, blocks=9)
    hold(here, resume(here, *then), uncut("text", "generate"))


def test_a_run_whose_processes_share_heads_goes_on_on_stages(model, here, tmp_path):
    """Features of some heads each, as they were kept, are joined again; the video is the same but for rounding."""
    ran = run(model, "generate", *FEW, "--output", tmp_path / "a.mp4", "--save-latents", tmp_path / "a")
    assert ran.returncode == 0, ran.stderr
    cut(model, here, "generate", "--sequence-parallel", "2", "--save-latents", here / "l", num=2, blocks=9)
    assert list((here / "v.run" / "snapshots").glob("*/layer-001-lane-1-band-1-of-2.safetensors"))
    ran = resume(here, "--nproc", 2)
    assert ran.returncode == 0, ran.stderr
    one, other = load_file(tmp_path / "a")["latents"], load_file(here / "l")["latents"]
    assert one.shape == other.shape and (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("kind", ["image", "extend"])
def test_what_a_video_starts_from_is_kept_in_mind(model, here, uncut, tmp_path_factory, kind):
    given = tmp_path_factory.mktemp("given")
    if kind == "image":
        words = ["generate", "--image", picture(given / "first.png")]
    else:
        words = ["extend", "--video", save_film(given / "given.mp4", 9)]
    cut(model, here, *words, blocks=7)
    hold(here, resume(here), uncut(kind, *words))


def test_an_interrupted_run_says_how_to_go_on(model, here, uncut):
    said = cut(model, here, "generate", number=signal.SIGINT)
    assert f"go on with: longvid generate --resume {here / 'v.run'}" in said
    hold(here, resume(here), uncut("text", "generate"))


@pytest.mark.parametrize("name", ["layer-001-lane-1.safetensors", "queue.safetensors"])
def test_a_damaged_snapshot_is_said_and_the_one_before_is_used(model, here, uncut, name):
    cut(model, here, "generate", blocks=9)
    files = {place: len(list(place.glob("*.safetensors"))) for place in (here / "v.run" / "snapshots").iterdir()}
    newest = max(place for place, count in files.items() if count == max(files.values())) / name  # the last whole one
    newest.write_bytes(newest.read_bytes()[:-9])
    ran = resume(here)
    assert str(newest) in ran.stderr and "going on from the snapshot before" in ran.stderr
    hold(here, ran, uncut("text", "generate"))


def test_the_launcher_goes_on_by_itself(model, here, uncut):
    words = command(model, "generate", *FEW, "--nproc", 2, "--max-restarts", 1, "--output", here / "v.mp4")
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (here / "v.run" / "clean" / "000007.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(workers_of(child.pid)[0], signal.SIGKILL)
    err = child.communicate(timeout=120)[1]
    hold(here, subprocess.CompletedProcess([], child.returncode, "", err), uncut("text", "generate"))


def test_wrong_requests(model, own_model, here, longvid):
    cut(own_model, here, "generate", blocks=3)
    before = sorted(path for path in here.rglob("*"))
    again = longvid("generate", "--output", here / "w.mp4", "--run-dir", here / "v.run")
    assert again.code == 2 and "holds a run that was cut" in again.err and "--resume" in again.err
    assert sorted(path for path in here.rglob("*")) == before
    none = longvid("generate", "--resume", here / "nothing", model=None)
    assert none.code == 2 and "holds no run to go on with" in none.err
    odd = longvid("generate", "--output", here / "w.mp4", "--run-dir", here)
    assert odd.code == 2 and "is not a run's folder" in odd.err
    few = longvid("generate", "--output", here / "w.mp4", "--snapshot-every", -1)
    assert few.code == 2 and "snapshot_every=-1 must be at least 0" in few.err

    weights = own_model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: x + 1 for name, x in tensors.items()}, weights)
    other = resume(here)
    assert other.returncode == 2 and "checkpoint=" in other.stderr and "begin anew" in other.stderr
    assert sorted(path for path in here.rglob("*")) == before
    assert json.loads((here / "v.run" / "run.json").read_text())["command"][0] == "generate"


def test_a_run_begun_before_there_was_a_choice_goes_on(model, tmp_path):
    run = configure(model=model, num_frames=9, num_steps=2, seed=1)
    before = depends_on(run)
    for changed, message in (({}, None), ({"seed": 2}, "made with seed=2, now it is 1")):
        stored = {name: value for name, value in before.items() if name != "compile"} | changed
        (tmp_path / "run.json").write_text(json.dumps({"depends_on": stored}))
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            check_same(tmp_path, run)
