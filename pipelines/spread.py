"""A request on several processes: which it may have, starting them, and what each of them does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
import torch.distributed as dist

from longvid.checkpoints.diffusers_folder import open_folder
from longvid.checkpoints.safetensor_files import fingerprint
from longvid.plan import Plan, make_plan
from parallel.cost import memory
from parallel.execute import Stage, from_all, from_rank, make_stage
from parallel.grid import Grid
from parallel.launch import Launch, join
from parallel.layout import Layout, fastest, possible_grids
from parallel.snapshot import part_of
from parallel.split import split_layers
from pipelines.calibrate import measured_costs, shape_of
from pipelines.configure import Run
from pipelines.extend import Extension, extend
from pipelines.generate import Observer, generate
from pipelines.record import Outputs
from pipelines.run_folder import Keeping, RunFolder, check_same, newest

JUDGED = 120
"""Latents by which a layout is judged."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request, where its video goes and how the run is kept; `notes` are for the sidecar."""

    request: Run | Extension
    outputs: Outputs
    notes: dict
    keeping: Keeping

    @property
    def run(self) -> Run:
        """The configuration."""
        return self.request if isinstance(self.request, Run) else self.request.run

    def frames(self, observer: Observer, stage: Stage | None = None) -> Iterator[np.ndarray]:
        """Blocks of frames as they are made; with a stage, on the last one."""
        make: Callable = generate if isinstance(self.request, Run) else extend
        return make(self.request, observer, stage, self.keeping)

    def on(self, device: str) -> "Task":
        """The same on another device."""
        run = replace(self.run, device=device)
        return replace(self, request=run if isinstance(self.request, Run) else replace(self.request, run=run))


def grids_of(world_size: int, run: Run, *, cfg_parallel: bool | None) -> list[Grid]:
    """The grids that so many processes can form for a run. Raises ValueError as `possible_grids` does."""
    num_layers = open_folder(run.model).transformer["num_layers"]
    has_guidance = run.method.num_lanes > 1
    return possible_grids(world_size, has_guidance=has_guidance, num_layers=num_layers, cfg_parallel=cfg_parallel)


def layout_of(grids: list[Grid], run: Run, *, whole: bool) -> Layout:
    """The fastest of these grids by costs measured now, on this process's device; links count as free.

    It is judged by the beginning of the video, which is like the rest, unless the `whole` timeline is wanted.
    """
    plan = run.plan() if whole else make_plan(run.method, min(run.num_latents, JUDGED))
    costs = measured_costs(run, plan, latency=0.0, bandwidth=float("inf"), repeats=1)
    return fastest(plan, grids, costs, shape_of(run))


def check_memory(grids: list[Grid], run: Run, available: int) -> None:
    """Raise ValueError if no grid's processes have room for weights, features and activations in so many bytes."""
    plan, shape, least = run.plan(), shape_of(run), None
    for grid in grids:
        layers = split_layers([1.0] * shape.num_layers, grid.num_stages)
        needed = max(memory(plan, grid, layers, shape), key=lambda parts: sum(parts.values()))
        least = min(least or needed, needed, key=lambda parts: sum(parts.values()))
    if sum(least.values()) > available:
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in least.items())
        raise ValueError(f"a process needs {sum(least.values()) / 2**30:.1f} GiB ({parts}) and its GPU has "
                         f"{available / 2**30:.1f}; use more processes (--nproc), smaller --height and --width, fewer "
                         "steps, or --dtype bfloat16")  # fmt: skip


def check_gpus(how: Launch, run: Run, grids: list[Grid]) -> None:
    """Raise ValueError if this machine has fewer GPUs than processes that each take one, or too small ones."""
    num_gpus = torch.cuda.device_count()
    if run.device.startswith("cuda") and how.num_processes > num_gpus:
        raise ValueError(f"nproc={how.num_processes} is more than the {num_gpus} GPUs here; use --nproc {num_gpus}")
    if run.device.startswith("cuda"):
        check_memory(grids, run, torch.cuda.get_device_properties(run.device).total_memory)


def keeping_of(folder: RunFolder, run: Run, plan: Plan, *, goes_on: bool, say: Callable[[str], None]) -> Keeping:
    """How a run is kept: from its beginning, or from the newest whole snapshot of the run that was cut.

    Raises ValueError if that was another run.
    """
    num_layers = open_folder(run.model).transformer["num_layers"]
    whole, start = part_of(range(num_layers), range(run.method.num_lanes)), 0
    if goes_on and folder.is_there:
        check_same(folder.path, run)
        start = newest(folder, plan, whole, say)
    return Keeping(folder=folder, whole=whole, start=start)


@contextmanager
def taken_part(
    task: Task, *, cfg_parallel: bool | None, whole: bool, lost: Callable[[str], None]
) -> Iterator[tuple[Task, Stage, Layout]]:
    """This process as one of several: the task as rank 0 has it, on this process's device, its place, and the layout.

    The last process measures for all: rank 0, the head, is the first to be ready otherwise.
    """
    with join(task.run.device, lost) as device:
        check_alike(task.run)
        task = from_rank(0, lambda: task).on(device)
        grids = grids_of(dist.get_world_size(), task.run, cfg_parallel=cfg_parallel)
        layout = from_rank(dist.get_world_size() - 1, lambda: layout_of(grids, task.run, whole=whole))
        yield task, make_stage(layout.grid, layout.layers, torch.device(device)), layout


def check_alike(run: Run) -> None:
    """Raise ValueError, on rank 0, unless all processes have the same versions and the same checkpoint."""
    this = {"checkpoint": fingerprint(run.model), "longvid": version("longvid"), "torch": torch.__version__}
    for rank, other in enumerate(from_all(this)):
        for name, value in this.items():
            if other[name] != value and dist.get_rank() == 0:
                raise ValueError(f"the process of rank {rank} has {name} {other[name]}, that of rank 0 {value}: a "
                                 f"video is made with one; bring the machines to the same {name}")  # fmt: skip
            if other[name] != value:
                raise SystemExit(2)
