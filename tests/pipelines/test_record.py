"""What a run leaves behind: video, sidecar, metrics, contact sheet; and what is left when it is cut short."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from longvid.checkpoints.safetensor_files import fingerprint
from longvid.media import VideoWriter, probe_video
from pipelines.configure import configure
from pipelines.record import Meter, Outputs, record
from tests.pipelines.conftest import FPS, HEIGHT, WIDTH, film, load, read_json

ROOT = Path(__file__).parents[2]
QUICK = ("--num-inference-steps", 2)
LONG = 20_001
"""Frames that no run gets to in the time of a test."""
METRICS = {
    "frames", "seconds_of_video", "wall_s", "first_frame_s", "fps", "passes", "idle_fraction", "peak_memory_mb",
    "block_p50_s", "block_p95_s", "steady_fps", "bytes_sent", "bytes_exchanged", "bytes_to", "exchange_s",
    "weight_bytes_read", "layout", "latent_sha256", "config",
}  # fmt: skip


def test_everything_that_can_be_asked_for(longvid, here, model):
    words = ["--output", "a.mov", "--metrics", "m.json", "--contact-sheet", "sheet.png", "--save-latents", "l.st"]
    answer = longvid("generate", *QUICK, "--seed", 3, *words)
    assert (answer.code, answer.out) == (0, "a.mov\n")
    assert {path.name for path in here.iterdir()} == {"a.mov", "a.json", "m.json", "sheet.png", "l.st"}
    assert load(here / "a.mov").shape == (17, HEIGHT, WIDTH, 3)
    assert probe_video(here / "a.mov").fps == FPS

    run = configure(model=model, num_steps=2, seed=3)
    metrics, written = read_json(here / "m.json"), read_json(here / "a.json")
    assert set(metrics) == METRICS
    assert (metrics["frames"], metrics["seconds_of_video"]) == (17, 17 / FPS)
    assert metrics["passes"] == len(run.plan().passes)
    assert 0 < metrics["first_frame_s"] <= metrics["wall_s"] and metrics["fps"] == 17 / metrics["wall_s"]
    for per_process in ("idle_fraction", "peak_memory_mb", "bytes_sent"):
        assert len(metrics[per_process]) == 1
    assert metrics["peak_memory_mb"][0] > 10
    assert metrics["config"] == written["config"] and written["config"]["method"]["num_steps"] == 2
    assert written["config"] == {**run.record(), "method": written["config"]["method"]}
    assert written["metrics"] == {name: value for name, value in metrics.items() if name != "config"}
    assert (written["ended"], written["checkpoint_hash"]) == ("complete", fingerprint(model))
    assert {"python", "torch", "longvid"} <= set(written["versions"])

    sheet = Image.open(here / "sheet.png")
    assert sheet.mode == "RGB" and sheet.width > 8 * WIDTH and sheet.height > 3 * HEIGHT


def test_the_sidecar_is_there_from_the_first_frame_on(model, here):
    run = configure(model=model, num_frames=9, seed=1)
    outputs = Outputs(video=here / "a.mp4")
    counts = record(run, iter([film(5), film(4)]), Meter(), outputs, num_frames=9, notes={"input": "b.mp4"})
    assert not list(here.iterdir()) and next(counts) == 5
    written = read_json(here / "a.json")
    assert (written["ended"], written["input"], written["config"]["seed"]) == ("unfinished", "b.mp4", 1)
    assert list(counts) == [9]
    assert read_json(here / "a.json")["ended"] == "complete"
    assert {path.name for path in here.iterdir()} == {"a.mp4", "a.json"}


def test_a_consumer_that_stops_leaves_a_video(model, here):
    run = configure(model=model, num_frames=9, seed=1)
    counts = record(run, iter([film(5), film(4)]), Meter(), Outputs(video=here / "a.mp4"), num_frames=9, notes={})
    next(counts)
    counts.close()
    assert len(load(here / "a.mp4")) == 5 and read_json(here / "a.json")["ended"] == "interrupted"


def test_a_full_disk(longvid, here, monkeypatch):
    def write_until_full(self, frames):
        if self.num_frames >= 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        write(self, frames)

    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", write_until_full)
    words = ["--metrics", "m.json", "--contact-sheet", "s.png", "--save-latents", "l.st"]
    answer = longvid("generate", *QUICK, "--num-frames", 33, "--quiet", *words)
    assert (answer.code, answer.out) == (1, "")
    kept, way_on, failed = answer.err.splitlines()
    assert way_on == "go on with: longvid generate --resume longvid.run"
    assert kept == "longvid.mp4 holds the 13 frames made so far and plays"
    assert failed.startswith("longvid generate failed: ") and "No space left" in failed
    assert len(load(here / "longvid.mp4")) == 13
    assert read_json(here / "longvid.json")["ended"] == "failed"
    assert read_json(here / "m.json")["frames"] == 13 and (here / "s.png").exists() and (here / "l.st").exists()


@pytest.mark.parametrize(
    "number, code, ended",
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 130, "interrupted"),
        (signal.SIGKILL, -signal.SIGKILL, "unfinished"),
    ],
)
def test_a_run_that_is_stopped_leaves_a_video(model, here, number, code, ended):
    """A run far too long to end by itself, stopped when some blocks are in the file."""
    command = [sys.executable, "-m", "pipelines.cli", "generate", "--model", model, "--num-frames", LONG, *QUICK]
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    video = here / "longvid.mp4"
    while process.poll() is None and not (video.exists() and video.stat().st_size > 10_000):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    wait_for_the_encoder(video)
    written = read_json(here / "longvid.json")
    assert (written["ended"], written["config"]["num_frames"]) == (ended, LONG)
    num_frames = len(load(video))
    assert num_frames >= 20
    if code == 130:
        kept, way_on, interrupted = err.splitlines()[-3:]
        assert way_on == "go on with: longvid generate --resume longvid.run"
        assert kept.startswith("longvid.mp4 holds the ") and interrupted == "longvid generate: interrupted"
        assert num_frames == written["metrics"]["frames"]


def wait_for_the_encoder(path):
    """After kill -9 ffmpeg, in a session of its own, completes the file: until it stands still."""
    size = -1
    while path.stat().st_size != size:
        size = path.stat().st_size
        time.sleep(0.3)
