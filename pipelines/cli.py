"""The command `longvid`: parses, calls, prints. Nothing heavy is imported before the arguments are read."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_REQUEST, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Takes flags by their whole names; says what is wrong in one line."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> None:
        """Exit 2 with one line."""
        self.exit(EXIT_WRONG_REQUEST, f"{self.prog}: {message}; see {self.prog} --help\n")


class Broken(Exception):
    """What was a right request when it began turned out not to be, such as a video damaged in the middle."""


def parser() -> Parser:
    """All commands and their flags."""
    top = Parser(prog="longvid", description="Minutes of video from a prompt: rolling block-wise denoising.")
    commands = top.add_subparsers(dest="command", required=True, metavar="generate | extend | plan | train")
    generate = commands.add_parser("generate", help="make a video from a prompt")
    generate.add_argument("--image", metavar="F", help="a picture that the video starts from (PNG, JPEG, WebP)")
    generate.add_argument("--resume", metavar="DIR", help="go on with a run that was cut, generate or extend; of other "
                          "flags only --nproc, --threads, --max-restarts and --quiet are taken")  # fmt: skip
    extend = commands.add_parser("extend", help="go on with a video")
    extend.add_argument("--video", metavar="F", required=True, help="the video to go on with (any that decord reads)")
    plan = commands.add_parser("plan", help="print the matrix of steps and the list of passes")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument("--image", metavar="F", help="plan for a video that starts from a picture")
    _add_grid_flags(plan)
    for command in (generate, extend, plan):
        _add_video_flags(command)
    for command in (generate, extend):
        _add_output_flags(command)
    _add_train_flags(commands.add_parser("train", help="train the embedded model, part by part"))
    return top


def _add_video_flags(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("what")
    model.add_argument("--model", metavar="M", help="a model folder or a hub id (default: the model in the box)")
    model.add_argument("--prompt", metavar="TEXT", help="what to show")
    model.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    length = command.add_argument_group("length and size")
    length.add_argument("--seconds", type=float, metavar="S")
    length.add_argument("--num-frames", type=int, metavar="N", help="4n + 1; of extend the first is the input's last")
    length.add_argument("--fps", type=int, metavar="N")
    length.add_argument("--height", type=int, metavar="N", help="pixels")
    length.add_argument("--width", type=int, metavar="N", help="pixels")
    method = command.add_argument_group("method")
    method.add_argument("--method", metavar="NAME", help="rolling, dualparal, skyreels-sync, skyreels-async, "
                        "rolling-forcing or self-forcing")  # fmt: skip
    method.add_argument("--num-inference-steps", "--num-steps", type=int, metavar="N", dest="num_steps")
    method.add_argument("--guidance-scale", type=float, metavar="G", help="1 turns guidance off")
    method.add_argument("--flow-shift", type=float, metavar="S")
    method.add_argument("--block-size", type=int, metavar="N", help="latents in a block")
    method.add_argument("--lag", type=int, metavar="N", help="steps that a block is ahead of the next")
    method.add_argument("--seed", type=int, metavar="N", help="chosen and printed if left out")
    method.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N")
    method.add_argument("--dtype", metavar="T", help="float32 or bfloat16")


def _add_output_flags(command: argparse.ArgumentParser) -> None:
    output = command.add_argument_group("output")
    output.add_argument("--output", metavar="F", help="the video, .mp4; F.json is written beside it")
    output.add_argument("--save-latents", metavar="F", help="clean latents, safetensors")
    output.add_argument("--metrics", metavar="F", help="time, memory and hashes, JSON")
    output.add_argument("--contact-sheet", metavar="F", help="a grid of frames with their times, PNG")
    output.add_argument("--overwrite", action="store_true", help="replace files that exist")
    output.add_argument("--dry-run", action="store_true", help="check, print the configuration, make nothing")
    output.add_argument("--quiet", action="store_true", help="no progress, no configuration")
    spread = command.add_argument_group("processes")
    spread.add_argument("--nproc", "--num-gpus", type=int, metavar="N", help="processes, one per GPU (default: 1)")
    spread.add_argument("--cfg-parallel", action="store_true", help="half of the processes for each lane of guidance")
    spread.add_argument("--threads", type=int, metavar="N", help="CPU threads of each process")
    spread.add_argument("--nnodes", type=int, metavar="N", help="machines; start the same command on each")
    spread.add_argument(
        "--node-rank", type=int, metavar="R", help="which of them this is, from 0, which gets the files"
    )
    spread.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="where they meet: a free port of machine 0")
    spread.add_argument("--max-restarts", type=int, metavar="N", help="times that processes which fail go on by "
                        "themselves (default: 0)")  # fmt: skip
    kept = command.add_argument_group("a run that is cut")
    kept.add_argument("--run-dir", metavar="DIR", help="what a run needs to go on (default: NAME.run beside the video; "
                      "removed at the end)")  # fmt: skip
    kept.add_argument(
        "--snapshot-every", type=int, default=8, metavar="N", help="blocks between two snapshots; 0: none"
    )


def _add_grid_flags(plan: argparse.ArgumentParser) -> None:
    grid = plan.add_argument_group("on several processes")
    grid.add_argument("--nproc", "--num-gpus", type=int, metavar="N", help="simulate the plan on so many processes")
    grid.add_argument("--cfg-parallel", action="store_true", help="half of them for each lane of guidance")
    grid.add_argument("--calibrate", action="store_true", help="time the model on this machine, for a few seconds")
    grid.add_argument("--layer-ms", type=float, metavar="T", help="a layer's time for a latent (default: 1 unit)")
    grid.add_argument("--decode-ms", type=float, default=0.0, metavar="T", help="the VAE's time for a latent")
    grid.add_argument("--link-ms", type=float, default=0.0, metavar="T", help="a message's latency")
    grid.add_argument("--link-gbps", type=float, metavar="B", help="gigabits per second (default: no limit)")
    grid.add_argument("--chart", metavar="F", help="process against time, coloured by block, PNG")
    grid.add_argument("--threads", type=int, metavar="N", help="CPU threads for --calibrate")


def _add_train_flags(train: argparse.ArgumentParser) -> None:
    train.add_argument("part", choices=["vae", "text", "latents", "dit", "pack"],
                       help="in this order; latents encodes films once, pack writes the model folder")  # fmt: skip
    train.add_argument("--out", metavar="DIR", required=True, help="the training folder, the same for all parts")
    train.add_argument("--steps", type=int, metavar="N", help="training steps (latents: films of each set, at most)")
    train.add_argument("--batch-size", type=int, metavar="N")
    train.add_argument("--learning-rate", type=float, metavar="R")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument("--model", metavar="DIR", help="pack: the model folder to write")
    train.add_argument("--threads", type=int, metavar="N")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args([_with_hyphens(word) for word in words])
    options.words, options.goes_on = words, False
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        code = _run(options)
        if _is_worker():  # it is over and said: a launcher that ends all its processes need not interrupt the exit
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return code
    except KeyboardInterrupt:
        if _is_worker():  # the process that started this one says so
            return EXIT_INTERRUPTED
        return _say(f"longvid {options.command}: interrupted", EXIT_INTERRUPTED)


def _run(options: argparse.Namespace) -> int:
    """The command's exit code; one line for what went wrong."""
    try:
        return COMMANDS[options.command](options)
    except (ValueError, FileExistsError) as error:
        return _say(f"longvid {options.command}: {_one_line(error)}", EXIT_WRONG_REQUEST)
    except (Broken, FloatingPointError, OSError, MemoryError) as error:
        return _say(f"longvid {options.command} failed: {_one_line(error)}", EXIT_FAILED)


