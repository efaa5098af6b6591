"""Train the embedded VAE's decoder on, its encoder as it is: whole pictures, from anywhere in a stream.

Latents stay what they were, so a DiT that was trained on them need not know. The VAE's own training sees crops, and
pixels one by one: on whole films the change from one latent's frames to the next one's came out a quarter larger than
that between the frames of one. Here that change is a part of the loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longvid.models.vae import VAE
from longvid.types import Latents, Video
from pipelines.optimise import LoopConfig, optimise
from pipelines.train_vae import film_crops

SIDE = 128
"""Pixels of a picture, as at inference."""


@dataclass(frozen=True, kw_only=True)
class DecoderTraining:
    """Each step decodes `num_latents` of `loop.batch_size` films, after a past of one of `pasts`, in latents.

    `worst_noise`, in deviations of the latents, soils them as in the VAE's own training; `motion_weight` is that of the
    error in the change from frame to frame.
    """

    loop: LoopConfig
    num_latents: int = 6
    pasts: tuple[int, ...] = (0, 2, 5, 9)
    worst_noise: float = 0.4
    motion_weight: float = 1.0


def decoder_loss(
    vae: VAE, video: Video, past: int, config: DecoderTraining, generator: torch.Generator | None = None,
    latents: Latents | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """L1 and L2 on pixels, and L1 on their change, of a video's frames from the latent `past` on.

    `latents` are the video's, where they are known. Without a generator noise is drawn on the video's device.
    """
    place = {"generator": generator} if generator else {"device": video.device}
    with torch.autocast(video.device.type, torch.bfloat16):
        z = vae.encode(video)[0] if latents is None else latents
        share = config.worst_noise * torch.rand(len(z), 1, 1, 1, 1, **place)
        z = z + share * torch.randn(z.shape, **place)
        state = vae.decode(z[:, :, :past])[1] if past else None
        output = vae.reconstruct(vae.denormalised(z[:, :, past:]), state)
    target = video[:, :, video.shape[2] - output.shape[2] :]
    error, change = output - target, output.diff(dim=2) - target.diff(dim=2)
    squared = error.square().mean()
    loss = error.abs().mean() + squared + config.motion_weight * change.abs().mean()
    return {"loss": loss, "change": change.detach().abs().mean(), "psnr": 10 * torch.log10(4 / squared.detach())}


def train_decoder(vae: VAE, config: DecoderTraining, *, resume: bool = False) -> Iterator[dict]:
    """Train, yielding log records; the last one holds the whole VAE as `decoder`."""
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.loop.seed, step))
        past = int(rng.choice(config.pasts))
        video = film_crops(rng, config.loop.batch_size, 4 * (past + config.num_latents - 1) + 1, SIDE)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return decoder_loss(vae, video, past, config, generator)

    yield from optimise(vae, loss_at, config.loop, resume=resume)
    yield {"decoder": vae.eval()}
