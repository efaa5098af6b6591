"""Benchmarks: every case of a sweep as commands of their own, interleaved, with medians and what they depended on.

A case is a model, a method, a number of processes and a layout; it runs `longvid generate` in new processes, as a user
would, after a warm-up that is not counted. Repeats go round all cases, so that what disturbs the machine for a while
disturbs all of them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.record import versions

RESULTS, TABLE = "results.jsonl", "table.md"

LAYOUTS = {
    "fastest": (),
    "stages": ("--no-cfg-parallel", "--sequence-parallel", "1"),
    "lanes": ("--cfg-parallel", "--sequence-parallel", "1"),
    "sequence": ("--no-cfg-parallel", "--sequence-parallel", "{nproc}"),
}
"""What several processes share, and the flags that say so; the cost model chooses the fastest."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run; `layout` is one of `LAYOUTS`, `words` are further flags of generate."""

    model: str | None
    method: str | None
    nproc: int
    threads: int | None
    layout: str
    words: tuple[str, ...]

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
    models: Sequence[str | None],
    methods: Sequence[str | None],
    nprocs: Sequence[int],
    layouts: Sequence[str],
    threads: int | None,
    words: Sequence[str],
) -> list[Case]:
    """All combinations. One process has one layout. Raises ValueError for unknown layouts and two cases of one name."""
    found = []
    if unknown := [name for name in layouts if name not in LAYOUTS]:
        raise ValueError(f"layout {unknown[0]!r} is unknown; use {', '.join(LAYOUTS)}")
    for model in models:
        for method in methods:
            for nproc in nprocs:
                for layout in layouts if nproc > 1 else ["fastest"]:
                    found.append(Case(model=model, method=method, nproc=nproc, threads=threads, layout=layout,
                                      words=tuple(words)))  # fmt: skip
    names = [case.name for case in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two cases are called {twice[0]}; name each model, method, number and layout once")
    return found


def bench(found: Sequence[Case], out: Path, *, repeats: int, warm_up: bool = True) -> Iterator[dict]:
    """Run all cases, yielding each record as it is appended to `results.jsonl`; then write `table.md`.

    The last video, contact sheet and trace of each case stay in `out`. Raises ValueError for a folder that holds
    results already or fewer repeats than 1, and ChildProcessError with what a command said that failed.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1; try 3")
    if (out / RESULTS).exists():
        raise ValueError(f"{out / RESULTS} exists; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    machine = hardware()
    for repeat in range(-1 if warm_up else 0, repeats):
        for case in found:
            record = {"case": {**asdict(case), "name": case.name}, "repeat": repeat, **_run(case, out)}
            if repeat < 0:
                continue
            record |= {"versions": versions(), "hardware": machine}
            with (out / RESULTS).open("a") as file:
                file.write(json.dumps(record) + "\n")
            yield record
    (out / TABLE).write_text("\n".join(table(read(out))) + "\n")


def _run(case: Case, out: Path) -> dict:
    """One command; its metrics and how long it took from start to end."""
    files = {flag: out / f"{case.name}{end}" for flag, end in
             (("--output", ".mp4"), ("--metrics", ".metrics.json"), ("--trace", ".trace.json"),
              ("--contact-sheet", ".png"))}  # fmt: skip
    words = ["generate", *case.command, "--overwrite", "--quiet"]
    words += [str(word) for flag, path in files.items() for word in (flag, path)]
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True, check=False)
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
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpus": gpus, "system": platform.platform()}


def read(folder: Path) -> list[dict]:
    """The records of a folder. Raises ValueError if there are none."""
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{path} is not there; give a folder that `longvid bench --out` made")
    return [json.loads(line) for line in path.read_text().splitlines()]


FIGURES = {
    "command s": lambda r: r["process_s"],
    "work s": lambda r: r["metrics"]["wall_s"],
    "first frames s": lambda r: r["metrics"]["first_frame_s"],
    "block p50 s": lambda r: r["metrics"]["block_p50_s"],
    "block p95 s": lambda r: r["metrics"]["block_p95_s"],
    "steady fps": lambda r: r["metrics"]["steady_fps"],
    "fps": lambda r: r["metrics"]["fps"],
    "makespan s": lambda r: r["schedule"]["measured_makespan_s"],
    "planned s": lambda r: r["schedule"]["planned_makespan_s"],
    "idle": lambda r: statistics.mean(r["schedule"]["measured_idle"]),
    "planned idle": lambda r: statistics.mean(r["schedule"]["planned_idle"]),
    "peak MiB": lambda r: max(r["metrics"]["peak_memory_mb"]),
    "sent MiB": lambda r: sum(r["metrics"]["bytes_sent"]) / 2**20,
}
"""Columns: a figure of one record."""


def by_case(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Records by the name of their case, in the order of the sweep."""
    found: dict[str, list[dict]] = {}
    for record in records:
        found.setdefault(record["case"]["name"], []).append(record)
    return found


def figures(records: Sequence[dict]) -> dict[str, tuple[float, float]]:
    """Median of each figure over a case's repeats, and half the distance from the least to the greatest."""
    found = {}
    for name, of in FIGURES.items():
        values = [of(record) for record in records if of(record) is not None]
        if values:
            found[name] = (statistics.median(values), (max(values) - min(values)) / 2)
    return found


def table(records: Sequence[dict]) -> Iterator[str]:
    """Markdown: a row per case, medians with half of their range, and the speed-up over one process of the same."""
    cases = by_case(records)
    first = records[0]
    yield (f"{first['hardware']['cpu']}, {first['hardware']['cores']} cores, GPUs: "
           f"{', '.join(first['hardware']['gpus']) or 'none'}; torch {first['versions']['torch']}; medians of "
           f"{len(next(iter(cases.values())))} interleaved runs, ± half their range.")  # fmt: skip
    yield ""
    columns = [*FIGURES, "speed-up", "efficiency", "latent_sha256"]
    yield "| case | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, of_case in cases.items():
        found, case = figures(of_case), of_case[0]["case"]
        cells = [f"{found[c][0]:.3g} ± {found[c][1]:.2g}" if c in found else "" for c in FIGURES]
        one = next((r for r in cases.values() if _alone(r[0]["case"], case)), None)
        gain = figures(one)["work s"][0] / found["work s"][0] if one else None
        cells += [f"{gain:.2f}", f"{gain / case['nproc']:.2f}"] if gain else ["", ""]
        hashes = {record["metrics"]["latent_sha256"][:12] for record in of_case}
        yield f"| {name} | " + " | ".join([*cells, ", ".join(sorted(hashes))]) + " |"


def _alone(one: dict, case: dict) -> bool:
    """Whether a case is the other on a single process."""
    return one["nproc"] == 1 and all(one[key] == case[key] for key in ("model", "method", "threads", "words"))


LOWER_IS_BETTER = ("command s", "work s", "first frames s", "block p50 s", "block p95 s", "peak MiB", "sent MiB")
LEAST = {"command s": 0.1, "work s": 0.1, "first frames s": 0.05, "block p50 s": 0.005, "block p95 s": 0.005,
         "peak MiB": 4.0, "sent MiB": 0.01}  # fmt: skip
"""Changes smaller than this are not worth a word, however large their share."""


def compare(before: Sequence[dict], after: Sequence[dict], *, relative: float = 0.05) -> Iterator[str]:
    """Lines: a verdict for each figure of each case that both have.

    "slower", "faster", "more" or "less" only where a change exceeds the share `relative`, an amount that matters
    (`LEAST`) and the spread of both; else "same". Other latents are said, since then other work was measured.
    """
    old, new = by_case(before), by_case(after)
    both = [name for name in old if name in new]
    if not both:
        raise ValueError(f"no case is in both; one has {', '.join(old)}, the other {', '.join(new)}")
    for name in both:
        hashes = [{record["metrics"]["latent_sha256"] for record in side[name]} for side in (old, new)]
        yield f"{name}: {'the same latents' if hashes[0] == hashes[1] else 'OTHER LATENTS'}"
        first, second = figures(old[name]), figures(new[name])
        for figure in LOWER_IS_BETTER:
            if figure not in first or figure not in second:
                continue
            (a, a_spread), (b, b_spread) = first[figure], second[figure]
            change, share = b - a, (b - a) / a if a else 0.0
            counts = abs(change) > max(LEAST[figure], a_spread + b_spread, relative * abs(a))
            words = ("slower", "faster") if figure.endswith(" s") else ("more", "less")
            verdict = words[change < 0] if counts else "same"
            yield f"  {figure}: {a:.4g} -> {b:.4g} ({100 * share:+.1f} %): {verdict}"
    for name in [*old, *new]:
        if name not in both:
            yield f"{name}: only in one of them"
