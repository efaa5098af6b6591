"""What a sweep found: figures of each case, as a table, and the verdict of comparing two sweeps."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

RESULTS, TABLE = "results.jsonl", "table.md"


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
    "planned at its speed s": lambda r: r["schedule"].get("planned_at_its_speed_s"),
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
    if "sweep" in first:
        yield f"`{first['sweep']}`, {first['date']}:"
        yield ""
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
    yield from _by_process(cases)


def _by_process(cases: dict[str, list[dict]]) -> Iterator[str]:
    """Markdown: what each process of the last run of a case took, and sent over each of its links."""
    several = {name: found[-1]["metrics"] for name, found in cases.items() if found[0]["case"]["nproc"] > 1}
    if not several:
        return
    yield ""
    yield "| case | process | peak MiB | waited | sent within its stage, MiB | sent to others, MiB |"
    yield "|---" * 6 + "|"
    for name, metrics in several.items():
        for rank, peak in enumerate(metrics["peak_memory_mb"]):
            links = metrics["bytes_to"][rank] if "bytes_to" in metrics else {}
            sent = ", ".join(f"{size / 2**20:.1f} to {to}" for to, size in links.items())
            yield (f"| {name} | {rank} | {peak:.0f} | {100 * metrics['idle_fraction'][rank]:.1f} % | "
                   f"{metrics['bytes_exchanged'][rank] / 2**20:.1f} | {sent} |")  # fmt: skip


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
