"""Whole clips: as diffusers makes them, the same for a seed, Gaussian where the data are, and whole at every length."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing as reference_module

from longvid.checkpoints.diffusers_folder import load_dit, open_folder, save_folder, scheduler_config
from longvid.flow import UniPCState
from longvid.method import Kind, LevelRule, Method
from longvid.models.text import TextEncoder, make_small_text_encoder
from longvid.models.vae import VAE, VAEConfig
from longvid.noise import block_noise
from longvid.passes import Pass
from longvid.plan import make_plan
from longvid.sampler import Queue, noise_of, sample
from longvid.schedule import Solver
from pipelines.methods import METHODS, dualparal, rolling, rolling_forcing, self_forcing, skyreels_async, skyreels_sync
from tests.whole_clip import FPS, clean, roll, texts_of, tiny_dit, whole, words

PROMPT, NEGATIVE = "A red kite over the harbour.", "blurred"
STEPS = 8

# diffusers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random SkyReels-V2 folder, as longvid writes it."""
    path = tmp_path_factory.mktemp("clip") / "model"
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    dit = tiny_dit(in_channels=16, out_channels=16, text_dim=128, num_attention_heads=3)
    text = TextEncoder(*make_small_text_encoder())
    save_folder(path, dit=dit, vae=vae, text=text, scheduler=scheduler_config(8.0), longvid={})
    return path


def reference_clip(folder, noises: list[torch.Tensor], embeds: list[torch.Tensor], **arguments) -> torch.Tensor:
    """What diffusers makes of the noise, window by window. Its causal mask stays off: weights are bidirectional."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    height, width = (8 * size for size in noises[0].shape[-2:])
    drawn = iter(noises)

    def draw(shape, **_):
        noise = next(drawn)
        assert noise.shape == tuple(shape)
        return noise.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "randn_tensor", draw)
        patch.setattr(pipeline.transformer, "_set_ar_attention", lambda size: None)
        video = pipeline(
            prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], num_inference_steps=STEPS, fps=FPS,
            guidance_scale=6.0, height=height, width=width, output_type="latent", return_dict=False, **arguments,
        )[0]  # fmt: skip
    assert next(drawn, None) is None
    return video


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


# diffusers has Wan's list of levels, the release its own
SYNC = replace(skyreels_sync(num_steps=STEPS), level_rule=LevelRule.WAN)
ASYNC = replace(skyreels_async(num_steps=STEPS), level_rule=LevelRule.WAN)


@pytest.mark.parametrize("method, windows, latents, arguments", [
    (SYNC, [25], 25, {"num_frames": 97}),
    (replace(SYNC, block_size=6, first_block_size=6, window=6, overlap=2, condition_level=0.0), [6, 6], 10,
     {"num_frames": 37, "base_num_frames": 21, "overlap_history": 5}),
    (ASYNC, [25], 25, {"num_frames": 97, "ar_step": 5, "causal_block_size": 5}),
    (replace(ASYNC, lag=3, block_size=2, first_block_size=2, window=6, overlap=2, condition_level=0.0), [6, 6, 4], 12,
     {"num_frames": 45, "base_num_frames": 21, "overlap_history": 5, "ar_step": 3, "causal_block_size": 2}),
], ids=["sync", "sync-windows", "async", "async-windows"])  # fmt: skip
def test_a_whole_clip_is_diffusers(folder, method, windows, latents, arguments):
    plan, channels, height, width = make_plan(method, latents), 16, 4, 6
    noise = noise_of(plan, 1, channels, height, width)
    begin = torch.cat([noise(block, None) for block in range(len(plan.block_sizes))], 2)
    drawn, start = [], 0
    for size in windows:
        drawn.append(begin[:, :, start : start + size])
        start += size - method.overlap

    text = TextEncoder.load(folder, torch.float32)
    embeds = [text(PROMPT), text(NEGATIVE)]
    dit = load_dit(open_folder(folder), torch.float32)
    ours = whole(dict(sample(plan, dit, texts_of(dit, *embeds), noise, fps=FPS)))
    theirs = reference_clip(folder, drawn, embeds, **arguments)
    difference = relative_difference(ours, theirs)
    print("DIFF", difference, ours.std(), begin.std())
    assert difference <= 1e-3
