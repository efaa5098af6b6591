"""Train the models in the box on one GPU, in minutes: python scripts/train_on_gpu.py PART --work DIR --seconds S ...

Parts, in this order: `films` draws procedural films on all cores and encodes them; `base` goes on with a many-step
model; `guided` teaches one forward what that says with guidance; `few` makes few steps of it (consistency
distillation); `decoder` trains the VAE's decoder on. What is learned is what `longvid train dit` and `decoder` teach;
here films stay on the GPU, pictures, openings and long clips are all in every step, and a step is one CUDA graph.
"""

import argparse
import math
import mmap
import multiprocessing as mp
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from longvid import worlds
from longvid.captions import caption
from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from longvid.flow import add_noise, guide, velocity_target
from longvid.levels import LevelSampler, block_causal_mask, draw_levels, soil
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from pipelines.film_latents import BLOCK, CLIP, LONG, OPENINGS, PICTURES, RUN, SINK, WARM_UP, FilmSet, film_at
from pipelines.optimizers import Optimizers
from pipelines.train_decoder import DecoderTraining, decoder_loss
from pipelines.train_dit import CLEAN, COPIES, Batch, velocity_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPTIONS = 4
"""Captions of each film, whose text is read once for all of training."""
AT_ONCE = 32
"""Films that a process draws into one piece of memory, and that are encoded together."""
MOST_FRAMES = SINK + 4 * (WARM_UP + RUN)
BLOCKS = (SINK, *(BLOCK,) * (CLIP // BLOCK))
"""Latents of each block of a long clip."""
BANK = 50_000
"""Rows of levels that are drawn once."""


# Films ----------------------------------------------------------------------------------------------------------------


def shared_frames(slots: int) -> np.ndarray:
    """Memory that processes share: (slots, films, frames, height, width, 3)."""
    shape = (slots, AT_ONCE, MOST_FRAMES, 128, 128, 3)
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)


def draw_films(job: tuple[int, int, int, int]) -> tuple[int, int, list[list[str]]]:
    """Draw `AT_ONCE` films of a parity from an address on into a slot; their captions."""
    seed, first, num_latents, slot = job
    texts = []
    for i in range(AT_ONCE):
        index = first + 2 * i
        film, frames = film_at(seed, index), FRAMES[slot, i]
        if num_latents <= SINK + BLOCK or film.start == SINK:
            count = 4 * (num_latents - 1) + 1
            frames[:count] = worlds.draw(film.world, count)
        else:
            frames[:1] = worlds.draw(film.world, 1)
            count = 4 * (WARM_UP + num_latents - SINK - 1) + 1
            frames[1 : 1 + count] = worlds.draw(film.world, count, start=4 * (film.start - WARM_UP))
        rng = np.random.default_rng((seed, index, 1))
        texts.append([caption(film.world, rng) for _ in range(CAPTIONS)])
    return first, slot, texts


def draw_rows(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unshifted levels: of long clips (rows, blocks) and of openings (rows, 2)."""
    seed, count = job
    rng, long, short = np.random.default_rng((seed, 7)), [], []
    blocks = len(BLOCKS)
    for _ in range(count):
        sampler = LevelSampler.IID if rng.uniform() < 0.3 else LevelSampler.STAIRCASE
        num_clean = 0 if rng.uniform() < 0.3 else int(rng.integers(1, blocks))
        levels = np.concatenate([np.zeros(num_clean), draw_levels(sampler, rng, blocks - num_clean)])
        long.append(soil(rng, levels, 0.1))
        kind = rng.uniform()
        if kind < 0.55:
            levels = np.array([rng.uniform(0, 0.05) if rng.uniform() < 0.6 else 0.0, rng.uniform()])
        elif kind < 0.8:
            levels = draw_levels(LevelSampler.STAIRCASE, rng, 2)
        else:
            level = rng.uniform()
            levels = np.array([level, min(1.0, level + 1 / 16)])
        short.append(levels)
    return np.stack(long), np.stack(short)


def encode(vae: VAE, frames: Tensor, num_latents: int, is_cut: bool) -> Tensor:
    """Latents (films, c, num_latents, h, w) of drawn frames (films, frames, height, width, 3), uint8."""
    video = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        if not is_cut:
            return vae.encode(video[:, :, : 4 * (num_latents - 1) + 1])[0]
        sink = vae.encode(video[:, :, :1])[0]
        run = vae.encode(video[:, :, 1 : 2 + 4 * (WARM_UP + num_latents - SINK - 1)])[0]
        return torch.cat([sink, run[:, :, WARM_UP:]], 2)


def make_films(options: argparse.Namespace) -> None:
    """Draw and encode films for so many seconds at most, and write `films.pt`."""
    global FRAMES
    start, workers = time.perf_counter(), options.workers
    FRAMES = shared_frames(2 * workers)
    pool = mp.get_context("fork").Pool(workers)
    rows = pool.map_async(draw_rows, [(options.seed + i, BANK // workers) for i in range(workers)], 1)
    vae, found = load_vae(open_folder(options.model), torch.float32, DEVICE).eval(), {}
    for films, count in zip((PICTURES, OPENINGS, LONG), options.films, strict=True):
        latents, texts, cut = [], [], []
        for first, slot, words in spread(pool, options.seed, films, count, 2 * workers):
            used = films.num_latents if films is not LONG else SINK + RUN
            frames = torch.from_numpy(FRAMES[slot])[:, : 4 * (WARM_UP + used)]
            is_cut = films is LONG and first % 2 == 1
            latents.append(encode(vae, frames[:, : 1 if used == 1 else None].to(DEVICE), used, is_cut).bfloat16())
            texts += words
            cut += [is_cut] * len(words)
            if options.seconds and time.perf_counter() - start > options.seconds:
                break
        found[films.name] = {"latents": torch.cat(latents).cpu(), "texts": texts, "is_cut": torch.tensor(cut)}
        print(f"{films.name}: {len(texts)} films, {time.perf_counter() - start:.1f} s", flush=True)
    long, short = (torch.from_numpy(np.concatenate(bank)).float() for bank in zip(*rows.get(), strict=True))
    pool.terminate()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.save({"films": found, "long": long, "openings": short}, options.work / "films.pt")
    print(f"films written after {time.perf_counter() - start:.1f} s", flush=True)


def spread(pool, seed: int, films: FilmSet, count: int, slots: int) -> Iterator[tuple[int, int, list[list[str]]]]:
    """Films of a set as they come, each slot drawn into again once it was taken."""
    firsts = [first + parity for first in range(0, count, 2 * AT_ONCE) for parity in (0, 1)]
    jobs, waiting = iter(firsts), []
    for slot in range(slots):
        if (first := next(jobs, None)) is not None:
            waiting.append(pool.apply_async(draw_films, ((seed, films.first + first, films.num_latents, slot),)))
    while waiting:
        done = next((job for job in waiting if job.ready()), None) or waiting[0]
        waiting.remove(done)
        first, slot, texts = done.get()
        yield first, slot, texts
        if (following := next(jobs, None)) is not None:
            waiting.append(pool.apply_async(draw_films, ((seed, films.first + following, films.num_latents, slot),)))


# Data on the GPU ------------------------------------------------------------------------------------------------------


class Films:
    """A set's latents and text states, resident; everything is drawn by index on the device."""

    def __init__(self, latents: Tensor, ids: Tensor, encoder: nn.Module):
        self.latents = latents.to(DEVICE)
        states = []
        for some in ids.flatten(0, 1).split(4096):
            some = some.to(DEVICE).long()
            seen = (some > 0).long()
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
                states.append((encoder(some, seen).last_hidden_state * seen[..., None]).bfloat16())
        self.states = torch.cat(states).view(*ids.shape[:2], *states[0].shape[1:])

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (count, c, f, h, w) in float32, text states (count, tokens, d), and the films' indices."""
        film = torch.randint(len(self.latents), (count,), device=DEVICE)
        which = torch.randint(self.states.shape[1], (count,), device=DEVICE)
        return self.latents[film].float(), self.states[film, which], film


def token_ids(texts: list[list[str]], length: int) -> Tensor:
    """ByT5's tokens (films, captions, length): bytes, three further, an end mark and padding."""
    ids = np.zeros((len(texts), CAPTIONS, length), np.uint8)
    for i, some in enumerate(texts):
        for j, text in enumerate(some):
            known = np.frombuffer(text.encode(), np.uint8)[: length - 1]
            ids[i, j, : len(known)] = known + 3
            ids[i, j, len(known)] = 1
    return torch.from_numpy(ids)


def random_films() -> dict:
    """Films that show nothing, to compile and to time with."""
    sets = {films.name: {"latents": torch.randn(64, 8, films.num_latents, 16, 16).bfloat16(),
                         "texts": [["a red ball"] * CAPTIONS] * 64,
                         "is_cut": torch.arange(64) % 2 == 1} for films in (PICTURES, OPENINGS, LONG)}  # fmt: skip
    long, short = draw_rows((0, 200))
    return {"films": sets, "long": torch.from_numpy(long).float(), "openings": torch.from_numpy(short).float()}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Clips of each kind in a step."""

    pictures: int = 128
    openings: int = 64
    long: int = 64
    joint: int = 8


class Data:
    """Draws the three kinds of batches, all on the device."""

    def __init__(self, made: dict, text: TextEncoder, sizes: Sizes, shift: float, drop_text: float):
        self.sizes, self.shift, self.drop_text = sizes, shift, drop_text
        self.sets = {name: Films(found["latents"], token_ids(found["texts"], text.max_length), text.encoder)
                     for name, found in made["films"].items()}  # fmt: skip
        self.is_cut = made["films"][LONG.name]["is_cut"].to(DEVICE)
        self.rows = {name: made[name].to(DEVICE) for name in ("long", "openings")}
        self.no_text = text("").to(DEVICE).bfloat16()
        causal, joint = (hidden(mask) for mask in (block_causal_mask(BLOCKS), torch.ones(10, 10, dtype=torch.bool)))
        self.long_mask = torch.stack([causal] * sizes.long + [joint] * sizes.joint)[:, None]
        self.blocks = torch.repeat_interleave(torch.arange(len(BLOCKS)), torch.tensor(BLOCKS)).to(DEVICE)
        self.openings_mask = hidden(block_causal_mask(BLOCKS[:2]))

    def pictures(self) -> tuple[Batch, Tensor]:
        """First latents, each at levels that are spread evenly."""
        clean, states, _ = self.sets[PICTURES.name].draw(self.sizes.pictures)
        spread = torch.arange(COPIES, device=DEVICE) + torch.rand(len(clean), COPIES, device=DEVICE)
        return self._batch(clean.repeat_interleave(COPIES, 0), spread.view(-1, 1) / COPIES, (1,), None), states

    def openings(self) -> tuple[Batch, Tensor]:
        """A first block and the next."""
        clean, states, _ = self.sets[OPENINGS.name].draw(self.sizes.openings)
        return self._batch(clean, self._rows("openings", len(clean)), BLOCKS[:2], self.openings_mask), states

    def long(self) -> tuple[Batch, Tensor]:
        """Sink, often a gap, and run; the last few attend jointly."""
        count = self.sizes.long + self.sizes.joint
        found, states, film = self.sets[LONG.name].draw(count)
        offset = torch.randint(1, RUN - CLIP + 1, (count,), device=DEVICE)
        offset = torch.where(torch.rand(count, device=DEVICE) < 0.7, 0, offset)
        place = SINK + offset[:, None] + torch.arange(CLIP, device=DEVICE)
        run = found.gather(2, place[:, None, :, None, None].expand(-1, found.shape[1], -1, *found.shape[3:]))
        batch = self._batch(torch.cat([found[:, :, :SINK], run], 2), self._rows("long", count), BLOCKS, self.long_mask)
        has_gap = (offset > 0) | self.is_cut[film]
        batch.counts[:, : SINK + BLOCK] &= ~has_gap[:, None]
        return batch, states

    def _rows(self, name: str, count: int) -> Tensor:
        return self.rows[name][torch.randint(len(self.rows[name]), (count,), device=DEVICE)]

    def _batch(self, clean: Tensor, levels: Tensor, sizes: tuple[int, ...], mask: Tensor | None) -> Batch:
        levels = self.shift * levels / (1 + (self.shift - 1) * levels)
        levels = levels.index_select(1, self.blocks[: sum(sizes)])
        return Batch(clean=clean, captions=[], levels=levels, counts=levels > CLEAN, mask=mask)

    def without_text(self, states: Tensor) -> Tensor:
        """Text states, those of a share of the clips dropped."""
        is_dropped = torch.rand(len(states), 1, 1, device=DEVICE) < self.drop_text
        return torch.where(is_dropped, self.no_text, states)


def hidden(mask: Tensor) -> Tensor:
    """0 where a token may see another and minus infinity elsewhere, of a mask of latents."""
    seen = mask.repeat_interleave(64, 0).repeat_interleave(64, 1)
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).bfloat16().to(DEVICE)


# Losses ---------------------------------------------------------------------------------------------------------------


def says(dit: DiT, batch: Batch, noisy: Tensor, states: Tensor) -> Tensor:
    """The velocity of a model that is not trained."""
    return velocity_of(dit, batch, noisy, states, dtype="bfloat16", fps=16)


def recalled(dit: DiT, batch: Batch, noise: Tensor, states: Tensor, share: float) -> Tensor:
    """Clean latents, of a share of the clips the context as the model itself makes it out in one step from noise.

    What a model has made is never quite right, and it should not go on from its own mistakes.
    """
    level = (0.2 + 0.6 * torch.rand(len(noise), 1, device=DEVICE)).expand_as(batch.levels)
    soiled = add_noise(batch.clean, noise, level)
    velocity = says(dit, replace(batch, levels=level), soiled, states)
    guess = soiled - level[:, None, :, None, None] * velocity
    chosen = (torch.rand(len(noise), 1, device=DEVICE) < share) & (batch.levels <= CLEAN)
    return torch.where(chosen[:, None, :, None, None], guess, batch.clean)


Target = Callable[[Batch, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of a batch, its noisy latents, noise and text: what the velocity should be, and a weight per latent (b, f)."""


def to_films(batch: Batch, noisy: Tensor, noise: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Flow matching."""
    return velocity_target(batch.clean, noise), torch.ones_like(batch.levels)


@dataclass(frozen=True, kw_only=True)
class ToGuidance:
    """What the teacher says with guidance (arXiv 2210.03142, section 3.1)."""

    teacher: DiT
    no_text: Tensor
    scale: float

    def __call__(self, batch: Batch, noisy: Tensor, noise: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        without = self.no_text.repeat(len(states), 1, 1)
        v_uncond, v_cond = (says(self.teacher, batch, noisy, text) for text in (without, states))
        return guide(v_uncond, v_cond, self.scale), torch.ones_like(batch.levels)


@dataclass(frozen=True, kw_only=True)
class ToConsistency:
    """Where the path that `guided` walks from here ends, as `average` makes it out a step on (arXiv 2303.01469)."""

    guided: DiT
    average: DiT
    step: float
    shift: float

    def __call__(self, batch: Batch, noisy: Tensor, noise: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        here = batch.levels
        plain = here / (self.shift - (self.shift - 1) * here)
        plain = (plain - self.step).clamp(min=0)
        there = torch.where(batch.counts, self.shift * plain / (1 + (self.shift - 1) * plain), here)
        wide = lambda level: level[:, None, :, None, None]  # noqa: E731
        on = noisy + wide(there - here) * says(self.guided, batch, noisy, states)
        end = on - wide(there) * says(self.average, replace(batch, levels=there), on, states)
        return (noisy - end) / wide(here.clamp(min=CLEAN)), here


def loss_of(dit: DiT, recaller: DiT, data: Data, target: Target, options: argparse.Namespace) -> Tensor:
    """The loss of one step: means over latents that count of the three kinds of batches, weighted."""
    total = 0.0
    for kind, weight in zip((data.pictures, data.openings, data.long), options.weights, strict=True):
        batch, states = kind()
        states = data.without_text(states)
        noise = torch.randn_like(batch.clean)
        context = batch.clean
        if kind == data.long and options.recall:
            context = recalled(recaller, batch, noise.roll(1, 0), states, options.recall)
        noisy = add_noise(context, noise, batch.levels)
        with torch.no_grad() if DEVICE == "cpu" else torch.enable_grad():
            wanted, weights = target(batch, noisy, noise, states)
        velocity = velocity_of(dit, batch, noisy, states, dtype="bfloat16", fps=16)
        error = (velocity - wanted.detach()).square().mean((1, 3, 4)) * weights
        total = total + weight * (error * batch.counts).sum() / batch.counts.sum().clamp(min=1)
    return total


# Training -------------------------------------------------------------------------------------------------------------


class StackedMuon:
    """torch's Muon, matrices of one shape in one product, its rate a tensor: so it can be a part of a CUDA graph."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01):
        shapes = {}
        for p in matrices:
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.groups = [(some, torch.zeros(len(some), *shape, device=some[0].device)) for shape, some in shapes.items()]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """One step at a learning rate, a tensor without axes."""
        for some, kept in self.groups:
            shape = kept.shape[1:]
            gradient = torch.stack([p.grad.reshape(shape) for p in some])
            kept.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(kept, self.momentum)) * (rate * 0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(some, 1 - rate * self.weight_decay)
            torch._foreach_sub_(some, [u.view(p.shape) for u, p in zip(update.unbind(), some, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices (n, rows, columns) of the same singular vectors, by five Newton-Schulz steps."""
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).float()


class Training:
    """A model, what moves its weights, and their average; `step` is one CUDA graph after `capture`."""

    def __init__(self, dit: DiT, loss: Callable[[], Tensor], follower: DiT | None, rate: float, decay: float):
        self.dit, self.loss, self.peak, self.decay = dit, loss, rate, decay
        self.followers = list(follower.parameters()) if follower else []
        self.parameters = [p for p in dit.parameters() if p.requires_grad]
        names = Optimizers.NOT_MATRICES
        is_matrix = {n: p.ndim >= 2 and p[0].numel() > 1 and not any(k in n for k in names)
                     for n, p in dit.named_parameters() if p.requires_grad}  # fmt: skip
        named = dict(dit.named_parameters())
        self.muon = StackedMuon([named[n] for n, is_wide in is_matrix.items() if is_wide])
        self.rate = torch.zeros((), device=DEVICE)
        self.adamw = torch.optim.AdamW([named[n] for n, is_wide in is_matrix.items() if not is_wide], lr=self.rate,
                                       betas=(0.9, 0.95), weight_decay=0.0, capturable=DEVICE == "cuda",
                                       foreach=DEVICE == "cuda")  # fmt: skip
        self.average = [p.detach().clone() for p in self.parameters]
        self.sum = torch.zeros((), device=DEVICE)
        self.graph = None

    def compute(self) -> None:
        """One step, in any way."""
        for p in self.parameters:
            p.grad = None
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.muon.step(self.rate)
        self.adamw.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.decay)
        if self.followers:
            torch._foreach_copy_(self.followers, self.average)
        self.sum += loss.detach()

    def capture(self) -> None:
        """Compile, and keep the step as a graph. Weights stay."""
        if DEVICE == "cpu":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()
        self.sum.zero_()

    def step(self, share: float) -> None:
        """One step at a share of the learning rate."""
        self.rate.fill_(share * self.peak)
        self.compute() if self.graph is None else self.graph.replay()

    def run(self, name: str, seconds: float) -> None:
        """Train for so long: a short warm-up, then a cosine to nothing."""
        start, done, steps, last = time.perf_counter(), 0, 10**9, 0.0
        while done < steps:
            took = time.perf_counter() - start
            self.step(min(1.0, (done + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, done / steps))))
            done += 1
            if done == 20 or done % 250 == 0:
                mean = self.sum.item() / (20 if done == 20 else 250 if done > 250 else 230)
                took = time.perf_counter() - start
                steps = max(done + 1, int(done * seconds / took))
                self.sum.zero_()
                print(f"{name}: step {done} of {steps}, loss {mean:.4f}, {took:.1f} s", flush=True)

    def averaged(self) -> DiT:
        """The model with its averaged weights."""
        found = deepcopy(self.dit)
        with torch.no_grad():
            for p, kept in zip([p for p in found.parameters() if p.requires_grad], self.average, strict=True):
                p.copy_(kept)
        return found


def train(part: str, options: argparse.Namespace) -> None:
    """Train a DiT: `base`, `guided` or `few`."""
    torch.manual_seed(options.seed)
    begun, folder = time.perf_counter(), open_folder(options.model)
    text = TextEncoder.load(options.model, torch.float32, DEVICE)
    dit = load_dit(folder, torch.float32, DEVICE).train()
    if options.start:
        dit.load_state_dict(torch.load(options.work / f"{options.start}.pt", map_location=DEVICE, weights_only=True))
    frozen, follower = (deepcopy(dit).requires_grad_(False) for _ in range(2))
    dit.requires_grad_(True)
    torch._dynamo.config.recompile_limit = 64
    for model in (dit, frozen, follower) if options.compile else ():
        for layer in model.blocks.values():
            layer.compile(dynamic=False)
    made = random_films() if options.random else torch.load(options.work / "films.pt", weights_only=True, mmap=True)
    sizes = Sizes(**{f.name: max(1, int(f.default * options.scale)) for f in fields(Sizes)})
    data = Data(made, text, sizes, options.shift, options.drop_text)
    target: Target = to_films
    if part == "guided":
        target = ToGuidance(teacher=frozen, no_text=data.no_text, scale=options.guidance)
    if part == "few":
        target = ToConsistency(guided=frozen, average=follower, step=options.stride, shift=options.shift)
    recaller = follower if part == "base" else frozen
    training = Training(dit, lambda: loss_of(dit, recaller, data, target, options), follower, options.rate,
                        options.decay)  # fmt: skip
    print(f"{part}: ready after {time.perf_counter() - begun:.1f} s", flush=True)
    training.capture()
    print(f"{part}: captured after {time.perf_counter() - begun:.1f} s", flush=True)
    training.run(part, options.seconds - (time.perf_counter() - begun))
    weights = training.averaged().state_dict()
    torch.save(weights, options.work / f"{part}.pt")
    if options.out:
        torch.save({name: value.bfloat16().cpu() for name, value in weights.items()}, options.out / f"{part}.pt")
    if DEVICE == "cuda":
        print(f"{part}: peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


def train_on_decoder(options: argparse.Namespace) -> None:
    """Train the decoder on films that are drawn and encoded once."""
    global FRAMES
    begun = time.perf_counter()
    FRAMES = shared_frames(options.films[2] // AT_ONCE)
    jobs = [(options.seed, 400_000 + 64 * i, SINK + RUN - 1, i) for i in range(options.films[2] // AT_ONCE)]
    with mp.get_context("fork").Pool(options.workers) as pool:
        pool.map(draw_plain, jobs, 1)
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True
    vae = load_vae(open_folder(options.model), torch.float32, DEVICE)
    frames = torch.from_numpy(FRAMES[:, :, : 4 * (SINK + RUN - 2) + 1]).flatten(0, 1).to(DEVICE)
    latents = torch.cat([encode(vae, some, SINK + RUN - 1, False) for some in frames.split(AT_ONCE)])
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    config = DecoderTraining(loop=None, worst_noise=options.noise, motion_weight=options.motion)
    rng = np.random.default_rng(options.seed)
    size = max(1, int(16 * options.scale))

    def loss() -> Tensor:
        past = int(rng.choice(config.pasts))
        chosen = torch.from_numpy(rng.integers(0, len(frames), size)).to(DEVICE)
        count = past + config.num_latents
        video = frames[chosen, : 4 * (count - 1) + 1].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        found = decoder_loss(vae, video, past, config, None, latents[chosen, :, :count])
        PSNR.append(found["psnr"])
        return found["loss"]

    training = Training(vae, loss, None, options.rate, options.decay)
    training.run("decoder", options.seconds - (time.perf_counter() - begun))
    print(f"decoder: {torch.stack(PSNR[-200:]).mean():.2f} dB, noise included", flush=True)
    weights = training.averaged().state_dict()
    torch.save(weights, options.work / "decoder.pt")
    if options.out:
        torch.save({name: value.cpu() for name, value in weights.items()}, options.out / "decoder.pt")


PSNR: list[Tensor] = []


def draw_plain(job: tuple[int, int, int, int]) -> None:
    """Draw films from anywhere in their time into a slot."""
    seed, first, num_latents, slot = job
    for i in range(AT_ONCE):
        rng = np.random.default_rng((seed, first + i, 2))
        count = 4 * (num_latents - 1) + 1
        FRAMES[slot, i, :count] = worlds.draw(worlds.sample_world(rng), count, start=int(rng.integers(0, 2000)))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("films", "base", "guided", "few", "decoder"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, default=Path("longvid/assets/tiny"))
    parser.add_argument("--start")
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--films", type=int, nargs=3, default=(60_000, 16_000, 40_000))
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.999)
    parser.add_argument("--shift", type=float, default=4.0)
    parser.add_argument("--weights", type=float, nargs=3, default=(0.3, 0.2, 0.5))
    parser.add_argument("--drop-text", type=float, default=0.1)
    parser.add_argument("--recall", type=float, default=0.0)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--stride", type=float, default=1 / 12)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--motion", type=float, default=1.0)
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.part == "films":
        make_films(options)
    elif options.part == "decoder":
        train_on_decoder(options)
    else:
        train(options.part, options)


if __name__ == "__main__":
    main()
