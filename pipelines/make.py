"""Makes the video of a request, or of several: here, in processes that this one starts, or as one of those."""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipelines.carry_out import carry_out, print_lines, whole_command, work


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def use_threads(threads: int | None) -> None:
    """Use so many CPU threads, or as many as torch chooses. Raises ValueError for fewer than one."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; try {os.cpu_count()}")
    import torch

    torch.set_num_threads(threads)


def _outputs(options: argparse.Namespace, num_videos: int):
    from pipelines.record import Outputs

    paths = {"latents": options.save_latents, "metrics": options.metrics, "contact_sheet": options.contact_sheet,
             "trace": options.trace}  # fmt: skip
    return Outputs(
        video=Path(options.output) if options.output is not None else _free_name(Path("longvid.mp4"), num_videos),
        overwrite=options.overwrite,
        **{name: Path(path) if path is not None else None for name, path in paths.items()},
    )


def _free_name(path: Path, num_videos: int) -> Path:
    """The path, or it with the first number that makes new files: `longvid-2.mp4`."""
    from pipelines.record import Outputs

    candidate, number = path, 2
    while any(out.video.exists() or out.sidecar.exists() for out in Outputs(video=candidate).all(num_videos)):
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def make(options, request, run, *, num_frames: int, source: Path | None, notes: dict) -> int:
    """Make the video of a request whose configuration is `run`; with `Several`, that of each, of `num_frames` each."""
    from pipelines.run_folder import RunFolder
    from pipelines.spread import Task, check_gpus, grids_of, keeping_of, num_videos_of

    how, num_videos = _how(options), num_videos_of(request)
    if how.world_size > 1 and not is_worker():
        use_threads(1)  # what starts others computes nothing
    outputs = _outputs(options, num_videos)
    is_first = not is_worker() and how.machine == 0
    if is_first:
        outputs.check_all(num_videos, num_frames, run.height, run.width, source=source)
    path = Path(options.run_dir) if options.run_dir else outputs.video.with_suffix(".run")
    folder = RunFolder(path=path, every=options.snapshot_every)
    goes_on = options.goes_on or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if num_videos > 1:
        request = request.for_processes(_world_size(how), options.sequence_parallel, folder if goes_on else None)
    plan = request.plan()
    if is_first:
        folder.check(overwrite=options.overwrite)
    if not is_worker():
        grids = grids_of(how.world_size, run, degrees_of(options))
        check_gpus(how, run, plan, grids)
    outputs = replace(outputs, overwrite=options.overwrite or goes_on)
    kept = request if num_videos > 1 else run
    if options.dry_run:
        return print_lines([json.dumps(_describe(kept, plan, outputs, num_videos, notes), indent=2, default=str)])
    keeping = keeping_of(folder, run, kept, plan, goes_on=goes_on, say=lambda line: print(line, file=sys.stderr))
    task = Task(request=request, outputs=outputs, notes=notes, keeping=keeping, asked=degrees_of(options))
    described = _describe(kept, plan, outputs, num_videos, notes)
    if is_worker():
        return _take_part(options, task, described, num_frames, source, goes_on=goes_on)
    return _start(options, how, task, described, num_frames, grids)


def _start(options, how, task, described: dict, num_frames: int, grids: list) -> int:
    """Do it here, or start processes that do; say how to go on if it is cut."""
    from parallel.launch import launch
    from pipelines import cli
    from pipelines.spread import layout_here, may_be_forked

    with _way_on(task.keeping.folder):
        if how.world_size == 1:
            layout = layout_here(grids, task.run, task.judged_plan(whole=True)) if task.outputs.trace else None
            return carry_out(options, task, described, num_frames, layout=layout)
        words = options.words if options.goes_on else whole_command(options, task)
        return launch(cli.main, cli.__name__, words, how, fork=may_be_forked(task.request))


def _take_part(options, task, described: dict, num_frames: int, source: Path | None, *, goes_on: bool) -> int:
    """Be one of several processes."""
    from pipelines.spread import taken_part

    with taken_part(task, whole=bool(task.outputs.trace), lost=say_lost) as (task, stage, layout):
        if not stage.is_head:
            return work(task, stage)
        if not options.quiet:
            print(layout.in_words, file=sys.stderr)
        if not goes_on:
            task.outputs.check_all(len(task.videos), num_frames, task.run.height, task.run.width, source=source)
        return carry_out(options, task, described, num_frames, stage, layout)


def _world_size(how) -> int:
    """Processes in all, whoever starts them."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else how.world_size


def degrees_of(options):
    """The layout asked for."""
    from parallel.grid import Degrees

    lanes = None if options.cfg_parallel is None else 1 + options.cfg_parallel
    return Degrees(stages=options.stages, sequence=options.sequence_parallel, lanes=lanes,
                   cuts_decoder=options.parallel_vae)  # fmt: skip


def say_lost(why: str) -> None:
    """Say what was lost of a run that is given up; the file so far plays."""
    print(f"longvid failed: {why}", file=sys.stderr, flush=True)


def _how(options):
    """The processes asked for."""
    from parallel.launch import MEET_S, Launch, threads_each

    num_processes = 1 if options.nproc is None else options.nproc
    return Launch(
        num_processes=num_processes, threads=options.threads or threads_each(max(1, num_processes)),
        num_machines=1 if options.nnodes is None else options.nnodes, machine=options.node_rank or 0,
        meet_s=MEET_S if options.rdzv_timeout is None else options.rdzv_timeout,
        endpoint=options.rdzv_endpoint or "", max_restarts=options.max_restarts or 0,
    )  # fmt: skip


@contextmanager
def _way_on(folder):
    """Say how to go on with a run that does not come to its end: its folder is still there then."""
    try:
        yield
    finally:
        if folder.is_there:
            print(f"go on with: longvid generate --resume {folder.path}", file=sys.stderr)


def _describe(kept, plan, outputs, num_videos: int, notes: dict) -> dict:
    """The complete configuration and what it asks of the model."""
    from pipelines.configure import cost_of

    names = [str(each.video) for each in outputs.all(num_videos)]
    return {**kept.record(), **notes, "output": names if num_videos > 1 else names[0], **cost_of(plan)}
