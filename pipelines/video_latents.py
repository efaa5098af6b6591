"""Clips of real videos as latents, encoded once and kept on disk with the text states of their captions.

Of each video some clips are taken at random places, by an address of seed and file. A clip is as long as asked, or
as the longest length of a few that its video has; size and rate are normalised, the shape is the nearest of three. A
batch is of clips of one shape and length. Files that cannot be read, or are too short, are named and left out.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvid.frames import to_video
from longvid.media import count_frames, probe_video
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from longvid.types import Text
from longvid.video_folder import CaptionedVideo, nearest_shape, read_clips
from pipelines.film_latents import BLOCK, CLIP, LONG, OPENINGS, PICTURES, SINK


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What is taken of each video; sizes in pixels, `num_frames` 4n + 1. `max_broken` is a share of the videos."""

    height: int
    width: int
    fps: int
    num_frames: int = 4 * (SINK + CLIP + 2 * BLOCK - 1) + 1
    clips_per_video: int = 4
    max_broken: float = 0.1
    seed: int = 0

    def __post_init__(self):
        least = 4 * (SINK + CLIP - 1) + 1
        if (self.num_frames - 1) % (4 * BLOCK) or self.num_frames < least:
            raise ValueError(f"num_frames={self.num_frames} of a clip must be {4 * BLOCK}n + 1 and at least {least}; "
                             f"try {least + 8 * BLOCK}")  # fmt: skip
        if self.clips_per_video < 1:
            raise ValueError(f"clips_per_video={self.clips_per_video} must be at least 1; try 4")
        if not 0 <= self.max_broken < 1:
            raise ValueError(f"max_broken={self.max_broken} must be at least 0 and below 1; try 0.1")

    def name_of(self, video: CaptionedVideo, model: str) -> str:
        """The name of what is kept of a video: another if anything that it depends on is."""
        stat = video.path.stat()
        about = [video.path.name, stat.st_size, stat.st_mtime_ns, video.caption, model, self.height, self.width,
                 self.fps, self.num_frames, self.clips_per_video, self.seed]  # fmt: skip
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@torch.no_grad()
def encode_video(vae: VAE, text: TextEncoder, video: CaptionedVideo, config: ClipConfig, unit: int, file: Path) -> None:
    """Encode a video's clips together, under bfloat16, and its caption. Raises ValueError if it cannot serve."""
    info = probe_video(video.path)
    available, shortest = count_frames(info, config.fps), 4 * BLOCK + 1
    if available < shortest:
        raise ValueError(f"{video.path} has {available} frames at {config.fps} fps; a clip has {shortest} or more")
    num_frames = min(config.num_frames, available - (available - 1) % (4 * BLOCK))
    height, width = nearest_shape(info.height, info.width, (config.height, config.width), unit)
    address = int.from_bytes(hashlib.sha256(video.path.name.encode()).digest()[:8], "little")
    starts = np.random.default_rng((config.seed, address)).integers(
        0, available - num_frames + 1, config.clips_per_video
    )
    starts = [0] if available == num_frames else [int(start) for start in starts]
    frames = read_clips(video.path, starts, num_frames, height=height, width=width, fps=config.fps)
    device = next(vae.parameters()).device
    pixels = to_video(torch.from_numpy(frames).to(device))
    with torch.autocast(device.type, torch.bfloat16):
        latents, _ = vae.encode(pixels)
    aside = file.with_suffix(".part")
    save_file({"latents": latents.cpu().bfloat16().contiguous(), **trimmed(text(video.caption))}, aside)
    aside.rename(file)


def trimmed(states: Text) -> dict[str, Tensor]:
    """States of one prompt without the zeros past its end, `text` (tokens, dim), and how many tokens it has with."""
    used = states[0].abs().sum(-1).nonzero()
    kept = states[0, : int(used.max()) + 1 if len(used) else 1].cpu().contiguous()
    return {"text": kept, "num_tokens": torch.tensor(states.shape[1])}


def encode_videos(
    folder: Path, videos: Sequence[CaptionedVideo], config: ClipConfig, model: str, unit: int,
    networks: Callable[[], tuple[VAE, TextEncoder]], *, rank: int = 0, num_processes: int = 1,
) -> Iterator[dict]:  # fmt: skip
    """Encode what `folder` lacks, each process its share; yields a record for each video that must be left out.

    `networks` loads VAE and text encoder; it is called if there is anything to do. What is wrong with a video is kept
    beside the rest, so that none is tried twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loaded = None
    for video in videos[rank::num_processes]:
        file = folder / f"{config.name_of(video, model)}.safetensors"
        wrong = file.with_suffix(".txt")
        if not file.exists() and not wrong.exists():
            loaded = loaded or networks()
            try:
                encode_video(*loaded, video, config, unit, file)
            except ValueError as error:
                wrong.write_text(str(error))
        if wrong.exists():
            yield {"skipped": video.path.name, "reason": wrong.read_text()}
    empty = folder / f"empty-{model}.safetensors"
    if not rank and not empty.exists():
        loaded = loaded or networks()
        save_file(trimmed(loaded[1]("")), empty)


def open_clips(
    folder: Path, videos: Sequence[CaptionedVideo], config: ClipConfig, model: str
) -> tuple["VideoLatents", "KeptText"]:
    """All that was encoded of some videos. Raises ValueError if more than a share of them is left out."""
    files = {video: folder / f"{config.name_of(video, model)}.safetensors" for video in videos}
    good = {video: file for video, file in files.items() if file.exists()}
    num_broken = len(videos) - len(good)
    if num_broken > config.max_broken * len(videos) or not good:
        first = next(video for video in videos if video not in good)
        reason = files[first].with_suffix(".txt").read_text()
        raise ValueError(f"{num_broken} of {len(videos)} videos cannot be used, more than a share of "
                         f"{config.max_broken} (--max-broken), first {first.path.name}: {reason}")  # fmt: skip
    texts = {video.caption: file for video, file in good.items()} | {"": folder / f"empty-{model}.safetensors"}
    return VideoLatents([(file, video.caption) for video, file in good.items()]), KeptText(texts)


class KeptText:
    """States of captions, (captions, tokens, dim), zero past a caption's end, from files that were encoded before."""

    def __init__(self, files: dict[str, Path]):
        self.files = files

    def __call__(self, *captions: str) -> Text:
        """States of captions that are kept."""
        states = []
        for caption in captions:
            with safe_open(self.files[caption], "pt") as file:
                kept, num_tokens = file.get_tensor("text").float(), int(file.get_tensor("num_tokens"))
            states.append(torch.nn.functional.pad(kept, (0, 0, 0, num_tokens - len(kept))))
        return torch.stack(states)


