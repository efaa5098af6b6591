"""A request on several processes: which it may have, starting them, and what each of them does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
import torch.distributed as dist

from longvid.checkpoints.diffusers_folder import num_elements, open_folder
from longvid.checkpoints.safetensor_files import fingerprint
from longvid.plan import Plan, make_plan
from longvid.types import Text
from parallel.agree import attempted, from_all, from_rank
from parallel.connect import Measured, measured_link
from parallel.cost import mean_costs, memory
from parallel.execute import Stage, make_stage
from parallel.grid import Degrees, Grid, Limits, possible_grids
from parallel.launch import Launch, join
from parallel.layout import Layout, fastest
from parallel.snapshot import part_of
from parallel.split import split_layers
from pipelines.calibrate import BRIEF, LONG, measured_costs, shape_of
from pipelines.configure import Run
from pipelines.extend import Extension, extend
from pipelines.generate import Observer, encode_prompts, generate
from pipelines.record import Outputs
from pipelines.run_folder import Keeping, Kept, RunFolder, check_same, newest
from pipelines.several import Several, generate_several

JUDGED = 120
"""Latents by which a layout is judged."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request, where its video goes, how it is kept, and the layout asked for; `notes` are for the sidecar.

    `texts` are the encoded prompts, once they are.
    """

    request: Run | Extension | Several
    outputs: Outputs
    notes: dict
    keeping: Keeping
    asked: Degrees
    texts: tuple[Text, ...] = ()

    @property
    def run(self) -> Run:
        """The configuration."""
        return self.request if isinstance(self.request, Run) else self.request.run

    @property
    def kept(self) -> Kept:
        """What the run's folder has to know."""
        return self.request if isinstance(self.request, Several) else self.run

    @property
    def videos(self) -> list[tuple[Run, Outputs]]:
        """Each video's configuration, and where it goes."""
        runs = self.request.runs if isinstance(self.request, Several) else (self.run,)
        return list(zip(runs, self.outputs.all(len(runs)), strict=True))

    def frames(self, observer: Observer, stage: Stage | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(video, frames) as blocks are made; with a stage, on the last one."""
        if isinstance(self.request, Several):
            return generate_several(self.request, observer, stage, self.keeping, self.texts)
        make: Callable = generate if isinstance(self.request, Run) else extend
        return ((0, frames) for frames in make(self.request, observer, stage, self.keeping, self.texts))

    def encode(self) -> list[Text]:
        """Text states of all prompts. Raises ValueError for one that the text encoder would cut."""
        prompts = self.request.prompts if isinstance(self.request, Several) else ()
        return encode_prompts(self.run, prompts)

    def judged_plan(self, *, whole: bool) -> Plan:
        """What a layout is judged by: the beginning, which is like the rest, unless the `whole` is wanted."""
        if isinstance(self.request, Several):
            return self.request.plan(None if whole else JUDGED)
        return self.run.plan() if whole else make_plan(self.run.method, min(self.run.num_latents, JUDGED))

    def on(self, device: str) -> "Task":
        """The same on another device."""
        if isinstance(self.request, Several):
            return replace(self, request=self.request.on(device))
        run = replace(self.run, device=device)
        return replace(self, request=run if isinstance(self.request, Run) else replace(self.request, run=run))


def num_videos_of(request: Run | Extension | Several) -> int:
    """Videos that a request asks for."""
    return len(request.runs) if isinstance(request, Several) else 1


def may_be_forked(request: Run | Extension | Several) -> bool:
    """Whether processes for it may be copies of this one: it has used no GPU, and no reader of videos with threads."""
    run = request if isinstance(request, Run) else request.run
    return run.device == "cpu" and not isinstance(request, Extension)


def limits_of(run: Run) -> Limits:
    """What the run's model and size allow."""
    config, shape = open_folder(run.model).transformer, shape_of(run)
    return Limits(num_layers=config["num_layers"], num_heads=config["num_attention_heads"], num_rows=shape.num_rows,
                  num_lanes=run.method.num_lanes)  # fmt: skip


def grids_of(world_size: int, run: Run, asked: Degrees) -> list[Grid]:
    """The grids that so many processes can form for a run. Raises ValueError as `possible_grids` does.

    Cutting rows changes roundings: a CPU does so when asked alone, a GPU if it is faster.
    """
    return possible_grids(world_size, limits_of(run), asked, may_cut_rows=run.device.startswith("cuda"))


def layout_here(grids: list[Grid], run: Run, plan: Plan) -> Layout:
    """The fastest of these grids if all processes are as fast as this one, and links take no time."""
    costs = measured_costs(run, plan, **Measured()._asdict(), care=LONG)
    return fastest(plan, grids, costs, shape_of(run))


def layout_record(layout: Layout | None, run: Run) -> dict:
    """A layout as JSON holds it; None is one process."""
    grid, layers = (layout.grid, layout.layers) if layout else (Grid(num_stages=1), [range(limits_of(run).num_layers)])
    return {"stages": grid.num_stages, "sequence": grid.num_bands, "lanes": grid.num_lanes,
            "decoder_back": grid.back, "decode_lag": grid.decode_lag,
            "layers": [[part.start, part.stop] for part in layers]}  # fmt: skip


def grids_that_fit(grids: list[Grid], run: Run, plan: Plan, available: int) -> list[Grid]:
    """Those whose processes have room in so many bytes each for weights, features, activations and the VAE.

    The text encoder comes before all these, on the head alone. Raises ValueError if none has.
    """
    folder, shape, needed = open_folder(run.model), shape_of(run), []
    vae = 4 * num_elements(folder, "vae")
    for grid in grids:
        layers = split_layers([1.0] * shape.num_layers, grid.num_stages)
        parts_of = [parts | ({"VAE": vae} if rank in (0, grid.back) else {})
                    for rank, parts in enumerate(memory(plan, grid, layers, shape))]  # fmt: skip
        needed.append(max(parts_of, key=lambda parts: sum(parts.values())))
    encoder = {"text encoder": shape.bytes_per_element * num_elements(folder, "text_encoder")}
    needed = [max(parts, encoder, key=lambda parts: sum(parts.values())) for parts in needed]
    fitting = [grid for grid, parts in zip(grids, needed, strict=True) if sum(parts.values()) <= available]
    if not fitting:
        least = min(needed, key=lambda parts: sum(parts.values()))
        parts = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in least.items())
        raise ValueError(f"a process needs {sum(least.values()) / 2**30:.1f} GiB ({parts}) and its GPU has "
                         f"{available / 2**30:.1f}; use more processes (--nproc), smaller --height and --width, fewer "
                         "steps, or --dtype bfloat16")  # fmt: skip
    return fitting


