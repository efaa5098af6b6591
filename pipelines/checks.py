"""Looks at a DiT while it trains: the loss on films held out, and a contact sheet of videos it makes."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from longvid.contact_sheet import choose, contact_sheet, write_png
from longvid.method import Method
from longvid.models.dit import DiT
from longvid.models.vae import VAE
from longvid.plan import make_plan
from longvid.sampler import noise_of, sample
from longvid.types import Text
from pipelines.film_latents import LONG, OPENINGS, PICTURES, FilmLatents
from pipelines.generate import decode
from pipelines.objective import Objective, combined_loss
from pipelines.optimise import Check
from pipelines.optimizers import WHOLE, Part
from pipelines.train_dit import DiTTraining, draw_step, errors_of

VALIDATION_BATCHES = 8
VALIDATION_SEED = 2**31
"""Addresses of validation batches: no training seed is so high."""

SAMPLE_LATENTS, SHEET_COLUMNS = 13, 8
"""Length of a sample, in latents, and the frames of it that are shown."""


def validation(
    dit: DiT, config: DiTTraining, films: Mapping[str, FilmLatents], text: Callable[..., Text], every: int
) -> Check:
    """The plain mean error, `validation`, over batches of held-out films that are the same each time."""
    first_weight = torch.ones(dit.config.in_channels)

    def loss(index: int, part: Part = WHOLE) -> dict[str, Tensor]:
        rng = np.random.default_rng((VALIDATION_SEED, index))
        batch, noise = draw_step(rng, config, films, 1.0)
        errors = errors_of(dit, config, batch.part(part), part.of(noise), text, first_weight)
        return combined_loss(Objective(), dit, errors, (), rng, batch.counts.sum())

    def look(engine, step: int) -> dict[str, float]:
        losses = [engine.measure(loss, index)["loss"] for index in range(VALIDATION_BATCHES)]
        return {"validation": float(np.mean(losses))}

    return Check(every=every, look=look)


def samples(
    dit: DiT, vae: VAE, text: Callable[..., Text], method: Method, config: DiTTraining, films: FilmLatents,
    prompts: Sequence[str], every: int,
) -> Check:  # fmt: skip
    """`samples/step-N.png`: a row of frames of a video of each prompt, always from the same noise.

    All processes make the videos, since with ZeRO 3 none has all parameters; the first decodes and writes.
    """
    plan = make_plan(method, SAMPLE_LATENTS)
    height, width = films.latents.shape[-2:]
    noise = noise_of(plan, config.loop.seed, dit.config.in_channels, height, width)
    folder = config.loop.out / "samples"

    @torch.no_grad()
    def video_of(prompt: str) -> Tensor:
        states = [text(prompt).to(config.device), text("").to(config.device)]
        features = lru_cache(2)(lambda lane: dit.text_features(states[lane]))
        blocks = sample(plan, dit, lambda p: features(p.lane), noise, fps=config.fps)
        return torch.cat([latents.cpu() for _, latents in blocks], 2)

    def look(engine, step: int) -> dict[str, str]:
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            videos = [video_of(prompt) for prompt in prompts]
        file = folder / f"step-{step:06d}.png"
        if not engine.rank:
            folder.mkdir(parents=True, exist_ok=True)
            write_png(file, sheet([decode(vae, latents, None)[0] for latents in videos], config.fps))
        return {"samples": str(file)}

    return Check(every=every, look=look)


def sheet(videos: Sequence[np.ndarray], fps: float) -> np.ndarray:
    """Frames of videos uint8 (n, h, w, 3) as a contact sheet, a row for each video."""
    chosen = choose(len(videos[0]), SHEET_COLUMNS)
    times = [index / fps for index in chosen] * len(videos)
    return contact_sheet(np.concatenate([video[chosen] for video in videos]), times, columns=len(chosen))


def held_out(films: FilmLatents) -> dict[str, FilmLatents]:
    """Sets for validation by the names of those for training; pictures and openings are the beginnings of films."""
    return {LONG.name: films, **{each.name: films.beginnings(each.num_latents) for each in (PICTURES, OPENINGS)}}
