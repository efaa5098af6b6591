"""A Frechet distance between videos and true procedural films, on features of the embedded model's own VAE."""

from collections.abc import Sequence

import numpy as np
import torch

from longvid.checkpoints.diffusers_folder import load_vae, open_folder
from longvid.media import cover
from longvid.quality import frechet_distance
from longvid.worlds import World, draw
from pipelines.configure import BASE
from pipelines.generate import encode_frames

CLIP_FRAMES, CLIPS, CLIP_SIDE, CLIP_FPS = 17, 8, 128, 16
"""Features are of so many frames each, so many clips of a video, of this size and rate."""


def clips_of(frames: np.ndarray, fps: float) -> np.ndarray:
    """`CLIPS` clips spread evenly over a video, at one size and rate; none if it is shorter than a clip."""
    picked = np.round(np.arange(CLIP_FRAMES) * fps / CLIP_FPS).astype(int)
    room = len(frames) - 1 - picked[-1]
    if room < 0:
        return np.empty((0, CLIP_FRAMES, CLIP_SIDE, CLIP_SIDE, 3), np.uint8)
    starts = np.unique(np.linspace(0, room, CLIPS).astype(int))
    return np.stack([cover(frames[start + picked], CLIP_SIDE, CLIP_SIDE) for start in starts])


def true_clips(worlds: Sequence[World], later: int = 0) -> np.ndarray:
    """Clips of true films, 7 seconds apart; `later` frames later than at first."""
    films = [draw(world, CLIP_FRAMES, start=later + 112 * i, height=CLIP_SIDE, width=CLIP_SIDE, fps=CLIP_FPS)
             for world in worlds for i in range(CLIPS)]  # fmt: skip
    return np.stack(films)


def frechet(clips: np.ndarray, worlds: Sequence[World]) -> dict | None:
    """The distance of clips to true films of these worlds, and that of these films to themselves 56 seconds later.

    Features are the embedded VAE's latents: mean and deviation of each channel over a clip. None for fewer than two
    clips; with fewer than a few hundred, distances are too large.
    """
    if len(clips) < 2:
        return None
    made, true, later = (features(part) for part in (clips, true_clips(worlds), true_clips(worlds, later=8 * 112)))
    return {"distance": frechet_distance(made, true), "true_to_true": frechet_distance(true, later),
            "clips": len(made), "true_clips": len(true)}  # fmt: skip


def features(clips: np.ndarray) -> np.ndarray:
    """Mean and deviation of each latent channel of each clip: (n, 2 c)."""
    vae = load_vae(open_folder(BASE), torch.float32, "cpu").eval()
    latents = [encode_frames(vae, clip)[0] for clip in clips]
    return np.stack([torch.cat([z.mean((1, 2, 3)), z.std((1, 2, 3))]).numpy() for z in latents])
