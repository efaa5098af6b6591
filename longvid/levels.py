"""Samplers of noise levels per block for training, and the mask that goes with blocks.

A model that is to denoise rows of the rolling matrix must have seen such rows: levels that never decrease along time,
equal inside a block. All levels are drawn uniformly first and shifted afterwards, as at inference.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from longvid.schedule import NUM_TRAIN_TIMESTEPS, shift_level


class LevelSampler(StrEnum):
    """How the levels of a clip's blocks are drawn."""

    SYNC = "sync"
    IID = "iid"
    FOPP = "fopp"
    ANCHORED_FOPP = "anchored-fopp"
    STAIRCASE = "staircase"


def draw_levels(sampler: LevelSampler, rng: np.random.Generator, num_blocks: int) -> np.ndarray:
    """A level per block by the sampler of that name, (num_blocks,), before the shift."""
    match sampler:
        case LevelSampler.SYNC:
            return sync_levels(rng, num_blocks)
        case LevelSampler.IID:
            return iid_levels(rng, num_blocks)
        case LevelSampler.FOPP:
            return fopp_levels(rng, num_blocks)
        case LevelSampler.ANCHORED_FOPP:
            return anchored_fopp_levels(rng, num_blocks)
        case LevelSampler.STAIRCASE:
            return staircase_levels(rng, num_blocks)


def sync_levels(rng: np.random.Generator, num_blocks: int) -> np.ndarray:
    """One uniform level for all blocks, (num_blocks,): a clip is denoised as a whole, no diffusion forcing."""
    return np.full(num_blocks, rng.uniform())


def iid_levels(rng: np.random.Generator, num_blocks: int) -> np.ndarray:
    """An independent uniform level per block, (num_blocks,): diffusion forcing (arXiv 2407.01392), section 3."""
    return rng.uniform(size=num_blocks)


def fopp_levels(rng: np.random.Generator, num_blocks: int, num_steps: int = NUM_TRAIN_TIMESTEPS) -> np.ndarray:
    """Levels t / num_steps of a sequence 1 <= t_1 <= ... <= t_n <= num_steps, uniform over all of them, (num_blocks,).

    SkyReels-V2's constraint (FoPP, arXiv 2504.13074) with all that keep it equally likely. Block i of n then has
    levels of about Beta(i, n - i + 1), so the ends are seldom far from clean and from noise; the published sampler
    (`anchored_fopp_levels`) gives every block every level more evenly.
    """
    return _monotone(rng, num_blocks, 1, num_steps) / num_steps


def anchored_fopp_levels(rng: np.random.Generator, num_blocks: int, num_steps: int = NUM_TRAIN_TIMESTEPS) -> np.ndarray:
    """Levels t / num_steps as published: one block's step is uniform, the rest uniform over what completes it.

    Source: SkyReels-V2 (arXiv 2504.13074), which has FoPP from AR-Diffusion (arXiv 2503.07418). It walks both ways from
    the anchor with probabilities from tables of counts; drawing each side at once is the same and needs no table.
    """
    anchor, step = int(rng.integers(num_blocks)), int(rng.integers(1, num_steps + 1))
    before, after = _monotone(rng, anchor, 1, step), _monotone(rng, num_blocks - anchor - 1, step, num_steps)
    return np.concatenate([before, [step], after]) / num_steps


def _monotone(rng: np.random.Generator, length: int, lowest: int, highest: int) -> np.ndarray:
    """A non-decreasing sequence of whole numbers, uniform over all of that length within the bounds.

    Adding its index to each makes it a set of `length` of `highest - lowest + length` numbers, one to one, so there are
    C(highest - lowest + length, length) of them and drawing a set draws a sequence. Exact for any size.
    """
    chosen = rng.choice(highest - lowest + length, length, replace=False, shuffle=False)
    return lowest + np.sort(chosen) - np.arange(length)


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


def block_causal_mask(sizes: Sequence[int]) -> Tensor:
    """True where a latent may see another: within its block and all before; (latents, latents)."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return block[:, None] >= block[None, :]
