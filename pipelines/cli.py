"""The command `longvid`: parses, calls, prints. Nothing heavy is imported before the arguments are read."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipelines.carry_out import Broken, print_lines
from pipelines.flags import EXIT_WRONG_REQUEST, parser
from pipelines.make import degrees_of, is_worker, make, use_threads

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
DEGREES = ("stages", "sequence_parallel", "cfg_parallel", "parallel_vae")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = parser().parse_args([_with_hyphens(word) for word in words])
    options.words, options.goes_on = words, False
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        code = _run(options)
        _be_over()
        return code
    except KeyboardInterrupt:
        if is_worker():  # the process that started this one says so
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


def _with_hyphens(word: str) -> str:
    """`--num_frames` is `--num-frames`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _be_over() -> None:
    """A launcher that ends all its processes need not interrupt what one still says, nor its exit."""
    if is_worker():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _say(line: str, code: int) -> int:
    _be_over()
    print(line, file=sys.stderr)
    return code


def _request(options: argparse.Namespace) -> dict:
    """What the user gave of a video, without what was left out."""
    names = ("model", "prompt", "negative_prompt", "image", "seconds", "num_frames", "fps", "height", "width",
             "method", "num_steps", "first_steps", "guidance_scale", "flow_shift", "block_size", "blocks_per_pass",
             "retire", "lag", "seed", "device", "dtype", "vae_dtype", "compile")  # fmt: skip
    given = {name: getattr(options, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _generate(options: argparse.Namespace) -> int:
    if options.resume:
        return _resume(options)
    use_threads(options.threads)
    request, run = _configured(options)
    notes = {"prompts_file": options.prompts_file} if options.prompts_file else {}
    return make(options, request, run, num_frames=run.num_frames, source=run.image, notes=notes)


def _configured(options: argparse.Namespace, **more):
    """What a generate or a plan asks for: a run, or several of a file's prompts; and the (first) run."""
    from pipelines.configure import configure
    from pipelines.several import Several, read_prompts

    request = _request(options)
    if not options.prompts_file:
        run = configure(**{**more, **request})
        return run, run
    if options.prompt is not None:
        raise ValueError("prompt and prompts_file both say what to show; give one of them")
    prompts = read_prompts(Path(options.prompts_file))
    run = configure(**{**more, **request, "prompt": prompts[0]})
    runs = tuple(replace(run, prompt=prompt) for prompt in prompts)
    return (Several(runs=runs), run) if len(runs) > 1 else (run, run)


def _resume(options: argparse.Namespace) -> int:
    """Give the command of a run's folder again, where it was given, to go on from its last snapshot."""
    from pipelines.run_folder import command_of

    folder = Path(options.resume).resolve()
    found = command_of(folder)
    os.chdir(found["folder"])
    stored = parser().parse_args(found["command"])
    stored.resume, stored.run_dir, stored.overwrite, stored.goes_on = None, str(folder), True, True
    for name in ("dtype", "vae_dtype"):  # another machine's defaults may differ
        setattr(stored, name, found["depends_on"].get(name))
    if options.nproc is not None:
        for name in ("nproc", *DEGREES):
            setattr(stored, name, getattr(options, name))
    stored.nnodes, stored.node_rank, stored.rdzv_endpoint = options.nnodes, options.node_rank, options.rdzv_endpoint
    stored.rdzv_timeout = options.rdzv_timeout
    stored.threads = options.threads or found["threads"]  # other numbers of threads may round differently
    stored.max_restarts, stored.quiet = options.max_restarts, options.quiet
    switches = ["--quiet"] if options.quiet else []
    for name in ("stages", "sequence_parallel"):
        if getattr(stored, name) is not None:
            switches += ["--" + name.replace("_", "-"), str(getattr(stored, name))]
    for name in ("cfg-parallel", "parallel-vae"):
        if (wanted := getattr(stored, name.replace("-", "_"))) is not None:
            switches.append(f"--{name}" if wanted else f"--no-{name}")
    stored.words = ["generate", "--resume", str(folder), "--nproc", str(stored.nproc or 1), *switches]
    return COMMANDS[stored.command](stored)


def _extend(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from pipelines.configure import configure
    from pipelines.extend import configure_extension

    extension = configure_extension(configure(**_request(options)), Path(options.video))
    notes = {"input": str(extension.video), "input_frames": extension.input_frames,
             "history_latents": extension.history_latents}  # fmt: skip
    return make(options, extension, extension.run, num_frames=extension.num_frames, source=extension.video,
                 notes=notes)  # fmt: skip


def _plan(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from pipelines.show_plan import plan_json, plan_text
    from pipelines.spread import num_videos_of

    request, run = _configured(options, prompt="any")
    if not options.calibrate:  # a plan is the same for all
        run = replace(run, device="cpu", dtype="float32", vae_dtype="float32")
    if num_videos_of(request) > 1:
        request = request.for_processes(options.nproc or 1, options.sequence_parallel, None)
    plan = request.plan()
    if options.nproc is None:
        return print_lines([json.dumps(plan_json(plan))] if options.json else plan_text(plan))
    return _plan_grid(options, run, plan)


def _plan_grid(options, run, plan) -> int:
    """Simulate a plan on processes: text or JSON, and the chart."""
    from longvid.contact_sheet import write_png
    from parallel.cost import Costs, memory, simulate
    from parallel.grid import Grid, possible_grids
    from parallel.layout import fastest
    from pipelines.calibrate import measured_costs, shape_of
    from pipelines.record import check_file
    from pipelines.show_grid import chart, grid_json, grid_text
    from pipelines.spread import limits_of

    may_cut_rows, shape = (options.device or "").startswith("cuda"), shape_of(run)
    grids = possible_grids(options.nproc, limits_of(run), degrees_of(options), may_cut_rows=may_cut_rows)
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
    layout = fastest(plan, grids, costs, shape)
    layers, timeline = list(layout.layers), layout.planned
    one = simulate(plan, Grid(num_stages=1), [range(shape.num_layers)], costs, shape).makespan
    found = grid_json(timeline, layers, memory(plan, layout.grid, layers, shape), one, "s" if in_seconds else "units")
    if options.chart:
        write_png(options.chart, chart(timeline, in_seconds=in_seconds))
    return print_lines([json.dumps(found)] if options.json else grid_text(found))


def _bench(options: argparse.Namespace) -> int:
    from pipelines.bench_command import bench_command

    return bench_command(options)


def _train(options: argparse.Namespace) -> int:
    from pipelines.train_command import run_training

    return run_training(options)


def _data(options: argparse.Namespace) -> int:
    from pipelines.train_command import make_data

    return make_data(options)


def _lora(options: argparse.Namespace) -> int:
    from pipelines.train_command import merge

    return merge(options)


def _evaluate(options: argparse.Namespace) -> int:
    use_threads(options.threads)
    from pipelines.evaluate_run import evaluate

    say = (lambda line: None) if options.quiet else (lambda line: print(line, file=sys.stderr, flush=True))
    return print_lines(
        evaluate(options.videos, options.prompts, _request(options), Path(options.out), num_prompts=options.num_prompts,
                 has_frechet=not options.no_frechet, overwrite=options.overwrite, say=say)
    )  # fmt: skip


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": _generate,
    "extend": _extend,
    "plan": _plan,
    "bench": _bench,
    "train": _train,
    "data": _data,
    "lora": _lora,
    "evaluate": _evaluate,
}


if __name__ == "__main__":
    sys.exit(main())
