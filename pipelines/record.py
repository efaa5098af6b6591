"""What a run leaves: the video, its sidecar, and on request latents, metrics and a contact sheet."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file

from longvid.checkpoints.safetensor_files import fingerprint
from longvid.contact_sheet import choose, contact_sheet, write_png
from longvid.media import VideoWriter, check_disk, check_output
from longvid.passes import Pass
from longvid.types import Latents
from pipelines.configure import Run
from pipelines.generate import Observer
from pipelines.trace import Span, Trace
from pipelines.usage import Usage, peak_memory_mb

SHEET_FRAMES = 24


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where to write; paths that are None are not written."""

    video: Path
    latents: Path | None = None
    metrics: Path | None = None
    contact_sheet: Path | None = None
    trace: Path | None = None
    overwrite: bool = False

    @property
    def sidecar(self) -> Path:
        """The JSON beside the video."""
        return self.video.with_suffix(".json")

    def of(self, video: int, num_videos: int) -> "Outputs":
        """Those of one of several videos, counted from 0: `out-1.mp4` and so on; a trace is of all."""
        if num_videos == 1:
            return self
        check_output(self.video, overwrite=True)  # a name that can be numbered
        numbered = {name: path and path.with_stem(f"{path.stem}-{video + 1}") for name, path in
                    (("video", self.video), ("latents", self.latents), ("metrics", self.metrics),
                     ("contact_sheet", self.contact_sheet))}  # fmt: skip
        return replace(self, **numbered)

    def all(self, num_videos: int) -> "list[Outputs]":
        """Those of each of so many videos."""
        return [self.of(video, num_videos) for video in range(num_videos)]

    def check_all(self, num_videos: int, num_frames: int, height: int, width: int, source: Path | None) -> None:
        """As `check`, of each of so many videos; the disk must have room for all."""
        for each in self.all(num_videos):
            each.check(num_videos * num_frames, height, width, source=source)

    def check(self, num_frames: int, height: int, width: int, source: Path | None = None) -> None:
        """Raise ValueError if one cannot be written, exists and may not be overwritten, or is the input `source`."""
        try:
            check_output(self.video, overwrite=self.overwrite)
            others = [path for path in (self.sidecar, self.latents, self.metrics, self.contact_sheet, self.trace)
                      if path]  # fmt: skip
            for path in (self.video, *others):
                if source and path.exists() and path.samefile(source):
                    raise ValueError(f"output {path} is the input; give another name")
            for path in others:
                check_file(path, overwrite=self.overwrite)
            names = [path.resolve() for path in (self.video, *others)]
            for path, name in zip((self.video, *others), names, strict=True):
                if names.count(name) > 1:
                    raise ValueError(f"two outputs are {path}; give each a name of its own ({self.sidecar} is taken)")
            check_disk(self.video, num_frames, height, width)
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"{error.filename} cannot be written ({error.strerror}); give another name") from error


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError unless a file can be made there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{path} is in a folder that does not exist; create it first: mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not writable; choose another folder, such as {Path.home()}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name or overwrite it (--overwrite)")


