"""Makes the video of a request: here, in processes that this one starts, or as one of those; and says what happens.

Standard output gets the name of the video alone, standard error everything else.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

EXIT_DONE = 0


class Broken(Exception):
    """What was a right request when it began turned out not to be, such as a video damaged in the middle."""


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


def _outputs(options: argparse.Namespace):
    from pipelines.record import Outputs

    paths = {"latents": options.save_latents, "metrics": options.metrics, "contact_sheet": options.contact_sheet,
             "trace": options.trace}  # fmt: skip
    return Outputs(
        video=Path(options.output) if options.output is not None else _free_name(Path("longvid.mp4")),
        overwrite=options.overwrite,
        **{name: Path(path) if path is not None else None for name, path in paths.items()},
    )


def _free_name(path: Path) -> Path:
    """The path, or it with the first number that makes a new file: `longvid-2.mp4`."""
    candidate, number = path, 2
    while candidate.exists() or candidate.with_suffix(".json").exists():
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def make(options, request, run, *, num_frames: int, source: Path | None, notes: dict) -> int:
    """Make the video of a request: here, in processes that this one starts, or as one of those."""
    outputs, plan = _outputs(options), request.plan()
    described = _describe(run, plan, outputs, notes)
    from parallel.launch import launch
    from pipelines.run_folder import RunFolder
    from pipelines.spread import Task, check_gpus, grids_of, keeping_of, layout_of, taken_part

    how = _how(options)
    is_first = not is_worker() and how.machine == 0
    if is_first:
        outputs.check(num_frames, run.height, run.width, source=source)
    path = Path(options.run_dir) if options.run_dir else outputs.video.with_suffix(".run")
    folder = RunFolder(path=path, every=options.snapshot_every)
    if is_first:
        folder.check(overwrite=options.overwrite)
    if not is_worker():
        grids = grids_of(how.world_size, run, degrees_of(options))
        check_gpus(how, run, grids)
    if options.dry_run:
        return print_lines([json.dumps(described, indent=2, default=str)])
    goes_on = options.goes_on or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    outputs = replace(outputs, overwrite=options.overwrite or goes_on)
    keeping = keeping_of(folder, run, plan, goes_on=goes_on, say=lambda line: print(line, file=sys.stderr))
    task = Task(request=request, outputs=outputs, notes=notes, keeping=keeping, asked=degrees_of(options))
    if not is_worker():
        with _way_on(folder):
            if how.world_size == 1:
                layout = layout_of(grids, run, whole=True) if outputs.trace else None
                return _carry_out(options, task, described, num_frames, layout=layout)
            command = options.words if options.goes_on else _whole_command(options, task)
            return launch("pipelines.cli", command, how)
    with taken_part(task, whole=bool(outputs.trace), lost=_give_up) as (task, stage, layout):
        if not stage.is_head:
            return _work(task, stage)
        if not options.quiet:
            print(layout.in_words, file=sys.stderr)
        if not goes_on:
            task.outputs.check(num_frames, run.height, run.width, source=source)
        return _carry_out(options, task, described, num_frames, stage, layout)


def degrees_of(options):
    """The layout asked for."""
    from parallel.grid import Degrees

    lanes = None if options.cfg_parallel is None else 1 + options.cfg_parallel
    return Degrees(stages=options.stages, sequence=options.sequence_parallel, lanes=lanes)


def _give_up(why: str) -> None:
    """End at once, though the main thread waits for what will not come; the file so far plays."""
    print(f"longvid failed: {why}", file=sys.stderr, flush=True)
    os._exit(1)


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


def _work(task, stage) -> int:
    """Be a stage that holds no frames."""
    from pipelines.generate import Observer

    frames = list(task.frames(Observer(_trace(task)), stage))
    assert not frames, "frames are made on the head alone"
    return EXIT_DONE


def _trace(task):
    from pipelines.trace import Trace

    return Trace(task.run.device) if task.outputs.trace else None


def _describe(run, plan, outputs, notes: dict) -> dict:
    """The complete configuration and what it asks of the model."""
    from pipelines.configure import cost_of

    return {**run.record(), **notes, "output": str(outputs.video), **cost_of(plan)}


def _show(options: argparse.Namespace, described: dict) -> None:
    """The configuration in two lines on standard error, once nothing can be wrong with the request."""
    if options.quiet:
        return
    rest = {key: value for key, value in described.items() if key != "method"}
    for words in (rest, described["method"]):
        print("  ".join(f"{key}={value}" for key, value in words.items()), file=sys.stderr)


def print_lines(lines: Iterable[str]) -> int:
    """Print what was asked for, as much as somebody reads: `| head` ends it without a word."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it exits
    return EXIT_DONE


def _carry_out(options, task, described: dict, num_frames: int, stage=None, layout=None) -> int:
    """Write the video with progress on standard error; what is there stays if it is cut."""
    from pipelines.progress import Progress
    from pipelines.record import Meter, record
    from pipelines.spread import layout_record

    run, outputs, done = task.run, task.outputs, 0
    meter = Meter(keep_latents=outputs.latents is not None, trace=_trace(task))
    meter.layout = layout_record(layout, run)
    frames = task.frames(meter, stage)
    _show(options, described)
    folder = task.keeping.folder
    if not task.keeping.start:
        folder.begin(_whole_command(options, task), run)
    try:
        counts = record(run, frames, meter, outputs, num_frames=num_frames, notes=task.notes)
        with Progress(num_frames, run.fps, quiet=options.quiet) as progress, closing(counts):
            for done in counts:
                progress.update(done)
    except BaseException as error:
        if done:
            print(f"{outputs.video} holds the {done} frames made so far and plays", file=sys.stderr)
            if isinstance(error, ValueError):
                raise Broken(error) from error
        elif not task.keeping.start:  # nothing to go on with
            folder.remove()
        raise
    if not options.quiet:
        print(f"latent_sha256 {meter.latent_sha256}", file=sys.stderr)
    folder.remove()
    if outputs.trace:
        _write_trace(outputs.trace, meter, layout.planned, quiet=options.quiet)
    return print_lines([str(outputs.video)])


def _write_trace(path: Path, meter, planned, *, quiet: bool) -> None:
    """Write what was done and planned; say how they compare."""
    from pipelines.record import write_json
    from pipelines.trace import chrome_trace

    content = chrome_trace(meter.spans, planned)
    write_json(path, content)
    if not quiet:
        found = content["otherData"]
        print(f"planned {found['planned_makespan_s']:.2f} s, measured {found['measured_makespan_s']:.2f} s",
              file=sys.stderr)  # fmt: skip


def _whole_command(options, task) -> list[str]:
    """The command with what was chosen for it, so that it can be given again."""
    return [*options.words, "--seed", str(task.run.seed), "--output", str(task.outputs.video)]
