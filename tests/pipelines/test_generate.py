"""Videos from a prompt: every method at every length, streamed, a function of the seed, from a picture or not."""

import hashlib

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load as parse
from safetensors.torch import load_file, save_file

from longvid import sampler
from longvid.contact_sheet import write_png
from longvid.media import read_image
from pipelines.configure import configure
from pipelines.generate import Observer, decode, encode_frames, generate, load_models
from pipelines.methods import METHODS
from pipelines.record import Meter
from tests.pipelines.conftest import HEIGHT, WIDTH, film, load, read_json

QUICK = ("--num-inference-steps", 2)


class Counter(Observer):
    """Counts passes, and blocks as they leave."""

    def __init__(self):
        super().__init__()
        self.passes, self.blocks = 0, []

    def passed(self, p):
        self.passes += 1

    def left(self, block, latents):
        self.blocks.append((block, latents.shape[2]))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    write_png(path, film(1, 2 * HEIGHT, 2 * WIDTH)[0])
    return path


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_every_length(model, name):
    for num_frames in (1, 5, 17, 33):
        run = configure(model=model, method=name, num_frames=num_frames, num_steps=2, seed=1)
        meter, counter = Meter(keep_latents=True), Counter()
        meter.passed = counter.passed
        video = np.concatenate(list(generate(run, meter)))
        assert video.shape == (num_frames, HEIGHT, WIDTH, 3) and video.dtype == np.uint8
        assert torch.cat(meter.kept, 2).shape == (1, 4, run.num_latents, HEIGHT // 4, WIDTH // 4)
        assert counter.passes == len(run.plan().passes)


def test_the_dtype_of_decoding_leaves_latents_as_they_are(model, picture):
    made = {}
    for dtype in ("float32", "bfloat16"):
        run, meter = configure(model=model, image=picture, num_frames=9, num_steps=2, seed=1, vae_dtype=dtype), Meter()
        made[dtype] = np.concatenate(list(generate(run, meter))).astype(int), meter.latent_sha256
    (exact, sha), (rounded, other) = made.values()
    assert sha == other and 0 < np.abs(exact - rounded).mean() < 3


@pytest.mark.parametrize("name", METHODS)
def test_frames_leave_before_the_last_pass(model, name):
    """33 latents are more than any method's first window; a block of n latents is 4n frames, the first 3 less."""
    run = configure(model=model, method=name, num_frames=129, num_steps=2, seed=1)
    counter, plan = Counter(), run.plan()
    frames = generate(run, counter)
    assert counter.passes == 0
    given = [next(frames)]
    assert counter.passes < len(plan.passes) * 0.9
    given += frames
    assert counter.passes == len(plan.passes)
    assert counter.blocks == list(enumerate(plan.block_sizes))
    lengths = [4 * size for size in plan.block_sizes]
    assert [len(some) for some in given] == [lengths[0] - 3, *lengths[1:]] and sum(map(len, given)) == 129
    assert all(some.shape[1:] == (HEIGHT, WIDTH, 3) and some.dtype == np.uint8 for some in given)


@pytest.mark.parametrize("name", METHODS)
def test_a_video_begins_with_its_picture(model, picture, name):
    run = configure(model=model, method=name, num_frames=17, num_steps=2, seed=1, image=picture)
    video = np.concatenate(list(generate(run)))
    vae = load_models(run).vae
    expected, _ = decode(vae, encode_frames(vae, read_image(picture, HEIGHT, WIDTH)[None]), None)
    assert len(video) == 17 and np.array_equal(video[:1], expected)
    write_png(picture, 255 - film(1)[0])
    assert not np.array_equal(np.concatenate(list(generate(run)))[1:], video[1:])


def test_a_picture_on_the_command_line(longvid, here, picture):
    words = ["--image", picture, "--num-frames", 9, *QUICK, "--seed", 1, "--output", "a.mp4", "--save-latents", "a.st"]
    assert longvid("generate", *words).code == 0
    assert len(load(here / "a.mp4")) == 9 and load_file("a.st")["latents"].shape[1] == 3
    written = read_json(here / "a.json")
    assert written["config"]["image"] == str(picture)
    assert written["metrics"]["latent_sha256"] == latent_hash(load_file("a.st")["latents"])


def latent_hash(latents):
    """sha256 of float32 bytes, axes (f, c, h, w)."""
    return hashlib.sha256(rearrange(latents, "c f h w -> f c h w").contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", ["rolling", "rolling-forcing"])
def test_the_seed_decides(longvid, here, name):
    def run(output, seed):
        words = ["--method", name, *QUICK, "--seed", seed, "--output", f"{output}.mp4"]
        assert longvid("generate", *words, "--save-latents", f"{output}.safetensors").code == 0
        tensors = load_file(f"{output}.safetensors")
        assert list(tensors) == ["latents"] and tensors["latents"].dtype == torch.float32
        assert tensors["latents"].shape == (4, 5, HEIGHT // 4, WIDTH // 4)
        written = read_json(here / f"{output}.json")
        assert written["config"]["seed"] == seed
        assert written["metrics"]["latent_sha256"] == latent_hash(tensors["latents"])
        return tensors["latents"]

    one, again, other = run("one", 7), run("again", 7), run("other", 8)
    assert torch.equal(one, again) and (here / "one.mp4").read_bytes() == (here / "again.mp4").read_bytes()
    assert not torch.isclose(one, other).any(0).all()


def test_a_chosen_seed_is_said_and_makes_the_video_again(longvid, here):
    first = longvid("generate", *QUICK, "--num-frames", 5)
    written = read_json(here / "longvid.json")
    assert f"seed={written['config']['seed']}" in first.err
    again = longvid("generate", *QUICK, "--num-frames", 5, "--seed", written["config"]["seed"])
    assert written["metrics"]["latent_sha256"] in first.err and written["metrics"]["latent_sha256"] in again.err


def test_prompt_and_guidance_change_the_video(model):
    def video(**changes):
        run = configure(model=model, num_frames=5, num_steps=2, seed=1, **changes)
        return np.concatenate(list(generate(run)))

    videos = [video(), video(prompt="a blue cube"), video(negative_prompt="blur"), video(guidance_scale=1)]
    assert len({frames.tobytes() for frames in videos}) == 4
    assert np.array_equal(video(guidance_scale=1), video(guidance_scale=1, negative_prompt="blur"))


# Numbers that stop being finite


def test_weights_that_are_no_numbers_are_noticed(longvid, own_model, here):
    (file,) = (own_model / "transformer").glob("*.safetensors")
    tensors = parse(file.read_bytes())
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, file)
    answer = longvid("generate", *QUICK, "--quiet", model=own_model)
    assert (answer.code, answer.out) == (1, "") and answer.err.count("\n") == 1
    assert "block 0" in answer.err and "step 0" in answer.err and "not finite" in answer.err
    assert not list(here.iterdir())


def test_what_was_made_before_the_numbers_went_wrong_stays(longvid, here, monkeypatch):
    def noise(seed, block, shape, step=None):
        return block_noise(seed, block, shape, step) * (torch.inf if block == 2 else 1)

    block_noise = sampler.block_noise
    monkeypatch.setattr(sampler, "block_noise", noise)
    answer = longvid("generate", *QUICK, "--num-frames", 45, "--quiet")
    assert (answer.code, answer.out) == (1, "")
    kept, _, failed = answer.err.splitlines()
    assert kept == "longvid.mp4 holds the 13 frames made so far and plays"
    assert "block 2" in failed and "step 0" in failed
    assert len(load(here / "longvid.mp4")) == 13
    written = read_json(here / "longvid.json")
    assert written["ended"] == "failed" and written["metrics"]["frames"] == 13
