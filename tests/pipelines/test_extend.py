"""A video goes on: all of its frames, then new ones that follow from its end."""

import numpy as np
import pytest

from longvid.media import read_video
from pipelines.configure import configure
from pipelines.extend import configure_extension, extend
from pipelines.methods import METHODS
from pipelines.record import Meter
from tests.pipelines.conftest import FPS, HEIGHT, WIDTH, load, read_json, save_film

QUICK = ("--num-inference-steps", 2, "--seed", 1)


def extension_of(model, video, **changes):
    return configure_extension(configure(model=model, **{"num_frames": 9, "num_steps": 2, "seed": 1, **changes}), video)


def distance(a, b):
    """Mean difference in grey levels: H.264 costs about 2."""
    return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize(
    "num_frames, height, width, fps",
    [
        (2, HEIGHT, WIDTH, FPS),  # fewer frames than a latent holds
        (12, HEIGHT, WIDTH, FPS),  # shorter than the history, and not 4n + 1
        (90, HEIGHT, WIDTH, FPS),  # longer than the history, and than a chunk of reading
        (20, 48, 40, 2 * FPS),  # another size and shape, twice the rate
        (9, 33, 51, FPS / 2),  # odd sizes, half the rate
    ],
)
def test_the_input_comes_first_and_whole(longvid, here, num_frames, height, width, fps):
    source = save_film(here / "in.mp4", num_frames, height, width, fps)
    answer = longvid("extend", "--video", "in.mp4", "--seconds", 1, *QUICK, "--output", "out.mp4", "--quiet")
    assert (answer.code, answer.out, answer.err) == (0, "out.mp4\n", "")
    expected = np.concatenate(list(read_video(source, height=HEIGHT, width=WIDTH, fps=FPS)))
    assert len(expected) == round(num_frames * FPS / fps)
    made = load(here / "out.mp4")
    assert made.shape == (len(expected) + FPS, HEIGHT, WIDTH, 3)
    assert distance(made[: len(expected)], expected) < 4
    written = read_json(here / "out.json")
    assert (written["ended"], written["input"], written["input_frames"]) == ("complete", "in.mp4", len(expected))
    assert written["history_latents"] == min(7, (len(expected) - 1) // 4 + 1)
    assert written["metrics"]["frames"] == len(made)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on(model, here, name):
    source = save_film(here / "in.mp4", 14)
    for num_frames in (5, 21):
        extension = extension_of(model, source, method=name, num_frames=num_frames)
        meter = Meter(keep_latents=True)
        video = np.concatenate(list(extend(extension, meter)))
        assert video.shape == (extension.num_frames, HEIGHT, WIDTH, 3) and len(video) == 14 + num_frames - 1
        assert np.array_equal(video[:14], load(source))
        assert sum(x.shape[2] for x in meter.kept) == (num_frames - 1) // 4
        assert meter.num_passes == len(extension.plan().passes)


@pytest.mark.parametrize("name", METHODS)
def test_the_history_is_seen(model, here, name):
    def latents(source):
        meter = Meter()
        list(extend(extension_of(model, source, method=name), meter))
        return meter.latent_sha256

    bright, dark = save_film(here / "a.mp4", 14, shade=200), save_film(here / "b.mp4", 14, shade=0)
    assert latents(bright) == latents(bright) != latents(dark)


def test_only_the_end_is_history(model, here):
    """What is before the history's first frame changes nothing of what is made."""

    def latents(source):
        meter = Meter()
        list(extend(extension_of(model, source), meter))
        return meter.latent_sha256

    long, extension = save_film(here / "long.mp4", 80), None
    extension = extension_of(model, long)
    assert extension.history_latents == 7
    frames = np.concatenate(list(extend(extension, meter := Meter())))
    tail = frames[: extension.input_frames][-45:]
    assert len(tail) == 4 * (12 - 1) + 1 and meter.latent_sha256 == latents(long)


def test_latents_and_dry_run_are_of_what_is_new(longvid, here):
    save_film(here / "in.mp4", 9)
    before = set(here.iterdir())
    answer = longvid("extend", "--video", "in.mp4", "--num-frames", 9, *QUICK, "--dry-run")
    assert answer.code == 0 and '"input_frames": 9' in answer.out and '"history_latents": 3' in answer.out
    assert set(here.iterdir()) == before


def test_an_extension_can_be_extended(longvid, here):
    save_film(here / "0.mp4", 9)
    for i in range(2):
        words = ["--video", f"{i}.mp4", "--output", f"{i + 1}.mp4", "--num-frames", 5, *QUICK]
        assert longvid("extend", *words).code == 0
    assert [len(load(here / f"{i}.mp4")) for i in range(3)] == [9, 13, 17]
