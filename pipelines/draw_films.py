"""Procedural films drawn by all cores and encoded on a GPU: tens of thousands within minutes.

What `pipelines/film_latents.py` makes one after the other and keeps in shards; here processes draw into memory that
they share, since what is drawn (3 MB a film) would take longer to send than to draw.
"""

import mmap
import multiprocessing
from collections.abc import Iterator, Mapping
from multiprocessing.pool import AsyncResult, Pool
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from longvid import worlds
from longvid.captions import caption
from longvid.frames import to_video
from longvid.models.vae import VAE
from longvid.types import Latents
from pipelines.film_latents import BLOCK, RUN, SINK, WARM_UP, FilmSet, film_at, is_whole

AT_ONCE = 32
"""Films that a process draws into one slot of the memory, and that are encoded together: all with a gap after the first
latent, or all without."""
CAPTIONS = 4
"""Captions of each film."""
SIDE = 128

_slots = np.empty(0, np.uint8)  # (slots, films, frames, height, width, 3); a process that is forked has it, too


def draw_and_encode(
    vae: VAE, sets: Mapping[FilmSet, int], *, seed: int, workers: int, seconds: float, spins: float = 1.0
) -> Iterator[tuple[str, dict]]:
    """Yield the name of each set and its `latents` (films, c, f, h, w) in bfloat16, `captions` and `is_cut` (films).

    `sets` says how many films of each are wanted, which is rounded up; after `seconds` no more are begun. Things spin
    `spins` times as often as they have each other motion.
    Linux only: processes are forked. Raises ValueError if a set would be empty.
    """
    global _slots
    stop = perf_counter() + seconds
    _slots = _shared(2 * workers, SINK + 4 * (WARM_UP + RUN))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for films, count in sets.items():
            latents, captions, is_cut = [], [], []
            for slot, found in _drawn(pool, films, count, seed, stop, spins):
                has_gap = films.num_latents > SINK + BLOCK and len(latents) % 2 == 1
                drawn = _slots[slot, :, : _num_drawn(films.num_latents, is_cut=has_gap)]
                frames = torch.from_numpy(drawn).to(next(vae.parameters()).device)
                latents.append(encode_drawn(vae, frames, is_cut=has_gap).bfloat16().cpu())
                captions += found
                is_cut += [has_gap] * AT_ONCE
            if not latents:
                raise ValueError(f"{seconds} seconds leave no time for {films.name}; give more")
            yield films.name, {"latents": torch.cat(latents), "captions": captions, "is_cut": torch.tensor(is_cut)}


def draw_anywhere(count: int, num_frames: int, *, seed: int, workers: int) -> np.ndarray:
    """Films (count, num_frames, height, width, 3), uint8, from any time of theirs; `count` is rounded up."""
    global _slots
    _slots = _shared(-(-count // AT_ONCE), num_frames)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.starmap(_draw_anywhere, [(slot, seed) for slot in range(len(_slots))], 1)
    return _slots.reshape(-1, *_slots.shape[2:])


@torch.no_grad()
def encode_drawn(vae: VAE, frames: Tensor, *, is_cut: bool) -> Latents:
    """Latents (films, c, f, h, w) of drawn frames (films, frames, height, width, 3), uint8.

    Of films with a gap the first frame is the sink's, and the run's follow, `WARM_UP` latents before it.
    """
    video = to_video(frames)
    with torch.autocast(frames.device.type, torch.bfloat16):
        if not is_cut:
            return vae.encode(video)[0]
        sink = vae.encode(video[:, :, :1])[0]
        run = vae.encode(video[:, :, 1:])[0]
        return torch.cat([sink, run[:, :, WARM_UP:]], 2)


def _num_drawn(num_latents: int, *, is_cut: bool) -> int:
    """Frames that are drawn of a film of so many latents."""
    run = WARM_UP + num_latents - SINK
    return 1 + 4 * (run - 1) + 1 if is_cut else 4 * (num_latents - 1) + 1


def _shared(slots: int, num_frames: int) -> np.ndarray:
    """Memory that processes share which are forked afterwards."""
    shape = (slots, AT_ONCE, num_frames, SIDE, SIDE, 3)
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)


def _drawn(
    pool: Pool, films: FilmSet, count: int, seed: int, stop: float, spins: float
) -> Iterator[tuple[int, list[list[str]]]]:
    """Slots as they are filled, in order, with their films' captions; a slot that was yielded is drawn into again."""
    firsts = iter([films.first + i + parity for i in range(0, count, 2 * AT_ONCE) for parity in (0, 1)])
    waiting: list[AsyncResult] = []

    def begin(slot: int) -> None:
        first = next(firsts, None)
        if first is not None and perf_counter() < stop:
            waiting.append(pool.apply_async(_draw, (slot, seed, first, films.num_latents, spins)))

    for slot in range(len(_slots)):
        begin(slot)
    while waiting:
        slot, captions = waiting.pop(0).get()
        yield slot, captions
        begin(slot)


def _draw(slot: int, seed: int, first: int, num_latents: int, spins: float) -> tuple[int, list[list[str]]]:
    """Draw every second film from an address on."""
    captions = []
    for i, frames in enumerate(_slots[slot]):
        index = first + 2 * i
        film = film_at(seed, index, spins)
        is_cut = not is_whole(film, num_latents)
        count = _num_drawn(num_latents, is_cut=is_cut)
        frames[:1] = worlds.draw(film.world, 1)
        if count > 1:
            frames[1:count] = worlds.draw(film.world, count - 1, start=4 * (film.start - WARM_UP) if is_cut else 1)
        rng = np.random.default_rng((seed, index, 1))
        captions.append([caption(film.world, rng) for _ in range(CAPTIONS)])
    return slot, captions


def _draw_anywhere(slot: int, seed: int) -> None:
    for i, frames in enumerate(_slots[slot]):
        rng = np.random.default_rng((seed, slot, i))
        frames[:] = worlds.draw(worlds.sample_world(rng), len(frames), start=int(rng.integers(0, 2000)))