def _is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _with_hyphens(word: str) -> str:
    """`--num_frames` is `--num-frames`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def _request(options: argparse.Namespace) -> dict:
    """What the user gave of a video, without what was left out."""
    names = ("model", "prompt", "negative_prompt", "image", "seconds", "num_frames", "fps", "height", "width",
             "method", "num_steps", "guidance_scale", "flow_shift", "block_size", "lag", "seed", "device",
             "dtype")  # fmt: skip
    given = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _outputs(options: argparse.Namespace):
    from pipelines.record import Outputs

    paths = {"latents": options.save_latents, "metrics": options.metrics, "contact_sheet": options.contact_sheet}
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


def _generate(options: argparse.Namespace) -> int:
    if options.resume:
        return _resume(options)
    _use_threads(options.threads)
    from pipelines.configure import configure

    run = configure(**_request(options))
    return _make(options, run, run, num_frames=run.num_frames, source=run.image, notes={})


def _resume(options: argparse.Namespace) -> int:
    """Give the command of a run's folder again, where it was given, to go on from its last snapshot."""
    from pipelines.run_folder import command_of

    folder = Path(options.resume).resolve()
    found = command_of(folder)
    os.chdir(found["folder"])
    stored = parser().parse_args(found["command"])
    stored.resume, stored.run_dir, stored.overwrite, stored.goes_on = None, str(folder), True, True
    for name in ("nproc", "nnodes", "node_rank", "rdzv_endpoint"):
        if getattr(options, name) is not None:
            setattr(stored, name, getattr(options, name))
    stored.threads = options.threads or found["threads"]  # other numbers of threads may round differently
    stored.max_restarts, stored.quiet = options.max_restarts, options.quiet
    stored.words = ["generate", "--resume", str(folder), *(["--quiet"] if options.quiet else [])]
    return COMMANDS[stored.command](stored)


