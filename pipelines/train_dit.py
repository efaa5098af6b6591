"""Train the embedded model's DiT: flow matching with a level per block, block-causal or joint.

Half of the batches take their levels from rows of the rolling matrix, the other half at random per block. Most see
context as causal inference does (a block sees itself and what is before), some attend jointly, so that one model
serves both kinds of method. The prompt is dropped for a share of the clips, for guidance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longvid.flow import add_noise, velocity_target
from longvid.levels import block_causal_mask, iid_levels, per_latent, soil, staircase_levels
from longvid.models.dit import SKYREELS, DiT, DiTConfig
from longvid.models.text import TextEncoder
from pipelines.film_latents import SINK, FilmLatents
from pipelines.optimise import LoopConfig, optimise

TINY_DIT = DiTConfig(
    class_name=SKYREELS, num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=128,
    freq_dim=256, ffn_dim=768, num_layers=6,
)  # fmt: skip
"""Shape of the embedded DiT."""


@dataclass(frozen=True, kw_only=True)
class DiTTraining:
    """Shares are of batches, except `start_share` and `drop_text`, which are of clips.

    That a video begins right matters most, since all that follows is made after it, and is hardest: nothing but the
    text helps. So `start_share` of the clips have no clean block, and `first_share` of the batches are first blocks
    alone, four times as many clips for less work.
    """

    loop: LoopConfig
    run: int = 12
    shift: float = 2.0
    staircase_share: float = 0.5
    joint_share: float = 0.2
    image_share: float = 0.15
    start_share: float = 0.6
    first_share: float = 0.4
    drop_text: float = 0.1
    worst_context: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Block sizes of a batch's clips, its levels (b, f), and the mask (None: joint)."""

    sizes: tuple[int, ...]
    levels: Tensor
    mask: Tensor | None


def draw_layout(rng: np.random.Generator, config: DiTTraining, tokens_per_latent: int) -> Layout:
    """Blocks mostly of 3 latents; the first is the sink, or a single latent as where a video starts from an image."""
    num_latents = SINK + config.run
    first = 1 if rng.uniform() < config.image_share else SINK
    size = int(rng.choice([3, 2, 4, 6], p=[0.7, 0.1, 0.1, 0.1]))
    sizes = [first]
    while sum(sizes) < num_latents:
        sizes.append(min(size, num_latents - sum(sizes)))
    draw = staircase_levels if rng.uniform() < config.staircase_share else iid_levels
    rows = []
    for _ in range(config.loop.batch_size):
        if rng.uniform() < config.start_share:
            levels = draw(rng, len(sizes))
        else:
            clean = int(rng.integers(1, len(sizes)))
            levels = np.concatenate([np.zeros(clean), draw(rng, len(sizes) - clean)])
        rows.append(per_latent(soil(rng, levels, config.worst_context), sizes, config.shift))
    mask = None if rng.uniform() < config.joint_share else block_causal_mask(sizes, tokens_per_latent)
    return Layout(sizes=tuple(sizes), levels=torch.stack(rows), mask=mask)


def first_block_layout(rng: np.random.Generator, config: DiTTraining, count: int) -> Layout:
    """First blocks alone, each clip at a level of its own."""
    levels = [per_latent(iid_levels(rng, 1), (SINK,), config.shift) for _ in range(count)]
    return Layout(sizes=(SINK,), levels=torch.stack(levels), mask=None)


def dit_loss(dit: DiT, clean: Tensor, text: Tensor, layout: Layout, noise: Tensor) -> dict[str, Tensor]:
    """Weighted mean squared error of the velocity over latents that carry noise (arXiv 2210.02747, section 4).

    A place counts by how much its latents move in time, so that a small thing before a large background is learned.
    """
    noisy = add_noise(clean, noise, layout.levels)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, _ = dit(noisy, 1000 * layout.levels, dit.text_features(text), mask=layout.mask)
    error = (velocity.float() - velocity_target(clean, noise)).square().mean(1)
    motion = clean.std(2).mean(1)
    places = 0.5 + 0.5 * motion / motion.mean((1, 2), keepdim=True).clamp(min=1e-6)
    error = (error * places[:, None]).mean((2, 3))
    weight = (layout.levels > 0).float()
    return {"loss": (error * weight).sum() / weight.sum().clamp(min=1)}


def train_dit(config: DiTTraining, films: FilmLatents, text: TextEncoder, *, resume: bool = False) -> Iterator[dict]:
    """Train, yielding log records; the last one holds the model as `dit`."""
    torch.manual_seed(config.loop.seed)
    dit = DiT(TINY_DIT)
    _start_at_zero(dit)
    tokens_per_latent = films.latents.shape[-1] * films.latents.shape[-2] // 4

    def loss_at(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.loop.seed, step))
        if rng.uniform() < config.first_share:
            clean, captions = films.sample(rng, 4 * config.loop.batch_size, 0)
            layout = first_block_layout(rng, config, len(captions))
        else:
            clean, captions = films.sample(rng, config.loop.batch_size, config.run)
            layout = draw_layout(rng, config, tokens_per_latent)
        captions = ["" if rng.uniform() < config.drop_text else caption for caption in captions]
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(clean.shape, generator=generator)
        return dit_loss(dit, clean, text(*captions), layout, noise)

    yield from optimise(dit, loss_at, config.loop, resume=resume)
    yield {"dit": dit}


def _start_at_zero(dit: DiT) -> None:
    """Gates and the output begin at zero, so that every layer begins as the identity (DiT, arXiv 2212.09748)."""
    with torch.no_grad():
        dit.condition_embedder.time_proj.weight.zero_()
        dit.condition_embedder.time_proj.bias.zero_()
        for layer in dit.blocks.values():
            layer.scale_shift_table.zero_()
        dit.proj_out.weight.zero_()
        dit.proj_out.bias.zero_()
