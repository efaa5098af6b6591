"""The command `longvid bench`: a sweep, the comparison of two, a report, the guard."""

import argparse
import shlex
import sys
from pathlib import Path

from pipelines.carry_out import EXIT_DONE, print_lines

EXIT_CHANGED = 1


def bench_command(options: argparse.Namespace) -> int:
    """Do what was asked; returns the exit code. Raises ValueError for flags that do not go together."""
    if options.what != "guard" and (options.update or options.baseline):
        raise ValueError("--update and --baseline are for the guard: longvid bench guard --update")
    return {"run": _run, "compare": _compare, "report": _report, "guard": _guard}[options.what](options)


def _run(options: argparse.Namespace) -> int:
    from pipelines.bench import bench, cases
    from pipelines.bench_table import TABLE

    if options.folders or not options.out:
        raise ValueError("say where results go: longvid bench --out DIR")
    asked = {name: value.split(",") if value else [None] for name, value in
             (("models", options.model), ("methods", options.method), ("layouts", options.layout))}  # fmt: skip
    if options.shape:
        asked |= {"shapes": options.shape.split(","), "models": asked["models"] if options.model else []}
    if not all(num.isdigit() and int(num) for num in options.nproc.split(",")):
        raise ValueError(f"nproc={options.nproc} must be numbers of at least 1, such as 1,2,4")
    found = cases(**asked, nprocs=[int(num) for num in options.nproc.split(",")], threads=options.threads,
                  words=shlex.split(options.generate))  # fmt: skip
    out = Path(options.out)
    words = [Path(word).name if word.startswith("/") else word for word in options.words]  # not this machine's folders
    for record in bench(found, out, repeats=options.repeats, warm_up=not options.no_warm_up,
                        command=shlex.join(["longvid", *words])):  # fmt: skip
        metrics = record["metrics"]
        print(f"{record['case']['name']}: {record['process_s']:.2f} s, {metrics['fps']:.1f} frames/s", file=sys.stderr)
    return print_lines((out / TABLE).read_text().splitlines())


def _compare(options: argparse.Namespace) -> int:
    from pipelines.bench_table import compare, read

    if len(options.folders) != 2:
        raise ValueError(f"compare takes two folders, not {len(options.folders)}: before and after")
    return print_lines(compare(*(read(Path(folder)) for folder in options.folders)))


def _report(options: argparse.Namespace) -> int:
    from pipelines.bench_report import write_report

    if len(options.folders) != 1:
        raise ValueError(f"report takes one folder, not {len(options.folders)}: longvid bench report DIR")
    return print_lines([str(write_report(Path(options.folders[0])))])


def _guard(options: argparse.Namespace) -> int:
    from pipelines.guard import BASELINE, guard

    if options.folders:
        raise ValueError("guard takes no folders: longvid bench guard, or longvid bench guard --update")
    baseline = Path(options.baseline) if options.baseline else BASELINE
    as_before, lines = guard(baseline, update=options.update)
    print_lines(lines)
    return EXIT_DONE if as_before else EXIT_CHANGED
