"""Train the embedded model's text encoder: its states must tell what a caption of a procedural film says.

Each attribute has one query that attends to the states, as the DiT's cross-attention will, and a linear readout.
The queries and readouts are thrown away; the encoder stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid import worlds
from longvid.captions import caption
from longvid.models.text import TextEncoder, make_small_text_encoder
from pipelines.optimise import LoopConfig, optimise


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """Nothing to choose beyond the loop."""

    loop: LoopConfig


class Reader(nn.Module):
    """The encoder with a query and a readout for each attribute."""

    def __init__(self, encoder: nn.Module, dim: int):
        super().__init__()
        self.encoder = encoder
        self.queries = nn.Parameter(0.1 * torch.randn(len(worlds.ATTRIBUTES), dim))
        self.keys = nn.Linear(dim, dim)
        self.readouts = nn.ModuleDict({name: nn.Linear(dim, len(words)) for name, words in worlds.ATTRIBUTES.items()})

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits (b, classes) by attribute, from tokens and mask (b, l)."""
        states = self.encoder(tokens, mask)
        scores = self.queries @ self.keys(states).mT / states.shape[-1] ** 0.5
        read = scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ states
        return {name: readout(read[:, i]) for i, (name, readout) in enumerate(self.readouts.items())}


def caption_batch(rng: np.random.Generator, count: int) -> tuple[list[str], dict[str, Tensor]]:
    """Captions of random films and what each film's attributes are."""
    films = [worlds.sample_world(rng) for _ in range(count)]
    said = [worlds.attributes(film) for film in films]
    labels = {name: torch.tensor([one[name] for one in said]) for name in worlds.ATTRIBUTES}
    return [caption(film, rng) for film in films], labels


def train_text(config: TextTraining, *, resume: bool = False) -> Iterator[dict]:
    """Train, yielding log records (accuracy by attribute group); the last one holds the encoder as `text`."""
    torch.manual_seed(config.loop.seed)
    encoder, tokenizer = make_small_text_encoder(seed=config.loop.seed)
    reader = Reader(encoder, encoder.config.d_model)

    def loss_at(step: int) -> dict[str, Tensor]:
        captions, labels = caption_batch(np.random.default_rng((config.loop.seed, step)), config.loop.batch_size)
        logits = reader(*tokenizer(captions, max(map(tokenizer.count, captions))))
        losses = torch.stack([F.cross_entropy(logits[name], labels[name]) for name in labels])
        right = {name: (logits[name].argmax(-1) == labels[name]).float().mean() for name in labels}
        groups = {f"right_{word}": torch.stack([v for k, v in right.items() if k.startswith(word)]).mean()
                  for word in ("shape", "colour", "motion", "background")}  # fmt: skip
        return {"loss": losses.mean(), **groups}

    yield from optimise(reader, loss_at, config.loop, resume=resume)
    yield {"text": TextEncoder(encoder, tokenizer)}
