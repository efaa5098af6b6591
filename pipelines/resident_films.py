"""Encoded films that stay on the device, with their text: what the DiT sees in a step is drawn there, by index.

The same three kinds of batches as `pipelines/train_dit.py` makes on the host, all of them in every step. Nothing is
read from the device or sent to it, so a step can be a CUDA graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longvid.flow import add_noise, denoise
from longvid.levels import LevelSampler, block_causal_mask
from longvid.models.attention import visible_in
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.schedule import shift_level
from longvid.types import Latents, Text
from pipelines.film_latents import BLOCK, CLIP, LONG, OPENINGS, PICTURES, RUN, SINK
from pipelines.train_dit import (
    CLEAN,
    CLIP_BLOCKS,
    COPIES,
    Batch,
    DiTTraining,
    Teacher,
    clip_levels,
    latent_errors,
    opening_levels,
    velocity_of,
)

TOKENS_PER_LATENT = 64
ROWS = 20_000
"""Rows of levels that are drawn once, of which a step takes any."""
READ_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What a step holds: films whose first latent is seen at `COPIES` levels, openings, and long clips of both masks.

    `weights` are those of the losses of pictures, openings and long clips. `recalled_share` of the long clips see their
    context as a model makes it out, `untold_share` of these as it does without their text. Kinds of which no films
    are there are left out.
    """

    pictures: int = 128
    openings: int = 64
    causal: int = 64
    joint: int = 8
    weights: tuple[float, float, float] = (0.3, 0.2, 0.5)
    recalled_share: float = 0.25
    untold_share: float = 0.5

    def scaled(self, scale: float) -> "StepSizes":
        """The same with so many times as much."""
        names = ("pictures", "openings", "causal", "joint")
        return replace(self, **{name: max(1, round(scale * getattr(self, name))) for name in names})


class FilmSetOnDevice:
    """Latents (films, c, f, h, w), bfloat16, and text states of several captions each (films, captions, tokens, d)."""

    def __init__(self, found: Mapping, encoder: TextEncoder, device: str):
        self.latents = found["latents"].to(device)
        self.is_cut = found["is_cut"].to(device)
        captions = [text for some in found["captions"] for text in some]
        states = [read(encoder, captions[i : i + READ_AT_ONCE]) for i in range(0, len(captions), READ_AT_ONCE)]
        self.states = torch.cat(states).unflatten(0, (len(self.latents), -1))

    def draw(self, count: int) -> tuple[Tensor, Latents, Text]:
        """Indices of some films, their latents in float32 and the text states of one caption each."""
        device = self.latents.device
        film = torch.randint(len(self.latents), (count,), device=device)
        which = torch.randint(self.states.shape[1], (count,), device=device)
        return film, self.latents[film].float(), self.states[film, which]


@torch.no_grad()
def read(encoder: TextEncoder, captions: list[str]) -> Text:
    """Text states in bfloat16."""
    tokens, mask = (x.to(encoder.device) for x in encoder.tokenizer(captions))
    with torch.autocast(encoder.device.type, torch.bfloat16):
        states = encoder.encoder(tokens, mask)
    return (states * mask[..., None]).bfloat16()


