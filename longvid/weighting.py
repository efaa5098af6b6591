"""Weights of the velocity's squared error: by level, and of a video's first latent. Knows no model and no batch."""

import math
from enum import StrEnum
from typing import Annotated

import torch
from torch import Tensor

from longvid.types import Latents, Levels


class LossWeighting(StrEnum):
    """How much a level counts."""

    NONE = "none"
    MIN_SNR = "min-snr"


def level_weight(weighting: LossWeighting, level: Levels) -> Levels:
    """Weight of each latent's error by its level."""
    match weighting:
        case LossWeighting.NONE:
            return torch.ones_like(level)
        case LossWeighting.MIN_SNR:
            return min_snr_weight(level)


def min_snr_weight(level: Levels, gamma: float = 5.0) -> Levels:
    """min((1 - sigma)^2, gamma sigma^2), over its mean gamma / (3 (1 + sqrt(gamma))^2) on uniform levels.

    Min-SNR-gamma (arXiv 2303.09556, section 3.4) weights the error of x0 by min(SNR, gamma). With
    x = (1 - sigma) x0 + sigma eps, SNR = ((1 - sigma) / sigma)^2, and as x0 = x - sigma v, the error of x0 is sigma^2
    times that of v; so the error of v has weight sigma^2 min(SNR, gamma). It is largest where SNR = gamma, at
    sigma = 1 / (1 + sqrt(gamma)), and 0 at both ends: pure noise, the first step of inference, is not trained, and
    levels near it hardly.
    """
    mean = gamma / (3 * (1 + math.sqrt(gamma)) ** 2)
    return torch.minimum((1 - level).square(), gamma * level.square()) / mean


def first_latent_weight(latents: Latents) -> Annotated[Tensor, "c"]:
    """Weight per channel that brings the error of videos' first latents to the scale of the others.

    A first latent encodes one frame, the others four, so its channels have another mean and deviation. With
    v = eps - x0, predicting nothing costs 1 + E[x0^2]; the weight is that of the other latents over that of the first.

    The offset itself is not taken off: a released folder normalises all latents alike (`latents_mean`, `latents_std`
    in vae/config.json), diffusers undoes just that, and the DiT has no parameter that knows a latent to be the first
    (positions are relative, and a block is told no place in the video). So nothing at inference could put it back.
    """
    power = 1 + latents.double().square().mean((0, 3, 4))
    return (power[:, 1:].mean(1) / power[:, 0]).float()