def _extend(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from pipelines.configure import configure
    from pipelines.extend import configure_extension

    extension = configure_extension(configure(**_request(options)), Path(options.video))
    notes = {"input": str(extension.video), "input_frames": extension.input_frames,
             "history_latents": extension.history_latents}  # fmt: skip
    return _make(options, extension, extension.run, num_frames=extension.num_frames, source=extension.video,
                 notes=notes)  # fmt: skip


def _make(options, request, run, *, num_frames: int, source: Path | None, notes: dict) -> int:
    """Make the video of a request: here, in processes that this one starts, or as one of those."""
    outputs, plan = _outputs(options), request.plan()
    described = _describe(run, plan, outputs, notes)
    from parallel.launch import launch
    from pipelines.run_folder import RunFolder
    from pipelines.spread import Task, check_gpus, grid_of, keeping_of, taken_part

    how = _how(options)
    is_first = not _is_worker() and how.machine == 0
    if is_first:
        outputs.check(num_frames, run.height, run.width, source=source)
    path = Path(options.run_dir) if options.run_dir else outputs.video.with_suffix(".run")
    folder = RunFolder(path=path, every=options.snapshot_every)
    if is_first:
        folder.check(overwrite=options.overwrite)
    if not _is_worker():
        grid_of(how.world_size, run, cfg_parallel=options.cfg_parallel)
        check_gpus(how, run)
    if options.dry_run:
        return _print([json.dumps(described, indent=2, default=str)])
    goes_on = options.goes_on or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    outputs = replace(outputs, overwrite=options.overwrite or goes_on)
    keeping = keeping_of(folder, run, plan, goes_on=goes_on, say=lambda line: print(line, file=sys.stderr))
    task = Task(request=request, outputs=outputs, notes=notes, keeping=keeping)
    if not _is_worker():
        with _way_on(folder):
            if how.world_size == 1:
                return _carry_out(options, task, described, num_frames)
            command = options.words if options.goes_on else _whole_command(options, task)
            return launch("pipelines.cli", command, how)
    with taken_part(task, cfg_parallel=options.cfg_parallel) as (task, stage):
        if not stage.is_head:
            return _work(task, stage)
        if not goes_on:
            task.outputs.check(num_frames, run.height, run.width, source=source)
        return _carry_out(options, task, described, num_frames, stage)


def _how(options):
    """The processes asked for."""
    from parallel.launch import Launch, threads_each

    num_processes = 1 if options.nproc is None else options.nproc
    return Launch(
        num_processes=num_processes, threads=options.threads or threads_each(max(1, num_processes)),
        num_machines=1 if options.nnodes is None else options.nnodes, machine=options.node_rank or 0,
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

    frames = list(task.frames(Observer(), stage))
    assert not frames, "frames are made on the head alone"
    return EXIT_DONE


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


def _print(lines: Iterable[str]) -> int:
    """Print what was asked for, as much as somebody reads: `| head` ends it without a word."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it exits
    return EXIT_DONE


def _carry_out(options, task, described: dict, num_frames: int, stage=None) -> int:
    """Write the video with progress on standard error; what is there stays if it is cut."""
    from pipelines.progress import Progress
    from pipelines.record import Meter, record

    run, outputs, done = task.run, task.outputs, 0
    meter = Meter(keep_latents=outputs.latents is not None)
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
    return _print([str(outputs.video)])


def _whole_command(options, task) -> list[str]:
    """The command with what was chosen for it, so that it can be given again."""
    return [*options.words, "--seed", str(task.run.seed), "--output", str(task.outputs.video)]


def _use_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1; try {os.cpu_count()}")
    import torch

    torch.set_num_threads(threads)


def _plan(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from pipelines.configure import configure
    from pipelines.show_plan import plan_json, plan_text

    request = {"prompt": "any", **_request(options)}
    if not options.calibrate:  # a plan is the same for all
        request |= {"device": "cpu", "dtype": "float32"}
    run = configure(**request)
    plan = run.plan()
    if options.nproc is None:
        return _print([json.dumps(plan_json(plan))] if options.json else plan_text(plan))
    return _plan_grid(options, run, plan)


def _plan_grid(options, run, plan) -> int:
    """Simulate a plan on processes: text or JSON, and the chart."""
    from longvid.contact_sheet import write_png
    from parallel.cost import Costs, best_split, memory, simulate
    from parallel.grid import Grid
    from pipelines.calibrate import measured_costs, shape_of
    from pipelines.record import check_file
    from pipelines.show_grid import chart, grid_json, grid_text
    from pipelines.spread import grid_of

    grid, shape = grid_of(options.nproc, run, cfg_parallel=options.cfg_parallel), shape_of(run)
    if options.chart:
        check_file(Path(options.chart), overwrite=False)
    in_seconds = options.calibrate or options.layer_ms is not None
    bandwidth = float("inf") if options.link_gbps is None else options.link_gbps * 1e9 / 8
    if options.calibrate:
        costs = measured_costs(run, plan, latency=options.link_ms / 1e3, bandwidth=bandwidth)
    else:
        scale = 1e-3 if in_seconds else 1.0
        costs = Costs(per_latent=scale * (1.0 if options.layer_ms is None else options.layer_ms),
                      decode=scale * options.decode_ms, latency=scale * options.link_ms,
                      bandwidth=bandwidth)  # fmt: skip
    layers = best_split(plan, grid, costs, shape.num_layers)
    timeline = simulate(plan, grid, layers, costs, shape)
    one = simulate(plan, Grid(num_stages=1), [range(shape.num_layers)], costs, shape).makespan
    found = grid_json(timeline, layers, memory(plan, grid, layers, shape), one, "s" if in_seconds else "units")
    if options.chart:
        write_png(options.chart, chart(timeline, in_seconds=in_seconds))
    return _print([json.dumps(found)] if options.json else grid_text(found))


def _train(options: argparse.Namespace) -> int:
    _use_threads(options.threads)
    from pipelines.train import train

    given = {name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate")}
    for line in train(options.part, Path(options.out), seed=options.seed, resume=options.resume,
                      model=Path(options.model) if options.model else None,
                      **{name: value for name, value in given.items() if value is not None}):  # fmt: skip
        print(json.dumps(line))
        sys.stdout.flush()
    return EXIT_DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": _generate,
    "extend": _extend,
    "plan": _plan,
    "train": _train,
}


if __name__ == "__main__":
    sys.exit(main())