class VideoLatents:
    """Clips on disk, in buckets of one length and shape; a set like `FilmLatents`, read as they are drawn."""

    def __init__(self, files: Sequence[tuple[Path, str]], num_latents: int = 0):
        self.num_latents, self.buckets = num_latents, defaultdict(list)
        for path, caption in files:
            with safe_open(path, "pt") as file:
                count, *shape = file.get_slice("latents").get_shape()
            self.buckets[tuple(shape)] += [(path, caption, i) for i in range(count)]

    def sets(self) -> dict[str, "VideoLatents"]:
        """Pictures, openings and long clips by the names of those sets. Raises ValueError if no clip is long."""
        found = {each.name: self._of(each.num_latents, 1 + BLOCK) for each in (PICTURES, OPENINGS)}
        found[LONG.name] = self._of(0, SINK + CLIP)
        if not found[LONG.name].buckets:
            least = 4 * (SINK + CLIP - 1) + 1
            raise ValueError(f"no video has {least} frames, which a long clip needs; give longer videos")
        return found

    def split(self, rng: np.random.Generator, share: float) -> tuple["VideoLatents", "VideoLatents"]:
        """Two sets: most videos, and that share of them, one at least, whose clips are not in the first."""
        files = sorted({path for clips in self.buckets.values() for path, _, _ in clips})
        if len(files) < 2:
            raise ValueError("1 video cannot be divided into training and validation; give more, or leave "
                             "--validate-every out")  # fmt: skip
        long = sorted(
            {path for shape, clips in self.buckets.items() if shape[1] >= SINK + CLIP for path, _, _ in clips}
        )
        hidden = set(rng.permutation(long or files)[: max(1, int(share * len(files)))].tolist())
        parts = VideoLatents([]), VideoLatents([])
        for shape, clips in self.buckets.items():
            for part, is_hidden in zip(parts, (False, True), strict=True):
                if kept := [clip for clip in clips if (clip[0] in hidden) is is_hidden]:
                    part.buckets[shape] = kept
        return parts

    def _of(self, num_latents: int, least: int) -> "VideoLatents":
        one = VideoLatents([], num_latents)
        one.buckets = {shape: clips for shape, clips in self.buckets.items() if shape[1] >= least}
        return one

    @property
    def latents(self) -> Tensor:
        """Some clips of the largest bucket, (clips, c, f, h, w)."""
        return torch.stack([self._read(path, i) for path, _, i in max(self.buckets.values(), key=len)[:64]])

    def _read(self, path: Path, index: int) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice("latents")[index]

    def _draw(self, rng: np.random.Generator, count: int) -> list[tuple[Path, str, int]]:
        """Clips of a bucket, which is drawn by the number of its clips."""
        buckets = [self.buckets[shape] for shape in sorted(self.buckets)]
        sizes = np.array([len(bucket) for bucket in buckets])
        bucket = buckets[rng.choice(len(buckets), p=sizes / sizes.sum())]
        return [bucket[i] for i in rng.integers(0, len(bucket), count)]

    def sample(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """The first latents of clips (count, c, f, h, w), float32, and their captions."""
        drawn = self._draw(rng, count)
        latents = [self._read(path, i)[:, : self.num_latents] for path, _, i in drawn]
        return torch.stack(latents).float(), [caption for _, caption, _ in drawn]

    def sample_runs(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str], Tensor]:
        """Runs (count, c, SINK + CLIP, h, w) of clips, their captions, and which have a gap after the sink."""
        drawn, runs, gaps = self._draw(rng, count), [], []
        for path, _, i in drawn:
            latents = self._read(path, i)
            most = latents.shape[1] - SINK - CLIP
            offset = 0 if not most or rng.uniform() < 0.5 else int(rng.integers(1, most + 1))
            start = SINK + offset
            runs.append(torch.cat([latents[:, :SINK], latents[:, start : start + CLIP]], 1))
            gaps.append(offset > 0)
        return torch.stack(runs).float(), [caption for _, caption, _ in drawn], torch.tensor(gaps)