class ResidentFilms:
    """Draws batches of each kind, with the text states of their clips."""

    def __init__(self, sets: Mapping[str, Mapping], encoder: TextEncoder, config: DiTTraining, sizes: StepSizes):
        device = config.device
        self.config, self.sizes = config, sizes
        self.encoder, self.sets = encoder, {}
        for name, found in sets.items():
            self.add(name, found)
        self.no_text = encoder("").to(device).bfloat16()
        rng = np.random.default_rng(config.loop.seed)
        mixed = [LevelSampler.IID if rng.uniform() >= config.staircase_share else config.levels for _ in range(ROWS)]
        self.clip_rows = _to_device([clip_levels(rng, sampler, config) for sampler in mixed], device)
        self.opening_rows = _to_device([opening_levels(rng, config.levels) for _ in range(ROWS)], device)
        block = torch.repeat_interleave(torch.arange(len(CLIP_BLOCKS)), torch.tensor(CLIP_BLOCKS))
        self.block = block.to(device)
        self.opening_mask = bias(block_causal_mask(CLIP_BLOCKS[:2])).to(device)
        masks = (bias(block_causal_mask(CLIP_BLOCKS)), bias(torch.ones(len(block), len(block), dtype=torch.bool)))
        counts = (sizes.causal, sizes.joint)
        self.clip_mask = torch.cat([m.repeat(n, 1, 1, 1) for m, n in zip(masks, counts, strict=True)]).to(device)

    def add(self, name: str, found: Mapping) -> None:
        """One more set, of that name."""
        self.sets[name] = FilmSetOnDevice(found, self.encoder, self.config.device)

    def kinds(self) -> list[tuple[Callable[[], tuple[Batch, Text]], float]]:
        """What draws a batch of each kind of which there are films, and the weight of its loss."""
        every = zip(
            (PICTURES, OPENINGS, LONG), (self.pictures, self.openings, self.clips), self.sizes.weights, strict=True
        )
        return [(draw, weight) for films, draw, weight in every if films.name in self.sets]

    def pictures(self) -> tuple[Batch, Text]:
        """First latents, each at levels that are spread evenly."""
        _, clean, states = self.sets[PICTURES.name].draw(self.sizes.pictures)
        levels = picture_levels(len(clean), self.config.shift, clean.device)
        clean = clean.repeat_interleave(COPIES, 0)
        batch = Batch(clean=clean, captions=[], levels=levels, counts=levels > CLEAN, mask=None)
        return batch, self._some_dropped(states)

    def openings(self) -> tuple[Batch, Text]:
        """A first block and the next."""
        _, clean, states = self.sets[OPENINGS.name].draw(self.sizes.openings)
        return self._batch(clean, _any(self.opening_rows, len(clean)), self.opening_mask), self._some_dropped(states)

    def clips(self) -> tuple[Batch, Text]:
        """Sink, often a gap, and run; the last ones attend jointly."""
        films, count = self.sets[LONG.name], self.sizes.causal + self.sizes.joint
        film, latents, states = films.draw(count)
        device = latents.device
        offset = torch.randint(1, RUN - CLIP + 1, (count,), device=device)
        offset = torch.where(torch.rand(count, device=device) < 0.7, 0, offset)
        place = SINK + offset[:, None] + torch.arange(CLIP, device=device)
        place = place[:, None, :, None, None].expand(-1, latents.shape[1], -1, *latents.shape[3:])
        clean = torch.cat([latents[:, :, :SINK], latents.gather(2, place)], 2)
        batch = self._batch(clean, _any(self.clip_rows, count), self.clip_mask)
        batch.counts[:, : SINK + BLOCK] &= ~((offset > 0) | films.is_cut[film])[:, None]
        return batch, self._some_dropped(states)

    def without_some(self, states: Text, share: float) -> Text:
        """The states, of a share of the clips those of no text."""
        is_dropped = torch.rand(len(states), 1, 1, device=states.device) < share
        return torch.where(is_dropped, self.no_text, states)

    def _some_dropped(self, states: Text) -> Text:
        return self.without_some(states, self.config.drop_text)

    def _batch(self, clean: Latents, rows: Tensor, mask: Tensor) -> Batch:
        levels = shift_level(rows, self.config.shift).index_select(1, self.block[: clean.shape[2]])
        return Batch(clean=clean, captions=[], levels=levels, counts=levels > CLEAN, mask=mask)


def picture_levels(count: int, shift: float, device: torch.device) -> Tensor:
    """Levels (count * COPIES, 1), those of each picture spread evenly before the shift."""
    spread = torch.arange(COPIES, device=device) + torch.rand(count, COPIES, device=device)
    return shift_level((spread / COPIES).view(-1, 1), shift)


def bias(mask: Tensor) -> Tensor:
    """What attention adds to scores (1, 1, tokens, tokens), bfloat16, for a mask of latents that is True where one may
    see another."""
    return visible_in(mask, TOKENS_PER_LATENT, torch.device("cpu"))[None, None].bfloat16()


def step_loss(dit: DiT, films: ResidentFilms, recaller: DiT, teacher: Teacher | None) -> Tensor:
    """The loss of a step: the three kinds' means over the latents that count, weighted."""
    config, sizes, total = films.config, films.sizes, 0.0
    first_weight = torch.ones(dit.config.in_channels, device=films.no_text.device)
    for kind, weight in films.kinds():
        batch, states = kind()
        if kind == films.clips and sizes.recalled_share:
            known = films.without_some(states, sizes.untold_share)
            batch = recalled(batch, known, recaller, config, sizes.recalled_share)
        errors, counts, _ = latent_errors(dit, batch, states, torch.randn_like(batch.clean), first_weight,
                                          dtype=config.dtype, fps=config.fps, teacher=teacher)  # fmt: skip
        total = total + weight * (errors * counts).sum() / counts.sum().clamp(min=1)
    return total


def recalled(batch: Batch, states: Text, dit: DiT, config: DiTTraining, share: float) -> Batch:
    """The batch, in whose first clips, so large a share, the context is as a model makes it out in one step from noise.

    What a model has made is never quite right, and what goes on from it should not go on with its mistakes: made out
    without its text, a thing has often the outline of another. `dit` has no gradient.
    """
    count = round(share * len(batch.clean))
    if not count:
        return batch
    clean, mask = batch.clean[:count], None if batch.mask is None else batch.mask[:count]
    level = 0.2 + 0.6 * torch.rand(count, 1, device=clean.device)
    levels = level.expand(-1, clean.shape[2])
    noisy = add_noise(clean, torch.randn_like(clean), levels)
    soiled = Batch(clean=clean, captions=[], levels=levels, counts=batch.counts[:count], mask=mask)
    velocity = velocity_of(dit, soiled, noisy, states[:count], dtype=config.dtype, fps=config.fps)
    is_context = (batch.levels[:count] <= CLEAN)[:, None, :, None, None]
    guess = torch.where(is_context, denoise(noisy, velocity, levels), clean)
    return replace(batch, clean=torch.cat([guess, batch.clean[count:]]))


def _to_device(rows: list[np.ndarray], device: str) -> Tensor:
    return torch.from_numpy(np.stack(rows)).float().to(device)


def _any(rows: Tensor, count: int) -> Tensor:
    return rows[torch.randint(len(rows), (count,), device=rows.device)]