class Meter(Observer):
    """Counts passes, hashes latents as they leave, and keeps them if asked."""

    def __init__(self, *, keep_latents: bool = False, trace: Trace | None = None):
        super().__init__(trace)
        self.start = time.perf_counter()
        self.num_passes = 0
        self.written: list[tuple[float, int]] = []
        self.kept: list[Latents] | None = [] if keep_latents else None
        self.processes: list[Usage] = []
        self.layout: dict = {}
        self.spans: list[list[Span]] = []
        self._hash = hashlib.sha256()

    def passed(self, p: Pass) -> None:
        """Count a forward."""
        self.num_passes += 1

    def left(self, block: int, latents: Latents) -> None:
        """Hash a clean block latent by latent, so that the hash does not depend on how the video was cut in blocks."""
        by_latent = rearrange(latents[0].float().cpu(), "c f h w -> f c h w").contiguous()
        self._hash.update(by_latent.numpy().tobytes())
        if self.kept is not None:
            self.kept.append(latents.float().cpu())

    def wrote(self, num_frames: int) -> None:
        """Note that so many frames are in the file now."""
        self.written.append((time.perf_counter() - self.start, num_frames))

    def _pace(self) -> dict[str, float | None]:
        """Time between writes, and the rate after the first; None if there was one alone."""
        if len(self.written) < 2:
            return {"block_p50_s": None, "block_p95_s": None, "steady_fps": None}
        moments, counts = np.array(self.written).T
        gaps = np.diff(moments)
        steady = (counts[-1] - counts[0]) / (moments[-1] - moments[0])
        return {"block_p50_s": float(np.median(gaps)), "block_p95_s": float(np.quantile(gaps, 0.95)),
                "steady_fps": float(steady)}  # fmt: skip

    def ended(self, processes: list[Usage], spans: list[list[Span]]) -> None:
        """Note what each process took, and when."""
        self.processes, self.spans = processes, spans

    @property
    def latent_sha256(self) -> str:
        """Hash of all latents that have left, float32, axes (f, c, h, w)."""
        return self._hash.hexdigest()

    def metrics(self, run: Run, num_frames: int) -> dict:
        """What `--metrics` holds; lists have an entry per process, or one for this process until all have ended."""
        this = Usage(idle_fraction=0.0, peak_memory_mb=peak_memory_mb(run.device), bytes_sent=0, bytes_exchanged=0,
                     bytes_to={}, exchange_s=0.0, weight_bytes_read=0)  # fmt: skip
        processes = self.processes or [this]
        wall = time.perf_counter() - self.start
        return {
            "frames": num_frames,
            "seconds_of_video": num_frames / run.fps,
            "wall_s": wall,
            "first_frame_s": self.written[0][0] if self.written else None,
            "fps": num_frames / wall,
            **self._pace(),
            "passes": self.num_passes,
            "layout": self.layout,
            **{f.name: [getattr(usage, f.name) for usage in processes] for f in fields(Usage)},
            "latent_sha256": self.latent_sha256,
            "config": run.record(),
        }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("longvid", "torch", "numpy", "transformers", "safetensors", "imageio-ffmpeg", "decord"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass
class SheetCollector:
    """Keeps the few frames that a contact sheet shows."""

    num_frames: int
    fps: float
    wanted: set[int] = field(default_factory=set)
    frames: list[np.ndarray] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self):
        self.wanted = set(choose(self.num_frames, SHEET_FRAMES))

    def add(self, frames: np.ndarray) -> None:
        """Look at the next frames (n, height, width, 3)."""
        for i, frame in enumerate(frames, self.seen):
            if i in self.wanted:
                self.frames.append(frame.copy())
                self.times.append(i / self.fps)
        self.seen += len(frames)

    def write(self, path: Path) -> None:
        """Write what was seen, if anything."""
        if self.frames:
            write_png(path, contact_sheet(np.stack(self.frames), self.times))


def record(
    run: Run, frames: Iterable[np.ndarray], meter: Meter, outputs: Outputs, *, num_frames: int, notes: dict
) -> Iterator[int]:
    """Write frames to the outputs as they come, yielding how many are in the file, the last ones still on their way.

    The sidecar is there as soon as the video is, with `notes`, and says "unfinished" until the end is known. However
    that comes, the video is closed so that it plays, and the sidecar says how far it came.
    """
    writer = VideoWriter(outputs.video, height=run.height, width=run.width, fps=run.fps, overwrite=outputs.overwrite)
    sheet = SheetCollector(num_frames=num_frames, fps=run.fps)
    ended = "failed"
    try:
        with writer:
            for block in frames:
                writer.write(block)
                meter.wrote(writer.num_frames)
                if len(meter.written) == 1:
                    _write_sidecar(run, meter, outputs, writer.num_frames, {**notes, "ended": "unfinished"})
                sheet.add(block)
                yield writer.num_frames
        ended = "complete"
    except (KeyboardInterrupt, GeneratorExit):
        ended = "interrupted"
        raise
    finally:
        if writer.num_frames:
            metrics = _write_sidecar(run, meter, outputs, writer.num_frames, {**notes, "ended": ended})
            if outputs.latents and meter.kept:
                save_file({"latents": torch.cat(meter.kept, 2)[0].contiguous()}, outputs.latents)
            if outputs.metrics:
                write_json(outputs.metrics, metrics)
            if outputs.contact_sheet:
                sheet.write(outputs.contact_sheet)


def _write_sidecar(run: Run, meter: Meter, outputs: Outputs, num_frames: int, notes: dict) -> dict:
    """Write the sidecar; returns the metrics in it, with the configuration."""
    metrics = meter.metrics(run, num_frames)
    sidecar = {
        "ended": notes.pop("ended"),
        "config": metrics["config"],
        **notes,
        "versions": versions(),
        "checkpoint_hash": fingerprint(run.model),
        "metrics": {name: value for name, value in metrics.items() if name != "config"},
    }
    write_json(outputs.sidecar, sidecar)
    return metrics


def write_json(path: Path, content: dict) -> None:
    """Write aside, then rename: the file is whole or not there."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n")
    aside.rename(path)
