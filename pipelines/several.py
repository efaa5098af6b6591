"""Several prompts in one call: a video of each, whose passes fill the pipe together."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from longvid.interleave import interleave
from longvid.media import read_image
from longvid.passes import Pass
from longvid.plan import Plan, make_plan
from longvid.types import Latents, Text
from parallel.execute import Stage
from pipelines.configure import Run
from pipelines.generate import Observer, encode_frames, encode_prompts, load_models, roll
from pipelines.record import Meter
from pipelines.run_folder import Keeping, RunFolder, command_of
from pipelines.trace import Span, Trace
from pipelines.usage import Usage


@dataclass(frozen=True, kw_only=True)
class Several:
    """Runs that differ in their prompts alone; another begins while fewer than `width` passes are in hand."""

    runs: tuple[Run, ...]
    width: int = 1

    @property
    def run(self) -> Run:
        """What they have in common, with the prompt of the first."""
        return self.runs[0]

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.run.model

    @property
    def num_frames(self) -> int:
        """Frames of each."""
        return self.run.num_frames

    @property
    def prompts(self) -> tuple[str, ...]:
        """What each shows."""
        return tuple(run.prompt for run in self.runs)

    def plan(self, most: int | None = None) -> Plan:
        """The plan of all, or of the first `most` latents of each."""
        run = self.run
        plan = run.plan() if most is None else make_plan(run.method, min(run.num_latents, most))
        return interleave(plan, len(self.runs), self.width)

    def record(self) -> dict:
        """The configuration as JSON holds it."""
        return {**self.run.record(), "prompt": list(self.prompts), "passes_in_hand": self.width}

    def for_processes(self, num_processes: int, num_bands: int | None, cut: RunFolder | None) -> "Several":
        """With as many passes in hand as so many processes have stages and lanes; a run that was cut, as it had."""
        if cut and cut.is_there:
            before = command_of(cut.path)["depends_on"].get("passes_in_hand", 1)
            return replace(self, width=before)
        return replace(self, width=max(1, num_processes // (num_bands or 1)))

    def on(self, device: str) -> "Several":
        """The same on another device."""
        return replace(self, runs=tuple(replace(run, device=device) for run in self.runs))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines and those that begin with # are left out.

    Raises ValueError for a file that is missing, is no text or holds no prompt.
    """
    if not path.is_file():
        raise ValueError(f"prompts file {path} is not a file; give a text file with a prompt in each line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not text in UTF-8 ({error.reason}); save it as such") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts file {path} holds no prompt; write one a line, such as: a red ball bounces")
    return prompts


def generate_several(
    several: Several, observer: Observer, stage: Stage | None, keeping: Keeping | None, texts: tuple[Text, ...] = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """Load the models and yield (video, frames) as blocks leave, each video's in order; as `generate` does for one."""
    run = several.run
    models = load_models(run, stage, texts or tuple(encode_prompts(run, several.prompts)))
    ready: list[Latents] = []
    if run.image and models.vae:
        ready += [encode_frames(models.vae, read_image(run.image, run.height, run.width)[None])] * len(several.runs)
    return roll(run, several.plan(), models, ready, observer, keeping)


class Meters(Observer):
    """Meters of several videos, each of which sees what is of its own; block `b` of video `v` has number `b n + v`."""

    def __init__(self, meters: Sequence[Meter], trace: Trace | None = None):
        super().__init__(trace)
        self.meters = meters

    def passed(self, p: Pass) -> None:
        """Count a forward."""
        self.meters[p.covers[0].block % len(self.meters)].passed(p)

    def left(self, block: int, latents: Latents) -> None:
        """A clean block has left."""
        number, video = divmod(block, len(self.meters))
        self.meters[video].left(number, latents)

    def ended(self, processes: list[Usage], spans: list[list[Span]]) -> None:
        """Note what each process took, and when."""
        for meter in self.meters:
            meter.ended(processes, spans)


def record_all(frames: Iterable[tuple[int, np.ndarray]], recorders: Sequence[Iterator[int]],
               inboxes: Sequence[deque]) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Give (video, frames) to the recorder of that video, which takes them from its inbox; yields (video, its frames).

    All end together, since what they record of the processes is known then; an exception ends each as it would one.
    """
    try:
        for video, block in frames:
            inboxes[video].append(block)
            yield video, next(recorders[video])
    except BaseException as error:
        for recorder in recorders:
            with suppress(type(error), StopIteration):
                recorder.throw(error)
        raise
    for recorder, inbox in zip(recorders, inboxes, strict=True):
        inbox.append(None)
        assert next(recorder, None) is None


def drawn(inbox: deque) -> Iterator[np.ndarray]:
    """What is put into an inbox, until None is."""
    while (frames := inbox.popleft()) is not None:
        yield frames
