"""A folder of videos with what each shows: `captions.jsonl`, a line `{"file": "a.mp4", "caption": "..."}` for each.

Videos that no line names are not used. Knows no model: a clip here is uint8 RGB frames.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longvid.media import read_video

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True, kw_only=True)
class CaptionedVideo:
    """A video file and what it shows."""

    path: Path
    caption: str


def read_captions(folder: Path) -> list[CaptionedVideo]:
    """The videos of a folder, in the order of their lines.

    Raises ValueError for a folder or captions that are missing, a line that is not as above, and files not there.
    """
    file, example = folder / CAPTIONS, '{"file": "a.mp4", "caption": "a red ball bounces"}'
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one of videos with {CAPTIONS}, or make one: longvid data "
                         f"make --out {folder}")  # fmt: skip
    if not file.is_file():
        raise ValueError(f"{folder} holds no {CAPTIONS}; write a line for each video, such as {example}")
    videos = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            about = json.loads(line)
            name, caption = about["file"], about["caption"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number} is not as it must be; write it as {example}") from None
        if not isinstance(name, str) or not isinstance(caption, str):
            raise ValueError(f"{file}, line {number}: file and caption must be texts, such as {example}")
        videos.append(CaptionedVideo(path=folder / name, caption=caption))
    if not videos:
        raise ValueError(f"{file} names no video; write a line for each, such as {example}")
    if missing := [video.path for video in videos if not video.path.is_file()]:
        raise ValueError(f"{file} names {len(missing)} files that are not there, first {missing[0].name}; add them, or "
                         "take out their lines")  # fmt: skip
    return videos


def nearest_shape(height: int, width: int, wanted: tuple[int, int], unit: int) -> tuple[int, int]:
    """The shape, of `wanted`, the same turned, and a square of that area, whose sides are most like height : width.

    Sides are in pixels, those of the square a multiple of `unit`.
    """
    side = max(unit, round(math.sqrt(wanted[0] * wanted[1]) / unit) * unit)
    shapes = (wanted, wanted[::-1], (side, side))
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - math.log(height / width)))


def read_clips(
    path: Path, starts: Sequence[int], num_frames: int, *, height: int, width: int, fps: float
) -> np.ndarray:
    """Clips of a video that begin at these frames, counted at `fps`: uint8 (clips, num_frames, height, width, 3).

    The file is read once, from its beginning. Raises ValueError for one that cannot be decoded, or ends too soon.
    """
    clips, at = np.empty((len(starts), num_frames, height, width, 3), np.uint8), 0
    last = max(starts) + num_frames
    for frames in read_video(path, height=height, width=width, fps=fps):
        for clip, start in zip(clips, starts, strict=True):
            first, stop = max(at, start), min(at + len(frames), start + num_frames)
            if first < stop:
                clip[first - start : stop - start] = frames[first - at : stop - at]
        at += len(frames)
        if at >= last:
            return clips
    raise ValueError(f"{path} ends after {at} frames, {last} were to be read; convert it first")
