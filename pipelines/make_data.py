"""Procedural films written as a folder of videos with captions, so that training goes through real files."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longvid import worlds
from longvid.captions import caption
from longvid.media import VideoWriter, check_disk
from longvid.video_folder import CAPTIONS

FIRST = 400_000
"""Address of the first film, far from those that the embedded model is trained on."""


def make_films(
    out: Path, *, num_films: int, num_frames: int, fps: int, height: int, width: int, seed: int
) -> Iterator[dict]:
    """Write films and, when all are there, `captions.jsonl`; yields a record for each film.

    Raises ValueError, nothing written, for a folder that has captions already and numbers that are not positive.
    """
    given = {"films": num_films, "num_frames": num_frames, "fps": fps, "height": height, "width": width}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1; try 64")
    if (out / CAPTIONS).exists():
        raise ValueError(f"{out / CAPTIONS} is there already; give another --out")
    check_disk(out, num_films * num_frames, height, width)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(num_films):
        rng = np.random.default_rng((seed, FIRST + i))
        world, file = worlds.sample_world(rng), f"film-{i:06d}.mp4"
        with VideoWriter(out / file, height=height, width=width, fps=fps, overwrite=True) as writer:
            writer.write(worlds.draw(world, num_frames, height=height, width=width, fps=fps))
        lines.append({"file": file, "caption": caption(world, rng)})
        yield lines[-1]
    aside = out / f".{CAPTIONS}.part"
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines))
    aside.rename(out / CAPTIONS)
