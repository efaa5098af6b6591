"""Prompts to evaluate a model on, and their videos.

The held-out prompts are made from worlds that no training draws, and the worlds are kept beside them, so that what is
true is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longvid.captions import caption
from longvid.worlds import World, sample_world
from pipelines.configure import Run, configure
from pipelines.generate import generate
from pipelines.record import Meter, Outputs, record
from pipelines.several import read_prompts

HELD_OUT, NUM_PROMPTS = "held-out", 32
"""What stands for these prompts where a file is asked for, and how many there are."""

_SEED = 20_260_000  # training draws its worlds from (seed, step), never from this


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and the world that it was made from, if any."""

    text: str
    world: World | None = None


def held_out_prompts() -> list[Prompt]:
    """32 prompts; number i is a function of i alone. The world has all that the prompt leaves open."""
    found = []
    for index in range(NUM_PROMPTS):
        rng = np.random.default_rng((_SEED, index))
        world = sample_world(rng)
        found.append(Prompt(text=caption(world, rng), world=world))
    return found


def prompts_of(given: str) -> list[Prompt]:
    """The held-out prompts, or those of a text file; ValueError as `read_prompts` raises it."""
    if given == HELD_OUT:
        return held_out_prompts()
    return [Prompt(text=text) for text in read_prompts(Path(given))]


def plan_videos(
    prompts: Sequence[Prompt], folder: Path, request: dict, *, overwrite: bool
) -> list[tuple[Run, Outputs, Prompt]]:
    """What is to be made: video i has the prompt i and the seed that was given (or 0) plus i.

    Raises ValueError if one cannot be made or written, before anything is.
    """
    planned, seed = [], request.get("seed", 0)
    for index, prompt in enumerate(prompts):
        run = configure(**{**request, "prompt": prompt.text, "seed": seed + index})
        video = folder / f"{index:03d}.mp4"
        outputs = Outputs(video=video, latents=video.with_suffix(".safetensors"), overwrite=overwrite)
        if folder.is_dir():
            outputs.check(run.num_frames, run.height, run.width)
        planned.append((run, outputs, prompt))
    return planned


def make_videos(planned: Sequence[tuple[Run, Outputs, Prompt]]) -> Iterator[Path]:
    """Make the videos with their sidecars and latents, yielding each when it is whole."""
    for run, outputs, _ in planned:
        meter = Meter(keep_latents=True)
        for _ in record(run, generate(run, meter), meter, outputs, num_frames=run.num_frames, notes={}):
            pass
        yield outputs.video
