"""Carries a task out on this process: frames go to files as they are made, and it says how that ended.

Standard output gets the names of the videos alone, standard error everything else.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

EXIT_DONE = 0


class Broken(Exception):
    """What was a right request when it began turned out not to be, such as a video damaged in the middle."""


def carry_out(options, task, described: dict, num_frames: int, stage=None, layout=None) -> int:
    """Write the videos with progress on standard error; what is there stays if it is cut. `num_frames` are of each."""
    from pipelines.progress import Progress
    from pipelines.several import record_all

    meters, recorders, inboxes = _recorders(task, num_frames, layout)
    frames, folder, done = task.frames(meters, stage), task.keeping.folder, [0] * len(recorders)
    _show(options, described)
    if not task.keeping.start:
        folder.begin(_command_to_keep(options, task), task.kept)
    try:
        counts = record_all(frames, recorders, inboxes)
        with Progress(num_frames * len(done), task.run.fps, quiet=options.quiet) as progress, closing(counts):
            for video, count in counts:
                done[video] = count
                progress.update(sum(done))
    except BaseException as error:
        _say_what_is_there(task, done)
        if sum(done) and isinstance(error, ValueError):
            raise Broken(error) from error
        if not sum(done) and not task.keeping.start:  # nothing to go on with
            folder.remove()
        raise
    folder.remove()
    names = [str(outputs.video) for _, outputs in task.videos]
    if not options.quiet:
        for name, meter in zip(names, meters.meters, strict=True):
            print(f"latent_sha256 {meter.latent_sha256}" + (f" {name}" if len(names) > 1 else ""), file=sys.stderr)
    if task.outputs.trace:
        _write_trace(task.outputs.trace, meters.meters[0], layout, quiet=options.quiet)
    return print_lines(names)


def _recorders(task, num_frames: int, layout):
    """What sees and writes each video: meters, recorders and their inboxes."""
    from pipelines.record import Meter, record
    from pipelines.several import Meters, drawn
    from pipelines.spread import layout_record

    meters, recorders, inboxes = [], [], []
    for run, outputs in task.videos:
        meter, inbox = Meter(keep_latents=outputs.latents is not None), deque()
        meter.layout = layout_record(layout, run)
        recorders.append(record(run, drawn(inbox), meter, outputs, num_frames=num_frames, notes=dict(task.notes)))
        meters.append(meter)
        inboxes.append(inbox)
    return Meters(meters, trace_of(task)), recorders, inboxes


def _say_what_is_there(task, done: list[int]) -> None:
    for (_, outputs), count in zip(task.videos, done, strict=True):
        if count:
            print(f"{outputs.video} holds the {count} frames made so far and plays", file=sys.stderr)


def work(task, stage) -> int:
    """Be a stage that holds no frames."""
    from pipelines.generate import Observer

    frames = list(task.frames(Observer(trace_of(task)), stage))
    assert not frames, "frames are made on the head alone"
    return EXIT_DONE


def trace_of(task):
    """Where a task's spans go, if they are wanted."""
    from pipelines.trace import Trace

    return Trace(task.run.device) if task.outputs.trace else None


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


def _write_trace(path: Path, meter, layout, *, quiet: bool) -> None:
    """Write what was done and planned; say how they compare."""
    from pipelines.record import write_json
    from pipelines.trace import chrome_trace

    content = chrome_trace(meter.spans, layout)
    write_json(path, content)
    if not quiet:
        found = content["otherData"]
        print(f"planned {found['planned_makespan_s']:.2f} s, {found['planned_at_its_speed_s']:.2f} s at the speed that "
              f"it had, measured {found['measured_makespan_s']:.2f} s", file=sys.stderr)  # fmt: skip


def whole_command(options, task) -> list[str]:
    """The command with what was chosen for it, so that it can be given again."""
    return [*options.words, "--seed", str(task.run.seed), "--output", str(task.outputs.video)]


def _command_to_keep(options, task) -> list[str]:
    """The whole command; of a run that goes on, and has no snapshot to go on from, the one that it began with."""
    from pipelines.run_folder import command_of

    folder = task.keeping.folder
    return command_of(folder.path)["command"] if options.goes_on and folder.is_there else whole_command(options, task)
