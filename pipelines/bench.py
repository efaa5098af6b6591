"""Benchmarks: every case of a sweep as commands of their own, interleaved, with medians and what they depended on.

A case is a model, a method, a number of processes and a layout; it runs `longvid generate` in new processes, as a user
would, after a warm-up that is not counted. Repeats go round all cases, so that what disturbs the machine for a while
disturbs all of them.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from pipelines.bench_table import RESULTS, TABLE, read, table
from pipelines.record import versions
from pipelines.shapes import find_shape, save_shape

LAYOUTS = {
    "fastest": (),
    "stages": ("--no-cfg-parallel", "--sequence-parallel", "1"),
    "lanes": ("--cfg-parallel", "--sequence-parallel", "1"),
    "sequence": ("--no-cfg-parallel", "--sequence-parallel", "{nproc}"),
}
"""What several processes share, and the flags that say so; the cost model chooses the fastest."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run; `layout` is one of `LAYOUTS`, `words` are further flags of generate.

    A model is a folder, a hub id, or the name of a shape of random weights (`is_shape`); None is the embedded one.
    """

    model: str | None
    method: str | None
    nproc: int
    threads: int | None
    layout: str
    words: tuple[str, ...]
    is_shape: bool = False

    @property
    def name(self) -> str:
        """Short, and different for each case of a sweep."""
        layout = "" if self.layout == "fastest" else f"-{self.layout}"
        model = Path(self.model).name if self.model else "embedded"
        return f"{model}-{self.method or 'default'}-{self.nproc}{layout}"

    @property
    def command(self) -> list[str]:
        """The flags of `longvid generate`."""
        given = {"--model": self.model, "--method": self.method, "--nproc": self.nproc, "--threads": self.threads}
        flags = [str(word) for flag, value in given.items() if value is not None for word in (flag, value)]
        return [*flags, *(word.format(nproc=self.nproc) for word in LAYOUTS[self.layout]), *self.words]


def cases(
    *,
    models: Sequence[str | None] = (),
    shapes: Sequence[str] = (),
    methods: Sequence[str | None],
    nprocs: Sequence[int],
    layouts: Sequence[str],
    threads: int | None,
    words: Sequence[str],
) -> list[Case]:
    """All combinations. One process has one layout.

    Raises ValueError for unknown layouts and shapes, and two cases of one name.
    """
    found = []
    for shape in shapes:
        find_shape(shape)
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise ValueError(f"layout {unknown[0]!r} is unknown; use {', '.join(LAYOUTS)}")
    for model, is_shape in [*((model, False) for model in models), *((shape, True) for shape in shapes)]:
        for method in methods:
            for nproc in nprocs:
                for layout in layouts if nproc > 1 else ["fastest"]:
                    found.append(Case(model=model, method=method, nproc=nproc, threads=threads, layout=layout,
                                      words=tuple(words), is_shape=is_shape))  # fmt: skip
    names = [case.name for case in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two cases are called {twice[0]}; name each model, method, number and layout once")
    return found


def bench(found: Sequence[Case], out: Path, *, repeats: int, warm_up: bool = True, command: str) -> Iterator[dict]:
    """Run all cases, yielding each record as it is appended to `results.jsonl`; then write `table.md`.

    `command` is that of the sweep, for the records. Folders of shapes are made for the sweep and removed after it.
    The last video, contact sheet and trace of each case stay in `out`. Raises ValueError for a folder that holds
    results already or fewer repeats than 1, and ChildProcessError with what a command said that failed.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1; try 3")
    if (out / RESULTS).exists():
        raise ValueError(f"{out / RESULTS} exists; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    about = {"sweep": command, "date": date.today().isoformat(), "versions": versions(), "hardware": hardware()}
    with tempfile.TemporaryDirectory() as made:
        shapes = dict.fromkeys(case.model for case in found if case.is_shape)
        folders = {name: save_shape(name, Path(made) / name.replace("@", "-")) for name in shapes}
        for repeat in range(-1 if warm_up else 0, repeats):
            for case in found:
                record = {"case": {**asdict(case), "name": case.name}, "repeat": repeat, **_run(case, out, folders)}
                if repeat < 0:
                    continue
                record |= about
                with (out / RESULTS).open("a") as file:
                    file.write(json.dumps(record) + "\n")
                yield record
    (out / TABLE).write_text("\n".join(table(read(out))) + "\n")


def _run(case: Case, out: Path, folders: Mapping[str, Path]) -> dict:
    """One command; its metrics and how long it took from start to end."""
    files = {flag: out / f"{case.name}{end}" for flag, end in
             (("--output", ".mp4"), ("--metrics", ".metrics.json"), ("--trace", ".trace.json"),
              ("--contact-sheet", ".png"))}  # fmt: skip
    words = ["generate", *case.command, "--overwrite", "--quiet"]
    words += [str(word) for flag, path in files.items() for word in (flag, path)]
    given = [str(folders.get(word, word)) for word in words]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-m", "pipelines.cli", *given], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if ran.returncode:
        line = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ChildProcessError(f"longvid {' '.join(words)} ended with {ran.returncode}: {line}")
    metrics = json.loads(files["--metrics"].read_text())
    metrics["config"]["model"] = case.model or "embedded"
    names = [word.removeprefix(f"{out}{os.sep}") for word in words]  # a record tells nothing of this machine's folders
    return {"command": ["longvid", *names], "process_s": seconds, "metrics": metrics,
            "schedule": json.loads(files["--trace"].read_text())["otherData"]}  # fmt: skip


def hardware() -> dict:
    """What the numbers were measured on."""
    import torch

    info, cpu = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1), "gpus": gpus,
            "system": platform.platform()}  # fmt: skip
