"""Procedural films as latents on disk, encoded once: what the DiT is trained on.

Three sets, since what is hardest to learn is how a video begins, from nothing but text: pictures (first latents) by
the ten thousand, openings (a first block and the next) by the thousand, and long films by the hundred.

A long film is stored as the first latent of its video (the sink) and a run of latents. In half of the films the run
follows directly; in the others it is cut out of the film's next minutes, since that is what a model sees at inference:
the sink, a gap, and the recent past.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvid import worlds
from longvid.captions import caption
from longvid.frames import to_video
from longvid.models.vae import VAE
from longvid.types import Video

SINK = 1
BLOCK = 3
RUN = 15
CLIP = 3 * BLOCK
WARM_UP = 2
FURTHEST = 240
ENCODED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class FilmSet:
    """Films of one length; `first` is the address of the first, so that no two sets share a film."""

    name: str
    first: int
    num_films: int
    num_latents: int


PICTURES = FilmSet(name="pictures", first=100_000, num_films=30_000, num_latents=1)
OPENINGS = FilmSet(name="openings", first=200_000, num_films=5_000, num_latents=SINK + BLOCK)
LONG = FilmSet(name="long", first=0, num_films=6_000, num_latents=SINK + RUN)
FILM_SETS = (PICTURES, OPENINGS, LONG)
HELD_OUT = FilmSet(name="held-out", first=300_000, num_films=64, num_latents=SINK + RUN)
"""Long films that validation sees and training does not."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """A world and the index of the first latent of its run."""

    world: worlds.World
    start: int


def film_at(seed: int, index: int, spins: float = 1.0) -> Film:
    """The film of that address, where things spin `spins` times as often as they have each other motion."""
    rng = np.random.default_rng((seed, index))
    world = worlds.sample_world(rng, spins)
    return Film(world=world, start=SINK if index % 2 == 0 else int(rng.integers(SINK + 1, FURTHEST)))


@torch.no_grad()
def encode_film(vae: VAE, film: Film, num_latents: int) -> Tensor:
    """Normalised latents (c, num_latents, h, w): the film's first ones, or a sink and a run where it is long."""
    if is_whole(film, num_latents):
        return vae.encode(_frames(film.world, 0, num_latents))[0][0]
    sink = vae.encode(_frames(film.world, 0, SINK))[0]
    run = vae.encode(_frames(film.world, film.start - WARM_UP, WARM_UP + num_latents - SINK))[0][:, :, WARM_UP:]
    return torch.cat([sink, run], 2)[0]


@torch.no_grad()
def encode_films(vae: VAE, films: Sequence[Film], num_latents: int) -> Tensor:
    """`encode_film` of each, (films, c, num_latents, h, w), in batches and bfloat16 products: several times faster."""
    latents = [None] * len(films)
    whole = [i for i, film in enumerate(films) if is_whole(film, num_latents)]
    cut = sorted(set(range(len(films))) - set(whole))
    for i, found in _encoded(vae, [(i, _frames(films[i].world, 0, num_latents)) for i in whole]):
        latents[i] = found
    runs = ((i, _frames(films[i].world, films[i].start - WARM_UP, WARM_UP + num_latents - SINK)) for i in cut)
    sinks = _encoded(vae, [(i, _frames(films[i].world, 0, SINK)) for i in cut])
    for (i, sink), (_, run) in zip(sinks, _encoded(vae, list(runs)), strict=True):
        latents[i] = torch.cat([sink, run[:, WARM_UP:]], 1)
    return torch.stack(latents)


def is_whole(film: Film, num_latents: int) -> bool:
    """Whether that many latents are the film's first ones: it is short, or nothing is cut out after the sink."""
    return num_latents <= SINK + BLOCK or film.start == SINK


def _encoded(vae: VAE, videos: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Each number with the normalised latents (c, f, h, w) of its video."""
    for first in range(0, len(videos), ENCODED_AT_ONCE):
        some = videos[first : first + ENCODED_AT_ONCE]
        with torch.autocast("cpu", torch.bfloat16):
            latents, _ = vae.encode(torch.cat([video for _, video in some]))
        yield from zip([i for i, _ in some], latents.float(), strict=True)


def _frames(world: worlds.World, first: int, count: int) -> Video:
    """Pixels of latents `first` to `first + count`. The encoder needs a few before it forgets where it began."""
    frames = worlds.draw(world, 4 * (count - 1) + 1, start=4 * first)
    return to_video(torch.from_numpy(frames)[None])


def make_shard(path: Path, vae: VAE, seed: int, indices: range, num_latents: int) -> None:
    """Encode the films of a range of addresses into one safetensors file (bfloat16)."""
    latents = encode_films(vae, [film_at(seed, i) for i in indices], num_latents).bfloat16()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({"latents": latents, "indices": torch.tensor(list(indices)), "seed": torch.tensor(seed)}, aside)
    aside.rename(path)


def make_latents(folder: Path, vae: VAE, seed: int, films: FilmSet, num_films: int, shard: int = 100) -> Iterator[int]:
    """Encode a set's films until its folder holds `num_films`, yielding the count; shards that are there are kept."""
    for start in range(0, num_films, shard):
        path = folder / films.name / f"{start:06d}.safetensors"
        if not path.exists():
            indices = range(films.first + start, films.first + min(start + shard, num_films))
            make_shard(path, vae, seed, indices, films.num_latents)
        yield min(start + shard, num_films)


def holds_films(folder: Path) -> bool:
    """Whether that folder has films that `make_latents` encoded."""
    return (folder / LONG.name).is_dir() and any((folder / LONG.name).glob("*.safetensors"))


class FilmLatents:
    """All films of a set in memory."""

    def __init__(self, folder: Path, films: FilmSet):
        shards = [load_file(path) for path in sorted((folder / films.name).glob("*.safetensors"))]
        if not shards:
            raise ValueError(
                f"{folder / films.name} holds no latents; make them with: longvid train latents --out {folder.parent}"
            )
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.films = [film_at(int(shard["seed"]), int(i)) for shard in shards for i in shard["indices"]]

    def beginnings(self, num_latents: int) -> "FilmLatents":
        """The first latents of those films that have no gap after the first."""
        chosen = [i for i, film in enumerate(self.films) if film.start == SINK]
        cut = FilmLatents.__new__(FilmLatents)
        cut.latents, cut.films = self.latents[chosen, :, :num_latents], [self.films[i] for i in chosen]
        return cut

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