def check_gpus(how: Launch, run: Run, plan: Plan, grids: list[Grid]) -> None:
    """Raise ValueError if this machine has fewer GPUs than processes that each take one, or too small ones."""
    num_gpus = torch.cuda.device_count()
    if run.device.startswith("cuda") and how.num_processes > num_gpus:
        raise ValueError(f"nproc={how.num_processes} is more than the {num_gpus} GPUs here; use --nproc {num_gpus}")
    if run.device.startswith("cuda"):
        grids_that_fit(grids, run, plan, torch.cuda.get_device_properties(run.device).total_memory)


def keeping_of(
    folder: RunFolder, run: Run, kept: Kept, plan: Plan, *, goes_on: bool, say: Callable[[str], None]
) -> Keeping:
    """How a run is kept: from its beginning, or from the newest whole snapshot of the run that was cut.

    Raises ValueError if that was another run.
    """
    num_layers = open_folder(run.model).transformer["num_layers"]
    whole, start = part_of(range(num_layers), range(run.method.num_lanes)), 0
    if goes_on and folder.is_there:
        check_same(folder.path, kept)
        start = newest(folder, plan, whole, say)
    return Keeping(folder=folder, whole=whole, start=start)


@contextmanager
def taken_part(task: Task, *, whole: bool, lost: Callable[[str], None]) -> Iterator[tuple[Task, Stage, Layout]]:
    """This process as one of several: the task as rank 0 has it, on this process's device, its place, and the layout.

    All processes measure at once, as they will work at once: cores that share a memory are slower together.
    """
    with join(task.run.device, lost) as device:
        check_alike(task.run)
        task = from_rank(0, lambda: task).on(device)
        num, plan = dist.get_world_size(), task.judged_plan(whole=whole)
        grids = grids_of(num, task.run, task.asked)
        if device.startswith("cuda"):
            available = min(from_all(torch.cuda.get_device_properties(device).total_memory))
            grids = grids_that_fit(grids, task.run, task.request.plan(), available)
        found = measured_link(num - 1, torch.device(device))
        link = from_rank(num - 1, lambda: found)
        measured = attempted(lambda: measured_costs(task.run, plan, **link._asdict(), care=LONG if whole else BRIEF))
        costs = mean_costs([from_rank(rank, measured) for rank in range(num)])
        encoded = attempted(task.encode) if dist.get_rank() == 0 else list  # while the last process plans
        layout = from_rank(num - 1, lambda: fastest(plan, grids, costs, shape_of(task.run)))
        task = replace(task, texts=tuple(from_rank(0, encoded)))
        num_rows = limits_of(task.run).num_rows
        yield task, make_stage(layout.grid, layout.layers, num_rows, torch.device(device)), layout


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
