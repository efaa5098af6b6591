"""Procedural films as latents on disk, encoded once: what the DiT is trained on.

Three sets, since what is hardest to learn is how a video begins, from nothing but text: pictures (first latents) by
the ten thousand, openings (a first block and the next) by the thousand, and long films by the hundred.

A long film is stored as the first latent of its video (the sink) and a run of latents. In half of the films the run
follows directly; in the others it is cut out of the film's next minutes, since that is what a model sees at inference:
the sink, a gap, and the recent past.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvid import worlds
from longvid.captions import caption
from longvid.models.vae import VAE

SINK = 1
BLOCK = 3
RUN = 15
CLIP = 3 * BLOCK
WARM_UP = 2
FURTHEST = 240


@dataclass(frozen=True, kw_only=True)
class FilmSet:
    """Films of one length; `first` is the address of the first, so that no two sets share a film."""

    name: str
    first: int
    num_films: int
    num_latents: int


PICTURES = FilmSet(name="pictures", first=100_000, num_films=30_000, num_latents=1)
OPENINGS = FilmSet(name="openings", first=200_000, num_films=10_000, num_latents=SINK + BLOCK)
LONG = FilmSet(name="long", first=0, num_films=850, num_latents=SINK + RUN)
FILM_SETS = (PICTURES, OPENINGS, LONG)


@dataclass(frozen=True, kw_only=True)
class Film:
    """A world and the index of the first latent of its run."""

    world: worlds.World
    start: int


def film_at(seed: int, index: int) -> Film:
    """The film of that address."""
    rng = np.random.default_rng((seed, index))
    world = worlds.sample_world(rng)
    return Film(world=world, start=SINK if index % 2 == 0 else int(rng.integers(SINK + 1, FURTHEST)))


@torch.no_grad()
def encode_film(vae: VAE, film: Film, num_latents: int) -> Tensor:
    """Normalised latents (c, num_latents, h, w): the film's first ones, or a sink and a run where it is long."""
    if num_latents <= SINK + BLOCK or film.start == SINK:
        return _encode(vae, film.world, 0, num_latents)[0]
    sink = _encode(vae, film.world, 0, SINK)
    run = _encode(vae, film.world, film.start - WARM_UP, WARM_UP + num_latents - SINK)[:, :, WARM_UP:]
    return torch.cat([sink, run], 2)[0]


def _encode(vae: VAE, world: worlds.World, first: int, count: int) -> Tensor:
    """Latents `first` to `first + count`. The encoder needs a few latents before it forgets where it began."""
    frames = worlds.draw(world, 4 * (count - 1) + 1, start=4 * first)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return vae.encode(video)[0]


def make_shard(path: Path, vae: VAE, seed: int, indices: range, num_latents: int) -> None:
    """Encode the films of a range of addresses into one safetensors file (bfloat16)."""
    latents = torch.stack([encode_film(vae, film_at(seed, i), num_latents).bfloat16() for i in indices])
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({"latents": latents, "indices": torch.tensor(list(indices))}, aside)
    aside.rename(path)


def make_latents(folder: Path, vae: VAE, seed: int, films: FilmSet, num_films: int, shard: int = 100) -> Iterator[int]:
    """Encode a set's films until its folder holds `num_films`, yielding the count; shards that are there are kept."""
    for start in range(0, num_films, shard):
        path = folder / films.name / f"{start:06d}.safetensors"
        if not path.exists():
            indices = range(films.first + start, films.first + min(start + shard, num_films))
            make_shard(path, vae, seed, indices, films.num_latents)
        yield min(start + shard, num_films)


class FilmLatents:
    """All films of a set in memory."""

    def __init__(self, folder: Path, seed: int, films: FilmSet):
        shards = [load_file(path) for path in sorted((folder / films.name).glob("*.safetensors"))]
        if not shards:
            raise ValueError(
                f"{folder / films.name} holds no latents; make them with: longvid train latents --out {folder.parent}"
            )
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.films = [film_at(seed, int(i)) for shard in shards for i in shard["indices"]]

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """Films (count, c, f, h, w), float32, and a caption for each."""
        chosen = rng.integers(0, len(self.films), count)
        return self.latents[torch.from_numpy(chosen)].float(), [caption(self.films[i].world, rng) for i in chosen]

    def sample_runs(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str], Tensor]:
        """Clips (count, c, SINK + CLIP, h, w) of long films, their captions, and which have a gap after the sink."""
        chosen = rng.integers(0, len(self.films), count)
        offsets = np.where(rng.uniform(size=count) < 0.7, 0, rng.integers(1, RUN - CLIP + 1, count))
        clips = torch.stack([
            torch.cat([self.latents[i, :, :SINK], self.latents[i, :, SINK + o : SINK + o + CLIP]], 1)
            for i, o in zip(chosen, offsets, strict=True)
        ]).float()  # fmt: skip
        has_gap = [o > 0 or self.films[i].start > SINK for i, o in zip(chosen, offsets, strict=True)]
        return clips, [caption(self.films[i].world, rng) for i in chosen], torch.tensor(has_gap)
