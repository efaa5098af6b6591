"""A run's folder: what a run that was cut needs to go on.

    run.json      the command, where it was given, and what the video depends on
    clean/        the blocks that have left, a file each
    snapshots/    points of the run (`parallel.snapshot`)

It appears beside the video when the first frames are due and is removed when the last are written.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from longvid.checkpoints.safetensor_files import fingerprint, read_json
from longvid.plan import Plan
from longvid.sampler import NoiseOf, Point
from longvid.types import Latents
from parallel import snapshot


class Kept(Protocol):
    """A request as a run's folder sees it: its model's folder, and its configuration as JSON holds it."""

    model: Path

    def record(self) -> dict:
        """The configuration."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is kept; a snapshot every `every` blocks (0: none)."""

    path: Path
    every: int

    @property
    def snapshots(self) -> Path:
        """Where points are."""
        return self.path / "snapshots"

    @property
    def clean(self) -> Path:
        """Where blocks are."""
        return self.path / "clean"

    @property
    def is_there(self) -> bool:
        """Whether it holds a run."""
        return (self.path / "run.json").exists()

    def check(self, *, overwrite: bool) -> None:
        """Raise ValueError if a run that was cut is there, or something else."""
        if self.every < 0:
            raise ValueError(f"snapshot_every={self.every} must be at least 0 (none); try 8")
        if self.is_there and not overwrite:
            raise ValueError(f"{self.path} holds a run that was cut; go on with it (longvid generate --resume "
                             f"{self.path}), or begin anew with --overwrite")  # fmt: skip
        if self.path.exists() and not self.is_there and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"{self.path} is not a run's folder; give another with --run-dir")

    def begin(self, command: Sequence[str], run: Kept) -> None:
        """Make the folder of a run that starts; one that was there is replaced."""
        self.remove()
        self.clean.mkdir(parents=True)
        content = {"command": list(command), "folder": str(Path.cwd()), "threads": torch.get_num_threads(),
                   "depends_on": depends_on(run)}  # fmt: skip
        aside = self.path / "run.json.part"
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.rename(self.path / "run.json")

    def remove(self) -> None:
        """Remove what a run has left, and the folder if nothing else is in it."""
        for folder in (self.snapshots, self.clean):
            shutil.rmtree(folder, ignore_errors=True)
        (self.path / "run.json").unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def keep(self, block: int, latents: Latents) -> None:
        """Keep a block that has left."""
        aside = self.clean / f"{block:06d}.part"
        save_file({"latents": latents.float().cpu().contiguous()}, aside)
        aside.rename(aside.with_suffix(".safetensors"))

    def kept(self, plan: Plan, done: int) -> Iterator[tuple[int, Latents]]:
        """The blocks that had left after `done` passes, oldest first."""
        for p in plan.passes[:done]:
            for block in p.emits:
                yield block, load_file(self.clean / f"{block:06d}.safetensors")["latents"]


SINCE = {"compile": False}
"""What runs had that were begun before there was a choice."""


def depends_on(run: Kept) -> dict:
    """What must be the same for a run to go on to the same video, as JSON holds it."""
    values = {name: value for name, value in run.record().items() if name not in ("device", "model")}
    return json.loads(json.dumps({**values, "checkpoint": fingerprint(run.model)}, default=str))


def command_of(path: Path) -> dict:
    """`run.json` of a folder. Raises ValueError if there is none."""
    if not (path / "run.json").is_file():
        raise ValueError(f"{path} holds no run to go on with; give the folder that a run which was cut has named")
    return read_json(path / "run.json")


def check_same(path: Path, run: Kept) -> None:
    """Raise ValueError, naming what differs, unless the run is that of the folder."""
    before, now = {**SINCE, **command_of(path)["depends_on"]}, depends_on(run)
    if differing := [name for name in now if before.get(name) != now[name]]:
        name = differing[0]
        raise ValueError(f"{path} was made with {name}={before.get(name)}, now it is {now[name]}: a video cannot go on "
                         "with another; begin anew with --overwrite")  # fmt: skip


def newest(folder: RunFolder, plan: Plan, whole: snapshot.Part, say: Callable[[str], None]) -> int:
    """Passes done at the newest snapshot that is whole, with all blocks that had left by then; 0 if there is none.

    `say` is told of each that is damaged.
    """
    for done in reversed(snapshot.found(folder.snapshots, whole)):
        try:
            snapshot.check(folder.snapshots, done, whole)
            lacking = [block for p in plan.passes[:done] for block in p.emits
                       if not (folder.clean / f"{block:06d}.safetensors").exists()]  # fmt: skip
            if lacking:
                raise snapshot.Damaged(f"block {lacking[0]} is not in {folder.clean}")
            return done
        except snapshot.Damaged as damage:
            say(f"{damage}; going on from the snapshot before")
    return 0


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How a process keeps its part of a run, and from which point it goes on (`start` passes done; 0: all anew).

    `whole` is what all processes have together.
    """

    folder: RunFolder
    whole: snapshot.Part
    start: int = 0

    def point(self, part: snapshot.Part, device: torch.device, queue: tuple[Plan, NoiseOf] | None) -> Point | None:
        """This process's part of the point to go on from."""
        if not self.start:
            return None
        return snapshot.read(self.folder.snapshots, self.start, part, device, queue)

    def reached(
        self, plan: Plan, part: snapshot.Part, during: Callable[[str], AbstractContextManager]
    ) -> Callable[[Point], None]:
        """What to do at each point: leave a snapshot after every so many blocks, and remove old ones."""
        due = self.due(plan)

        def leave(point: Point) -> None:
            if point.done in due:
                with during("snapshot"):
                    snapshot.write(self.folder.snapshots, point, part)
                    if point.queue:
                        snapshot.drop_old(self.folder.snapshots, self.whole)

        return leave

    def due(self, plan: Plan) -> set[int]:
        """Passes done at each snapshot; none at the end, where there is nothing to go on with."""
        due, left, every = set(), 0, self.folder.every
        for i, p in enumerate(plan.passes[:-1], 1):
            left, before = left + len(p.emits), left
            if every and left // every > before // every:
                due.add(i)
        return due
