"""Go on with a video: its end is encoded as history, and new frames are appended to all of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longvid.media import count_frames, probe_video, read_video
from longvid.plan import Plan, cut_into_blocks, make_plan
from longvid.types import Text
from parallel.execute import Stage
from pipelines.configure import Run
from pipelines.generate import Models, Observer, encode_frames, load_models, roll
from pipelines.run_folder import Keeping


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A run whose video begins with another; it adds `run.num_frames - 1` frames, a multiple of 4."""

    run: Run
    video: Path
    input_frames: int
    history_latents: int

    @property
    def num_frames(self) -> int:
        """Frames of the output: all of the input's, then the new ones."""
        return self.input_frames + self.run.num_frames - 1

    def plan(self) -> Plan:
        """The plan from the start of the history on; blocks of history are clean from the start."""
        ready = self.ready_blocks()
        return make_plan(self.run.method, self.history_latents + self.run.num_latents - 1, ready=ready)

    def ready_blocks(self) -> tuple[int, ...]:
        """Sizes of the history's blocks, cut as the method cuts its own."""
        size = self.run.method.block_size
        return cut_into_blocks(self.history_latents, size, size)


def configure_extension(run: Run, video: Path) -> Extension:
    """Look at the video and choose how much of its end is history.

    Raises ValueError for a video that cannot be read, or has a single frame.
    """
    info = probe_video(video)
    if info.num_frames < 2:
        raise ValueError(f"{video} has a single frame; give at least 2, or generate from that frame with --image")
    if run.num_frames < 5:
        raise ValueError(f"num_frames={run.num_frames} adds nothing: the first is the input's last; try 81")
    frames = count_frames(info, run.fps)
    method = run.method
    wanted = max(method.sink + method.history, method.overlap, method.left, method.block_size)
    return Extension(run=run, video=video, input_frames=frames, history_latents=min(wanted, (frames - 1) // 4 + 1))


def extend(
    extension: Extension,
    observer: Observer | None = None,
    stage: Stage | None = None,
    keeping: Keeping | None = None,
    texts: tuple[Text, ...] = (),
) -> Iterator[np.ndarray]:
    """Yield uint8 (n, height, width, 3): every frame of the input at the model's size and rate, then the new ones.

    Raises as `pipelines.generate.generate` does, and ValueError where a frame of the input turns out to be damaged.
    """
    run = extension.run
    read = read_video(extension.video, height=run.height, width=run.width, fps=run.fps)
    models, observer = load_models(run, stage, texts), observer or Observer()
    if models.vae is None:  # frames are made on the last stage alone
        return (frames for _, frames in roll(run, extension.plan(), models, [], observer, keeping))
    return _go_on(extension, read, models, observer, keeping)


def _go_on(
    extension: Extension, read: Iterator[np.ndarray], models: Models, observer: Observer, keeping: Keeping | None
) -> Iterator[np.ndarray]:
    run = extension.run
    window = 4 * (extension.history_latents - 1) + 1
    tail = np.empty((0, run.height, run.width, 3), np.uint8)
    for frames in read:
        tail = np.concatenate([tail, frames])[-window:]
        yield frames
    history = encode_frames(models.vae, tail)
    ready = list(history.split(list(extension.ready_blocks()), dim=2))
    for _, frames in roll(run, extension.plan(), models, ready, observer, keeping, shows_ready=False):
        yield frames
