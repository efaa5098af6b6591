"""Samplers of noise levels per block for training, and the mask that goes with blocks.

A model that is to denoise rows of the rolling matrix must have seen such rows: levels that never decrease along time,
equal inside a block. All levels are drawn uniformly first and shifted afterwards, as at inference.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longvid.schedule import shift_level


def iid_levels(rng: np.random.Generator, num_blocks: int) -> np.ndarray:
    """An independent uniform level per block, (num_blocks,): diffusion forcing (arXiv 2407.01392), section 3."""
    return rng.uniform(size=num_blocks)


def staircase_levels(rng: np.random.Generator, num_blocks: int) -> np.ndarray:
    """A row of the rolling matrix at a random place and lag, (num_blocks,), never decreasing.

    Neighbours differ by `lag / num_steps`, drawn log-uniformly between 1/24 and 1, and the row begins anywhere between
    all noise and all clean, so every block is seen at every level.
    """
    rise = float(np.exp(rng.uniform(np.log(1 / 24), 0)))
    start = rng.uniform(-rise * (num_blocks - 1), 1)
    return np.clip(start + rise * np.arange(num_blocks), 0, 1)


def soil(rng: np.random.Generator, levels: np.ndarray, worst: float) -> np.ndarray:
    """Levels whose clean blocks carry, half of the time, a little noise below `worst`, the same for all of them.

    At inference context is never perfect; a model that has seen slight noise there drifts less.
    """
    return np.maximum(levels, rng.uniform(0, worst)) if rng.uniform() < 0.5 else levels


def per_latent(levels: np.ndarray, sizes: Sequence[int], shift: float) -> Tensor:
    """Shifted levels repeated over the latents of each block, (latents,), float32."""
    shifted = [shift_level(float(level), shift) for level in levels]
    return torch.tensor(np.repeat(shifted, sizes), dtype=torch.float32)


def block_causal_mask(sizes: Sequence[int], tokens_per_latent: int) -> Tensor:
    """True where a query may see a key: within its block and all before; (tokens, tokens)."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes) * tokens_per_latent)
    return block[:, None] >= block[None, :]
