"""Evaluation of videos: what each shows second by second, and how near all of them are to true films.

A video's sidecar says its prompt and where its blocks begin; a safetensors file of the same name holds its latents.
What is not there is not measured, and None says so.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from longvid import quality
from longvid.adherence import ASPECTS, Scene, judge, parse_prompt, shares
from longvid.checkpoints.safetensor_files import TensorFiles
from longvid.media import probe_video, read_video
from longvid.method import Method
from longvid.oracle import STILL, Reading, read_film, seconds_of
from longvid.plan import make_plan
from longvid.worlds import World
from pipelines.film_features import clips_of

READ_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
"""What counts as a video in a folder."""

_END_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video and what is known of it: its prompt, the world it should show, where blocks begin (frames), latents."""

    video: Path
    prompt: str | None = None
    world: World | None = None
    borders: tuple[int, ...] = ()
    latents: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """Figures of a video, its curves (a value per second) and what the oracle read."""

    name: str
    figures: dict
    curves: dict[str, np.ndarray]
    readings: list[Reading]
    clips: np.ndarray = field(repr=False)  # for a Frechet distance


def find_sources(path: Path, prompt: str | None = None) -> list[Source]:
    """The videos of a folder, by name, or a single one; `prompt` is that of all whose sidecar says none.

    Raises ValueError for a path that is missing, a folder without videos, a file that is no video and a broken sidecar.
    """
    if path.is_dir():
        videos = sorted(file for file in path.iterdir() if file.suffix.lower() in READ_SUFFIXES)
        if not videos:
            raise ValueError(f"{path} holds no video ({', '.join(READ_SUFFIXES)}); give a folder that does, or a file")
    elif path.exists():
        videos = [path]
    else:
        raise ValueError(f"{path} is not there; give a folder of videos or a video")
    return [source_of(video, prompt) for video in videos]


def source_of(video: Path, prompt: str | None = None, world: World | None = None) -> Source:
    """A video with what lies beside it."""
    num_frames = probe_video(video).num_frames
    if num_frames < 2:
        raise ValueError(f"{video} has {num_frames} frame; what changes over time needs at least 2")
    sidecar, latents = video.with_suffix(".json"), video.with_suffix(".safetensors")
    try:
        found = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        config = found.get("config", {}) if isinstance(found, dict) else {}
        is_whole = config and "input_frames" not in found  # blocks of an extension do not begin where the video does
        borders = borders_of(config, num_frames) if is_whole else ()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sidecar} is not what longvid writes beside a video ({error}); move it away") from error
    return Source(video=video, prompt=config.get("prompt", prompt), world=world, borders=borders,
                  latents=latents if latents.is_file() else None)  # fmt: skip


def borders_of(config: dict, num_frames: int) -> tuple[int, ...]:
    """First frames of all blocks but the first, as the method of a sidecar's configuration cuts them."""
    method = Method.from_dict(config["method"])
    num_latents = math.ceil((num_frames - 1) / 4) + 1
    plan = make_plan(method, num_latents, ready=(1,) if config.get("image") else ())
    return tuple(4 * (start - 1) + 1 for start in plan.starts if start)


def evaluate_video(source: Source) -> Result:
    """Measure a video, and read it if its prompt names what the oracle knows. Raises ValueError if it is damaged."""
    info = probe_video(source.video)
    chunks = read_video(source.video, height=info.height, width=info.width, fps=info.fps)
    measures = quality.measure(chunks)
    seconds = seconds_of(len(measures), info.fps)
    curves = quality.over_seconds(measures, seconds)
    still, longest = quality.standing_still(curves["moved"])
    figures = {
        "prompt": source.prompt,
        "frames": len(measures),
        "fps": info.fps,
        "drift": {name: {"opening": float(curves[name][0]), "mean": float(curves[name].mean()),
                         "slope_per_minute": quality.slope_per_minute(curves[name])}
                  for name in quality.DRIFTING},
        "seam_ratio": quality.seam_ratio(measures.change, source.borders),
        "still_share": still,
        "still_longest_s": longest,
        "flicker": float(curves["flicker"].mean()),
        "collapse": quality.collapse(quality.similarity(measures.small, seconds)),
        "latents": _latent_figures(source, info.fps),
    }  # fmt: skip
    scene = _scene(source.prompt)
    readings = read_film(measures.small, info.fps) if scene else []
    adherence, rows = _adherence(scene, readings)
    return Result(
        name=source.video.name, figures=figures | {"adherence": adherence}, curves=curves | rows, readings=readings,
        clips=clips_of(measures.small, info.fps),
    )  # fmt: skip


def _scene(prompt: str | None) -> Scene | None:
    """What a prompt asks for; None for one that names no thing of a procedural film."""
    try:
        return parse_prompt(prompt) if prompt else None
    except ValueError:
        return None


def _adherence(scene: Scene | None, readings: Sequence[Reading]) -> tuple[dict | None, dict[str, np.ndarray]]:
    """Shares of the seconds that are right in each aspect, and the aspects as curves (NaN: not asked for)."""
    if scene is None:
        return None, {}
    rows = [judge(scene, reading) for reading in readings]
    moving = any(thing.motion for thing in scene.things)
    stills = [any(thing.motion == STILL for thing in reading.things) for reading in readings]
    found = {"share": shares(rows), "first_10s": shares(rows[:_END_SECONDS]), "last_10s": shares(rows[-_END_SECONDS:]),
             "seconds_with_a_thing_that_stands_still": int(sum(stills)) if moving else None}  # fmt: skip
    return found, {name: np.array([np.nan if row[name] is None else row[name] for row in rows]) for name in ASPECTS}


def _latent_figures(source: Source, fps: float) -> dict | None:
    if source.latents is None:
        return None
    files = TensorFiles([source.latents])
    latents = files.read("latents") if "latents" in files.names else None
    if latents is None or latents.ndim != 4:
        raise ValueError(f"{source.latents} holds no `latents` (channels, latents, height, width); move it away")
    drift = quality.latent_drift(latents.float().numpy(), 4 / fps)
    worst = {f"worst_{name}": max(map(abs, slopes)) for name, slopes in drift.items()}
    return {**worst, **{f"{name}_slopes_per_minute": slopes for name, slopes in drift.items()}}


def summary(results: Sequence[Result]) -> dict:
    """Means of all figures over the videos that have them."""
    return _mean_of([result.figures for result in results])


def _mean_of(tables: Sequence[dict]) -> dict:
    """The same tree of names, with means of the numbers in it; text and lists are left out."""
    found = {}
    for name in tables[0]:
        values = [table[name] for table in tables if table.get(name) is not None]
        if values and all(isinstance(value, dict) for value in values):
            found[name] = _mean_of(values)
        elif all(isinstance(value, int | float) for value in values):
            found[name] = float(np.mean(values)) if values else None
    return found


def as_json(results: Sequence[Result], sources: Sequence[Source]) -> Iterator[dict]:
    """A record for each video."""
    for result, source in zip(results, sources, strict=True):
        world = {"world": asdict(source.world)} if source.world else {}
        yield {"video": result.name, **result.figures, **world}
