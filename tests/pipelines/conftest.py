"""A model folder of random weights, small enough that a whole video takes a moment, and ways to ask for videos."""

import json
import shutil
import signal
from types import SimpleNamespace

import decord
import numpy as np
import pytest
import torch

from longvid.checkpoints.diffusers_folder import save_folder, scheduler_config
from longvid.media import VideoWriter
from longvid.models.dit import SKYREELS, DiT, DiTConfig
from longvid.models.text import TextEncoder
from longvid.models.tokenizers import ByteTokenizer
from longvid.models.umt5 import UMT5Config, UMT5Encoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from pipelines import cli

HEIGHT, WIDTH, FPS = 16, 32, 8
TOKENS = 40
"""What the random model's text encoder takes: a byte each, and the end mark."""

DEFAULTS = {
    "name": "random", "method": "rolling", "height": HEIGHT, "width": WIDTH, "fps": FPS, "num_frames": 17,
    "prompt": "a red ball",
}  # fmt: skip


def save_random_folder(path):
    """The classes of the embedded model, far smaller: 4 pixels to a latent, 2 layers of 24."""
    torch.manual_seed(0)
    dit = DiT(DiTConfig(
        class_name=SKYREELS, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2,
    ))  # fmt: skip
    vae = VAE(VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temperal_downsample=(True, True),
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    ))  # fmt: skip
    for parameter in (*dit.parameters(), *vae.parameters()):
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    text = TextEncoder(UMT5Encoder(config).reset(), ByteTokenizer(TOKENS))
    save_folder(path, dit=dit, vae=vae, text=text, scheduler=scheduler_config(3.0), longvid=DEFAULTS)
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder that every test reads; nobody writes to it."""
    return save_random_folder(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def own_model(model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(model, tmp_path / "own")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, empty: what a command leaves in it is the test's."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def longvid(model, here, capfd):
    """Call the command in this process: `longvid("generate", "--seed", 1)` has `code`, `out` and `err`."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(command, *words, model=model):
        given = [] if model is None else ["--model", model]
        capfd.readouterr()
        try:
            code = cli.main([command, *map(str, [*given, *words])])
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    yield call
    signal.signal(signal.SIGTERM, handler)


def film(num_frames, height=HEIGHT, width=WIDTH, shade=0):
    """A smooth ramp that brightens, which H.264 keeps well."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([160 * x // width, 160 * y // height, np.full_like(x, shade)], axis=-1)
    return np.stack([ramp + min(i, 90) for i in range(num_frames)]).astype(np.uint8)


def save_film(path, num_frames, height=HEIGHT, width=WIDTH, fps=FPS, shade=0):
    with VideoWriter(path, height=height, width=width, fps=fps) as writer:
        writer.write(film(num_frames, height, width, shade))
    return path


def load(path):
    """Every frame of a video, uint8 (n, height, width, 3)."""
    reader = decord.VideoReader(str(path), decord.cpu(0))
    return reader.get_batch(range(len(reader))).asnumpy()


def read_json(path):
    return json.loads(path.read_text())
