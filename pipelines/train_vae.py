"""Train the embedded model's VAE on crops of procedural films."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from longvid import worlds
from longvid.frames import to_video
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.types import Video
from pipelines.optimise import Check, Engine, LoopConfig, alone, optimise
from pipelines.optimizers import WHOLE, Part

TINY_VAE = dict(
    base_dim=16, decoder_base_dim=16, z_dim=8, dim_mult=[1, 2, 2], num_res_blocks=2, attn_scales=[],
    temperal_downsample=[True, True], dropout=0.0, latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8,
)  # fmt: skip
"""Shape of the embedded VAE: 8 x 8 pixels and 4 frames per latent, 8 channels; pixels folded 2 x 2 as in Wan2.2."""


@dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Films are cut to `crop` pixels square and, for `short_steps`, to 9 frames; then to 41, a quarter as many films.

    Pixels are learned soonest on many short clips. But a causal VAE that has only seen short ones always sees the
    padding before the first frame, and drifts once that is out of its sight (measured: 26.6 dB on 9 frames, 15 dB at
    the end of 33).
    """

    loop: LoopConfig
    short_steps: int = 1250
    crop: int = 64
    worst_noise: float = 0.4
    size_weight: float = 1e-4
    dtype: str = "bfloat16"
    device: str = "cpu"

    def clips(self, step: int) -> tuple[int, int]:
        """How many clips a step has, and of how many frames."""
        return (self.loop.batch_size, 9) if step < self.short_steps else (max(1, self.loop.batch_size // 4), 41)


def film_crops(rng: np.random.Generator, count: int, num_frames: int, crop: int) -> Video:
    """Random films at random times, cut around random places: (count, 3, t, crop, crop) in [-1, 1]."""
    clips = np.empty((count, num_frames, crop, crop, 3), np.uint8)
    for i in range(count):
        film = worlds.draw(worlds.sample_world(rng), num_frames, start=int(rng.integers(0, 2000)))
        y, x = rng.integers(0, film.shape[1] - crop + 1), rng.integers(0, film.shape[2] - crop + 1)
        clips[i] = film[:, y : y + crop, x : x + crop]
    return to_video(torch.from_numpy(clips))


def vae_loss(
    vae: VAE, video: Video, config: VAETraining, generator: torch.Generator, part: Part = WHOLE
) -> dict[str, Tensor]:
    """L1 and L2 on pixels of latents that were soiled with noise, and a little weight on their size.

    The noise is in units of each channel's standard deviation, so an encoder cannot outshout it by larger latents. The
    DiT's latents are never exact; a decoder that has seen inexact ones shows small errors as small errors.

    `video` is a part of the step's batch; of several parts each has a deviation of its own.
    """
    with torch.autocast(video.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        mean = vae.moments(video)[0].float()
        deviation, count = mean.std((0, 2, 3, 4), keepdim=True), len(mean) * part.count
        share = part.of(config.worst_noise * torch.rand(count, 1, 1, 1, 1, generator=generator)).to(video.device)
        noise = part.of(torch.randn(count, *mean.shape[1:], generator=generator)).to(video.device)
        output = vae.reconstruct(mean + share * deviation * noise).float()
    error = output - video
    pixels = error.abs().mean() + error.square().mean()
    psnr = 10 * torch.log10(4 / error.detach().square().mean())
    loss = pixels + config.size_weight * mean.square().mean()
    return {name: value / part.count for name, value in
            (("loss", loss), ("size", deviation.mean()), ("psnr", psnr))}  # fmt: skip


def train_vae(
    config: VAETraining, *, resume: bool = False, engine: Engine = alone, checks: Sequence[Check] = ()
) -> Iterator[dict]:
    """Train, yielding log records; the last one holds the model as `vae`, with the statistics of its latents set."""
    torch.manual_seed(config.loop.seed)
    vae = VAE(VAEConfig.from_dict(TINY_VAE))
    _initialise(vae)

    def loss_at(step: int, part: Part = WHOLE) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.loop.seed, step))
        video = part.of(film_crops(rng, *config.clips(step), config.crop)).to(config.device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return vae_loss(vae, video, config, generator, part)

    options = {} if config.dtype == "bfloat16" else {"dtype": config.dtype}
    yield from optimise(
        vae.to(config.device), loss_at, config.loop, resume=resume, options=options, engine=engine, checks=checks
    )
    yield {"vae": with_statistics(vae.cpu(), np.random.default_rng(config.loop.seed))}


def _initialise(vae: VAE) -> None:
    """Kernels that keep the size of their input, and a posterior that begins nearly without noise."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        vae.quant_conv.bias[vae.config.z_dim :] -= 6


@torch.no_grad()
def with_statistics(vae: VAE, rng: np.random.Generator, num_films: int = 64) -> VAE:
    """The same VAE with `latents_mean` and `latents_std` measured per channel on whole films."""
    means = [vae.moments(film_crops(rng, 1, 41, 128))[0] for _ in range(num_films)]
    z = torch.cat(means).transpose(0, 1).flatten(1)
    config = replace(vae.config, latents_mean=tuple(z.mean(1).tolist()), latents_std=tuple(z.std(1).tolist()))
    measured = VAE(config)
    measured.load_state_dict(vae.state_dict())
    return measured
