"""A sweep's folder as one HTML file that needs nothing else: no network, no script, pictures and videos inside."""

import base64
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from longvid.lines import Lines, draw_lines
from longvid.quality import DRIFTING
from pipelines.bench_table import by_case, figures, read, table
from pipelines.show_grid import colour

REPORT = "report.html"
KINDS = {".png": "image/png", ".mp4": "video/mp4"}
STYLE = """body { font: 14px/1.5 sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1em 0 } td, th { border: 1px solid #ccc;
padding: 2px 8px; text-align: right; white-space: nowrap } td:first-child, th:first-child { text-align: left }
img, video { max-width: 100%; display: block; margin: .5em 0 }
pre { overflow-x: auto; background: #f4f4f4; padding: 1em }
svg { max-width: 100%; height: auto } .charts { display: flex; flex-wrap: wrap; gap: 1em }"""
BAR, WIDTH = 18, 1100


def write_report(folder: Path) -> Path:
    """Write `report.html` into a sweep's folder; returns its path. Raises ValueError if the folder holds no results."""
    records = read(folder)
    path = folder / REPORT
    path.write_text("\n".join(_page(folder, records)) + "\n", encoding="utf-8")
    return path


def _page(folder: Path, records: Sequence[dict]) -> Iterator[str]:
    cases = by_case(records)
    yield ('<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
           f"<title>longvid bench</title><style>{STYLE}</style></head><body><h1>longvid bench</h1>")  # fmt: skip
    yield from _as_html(table(records))
    yield f"<h2>Curves</h2><div class='charts'>{''.join(_curves(folder, cases))}</div>"
    for name, of_case in cases.items():
        yield f"<h2>{escape(name)}</h2>"
        yield from _case(folder, name)
        about = {key: of_case[-1].get(key) for key in ("command", "versions", "hardware")}
        about |= {"config": of_case[-1]["metrics"]["config"], "layout": of_case[-1]["metrics"]["layout"]}
        yield f"<details><summary>configuration</summary><pre>{escape(json.dumps(about, indent=2))}</pre></details>"
    yield "</body></html>"


def _as_html(lines: Iterator[str]) -> Iterator[str]:
    """Markdown of paragraphs and tables."""
    is_open = False
    for line in lines:
        if line.startswith("|---"):
            continue
        if line.startswith("|"):
            kind = "td" if is_open else "th"
            cells = "".join(f"<{kind}>{escape(cell.strip())}</{kind}>" for cell in line.strip("|").split("|"))
            yield ("" if is_open else "<table>") + f"<tr>{cells}</tr>"
        else:
            said = re.sub("`(.*?)`", r"<code>\1</code>", escape(line))
            yield ("</table>" if is_open else "") + (f"<p>{said}</p>" if line else "")
        is_open = line.startswith("|")
    if is_open:
        yield "</table>"


def _case(folder: Path, name: str) -> Iterator[str]:
    """The last video of a case, its contact sheet, and what each process did when."""
    sheet, video, trace = (folder / f"{name}{end}" for end in (".png", ".mp4", ".trace.json"))
    if sheet.is_file():
        yield f'<img alt="frames of {escape(name)}" src="{_inside(sheet)}">'
    if video.is_file():
        yield f'<video controls muted loop preload="metadata" src="{_inside(video)}"></video>'
    if trace.is_file():
        yield _processes(json.loads(trace.read_text())["traceEvents"])


def _inside(path: Path) -> str:
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _processes(events: Sequence[dict]) -> str:
    """Processes against time, measured above and planned below, on one scale; coloured by block."""
    spans = [e for e in events if e["ph"] == "X" and e["name"] in ("pass", "decode")]
    if not spans:
        return ""
    end = max(e["ts"] + e["dur"] for e in spans)
    rows = sorted({(e["pid"], e["tid"]) for e in spans})
    height = BAR * len(rows) + 24
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 120} {height}" width="{WIDTH + 120}" '
             f'height="{height}" font-family="sans-serif" font-size="11">']  # fmt: skip
    for i, (pid, tid) in enumerate(rows):
        parts.append(f'<text x="0" y="{i * BAR + 13}">{"planned" if pid else "measured"} {tid}</text>')
        for e in spans:
            if (e["pid"], e["tid"]) == (pid, tid):
                fill = "#282828" if e["name"] == "decode" else f"rgb{colour(e['args']['blocks'][0], e['args']['lane'])}"
                parts.append(f'<rect x="{90 + WIDTH * e["ts"] / end:.2f}" y="{i * BAR + 2}" height="{BAR - 4}" '
                             f'width="{max(WIDTH * e["dur"] / end, 0.3):.2f}" fill="{fill}"/>')  # fmt: skip
    parts += [f'<text x="{90 + WIDTH * tenth / 10:.0f}" y="{height - 6}" text-anchor="middle">'
              f"{end * tenth / 1e7:.3g} s</text>" for tenth in range(0, 11, 2)]  # fmt: skip
    return "".join([*parts, "</svg>"])


def _curves(folder: Path, cases: dict[str, list[dict]]) -> Iterator[str]:
    """Speed-up, idle, memory against length where lengths differ, and drift over time of each video."""
    found = [(of_case[0], figures(of_case)) for of_case in cases.values()]
    layouts = {record["case"]["layout"] for record, _ in found if record["case"]["nproc"] > 1} or {"fastest"}
    speed: dict[str, list] = {}
    idle: dict[str, list] = {}
    memory: dict[str, list] = {}
    for record, of in found:
        case = record["case"]
        kind = f"{Path(case['model']).name if case['model'] else 'embedded'}, {case['method'] or 'its method'}"
        for layout in sorted(layouts) if case["nproc"] == 1 else [case["layout"]]:
            speed.setdefault(f"{kind}, {layout}", []).append((case["nproc"], of["fps"][0]))
            idle.setdefault(f"{layout}, measured", []).append((case["nproc"], 100 * of["idle"][0]))
            idle.setdefault(f"{layout}, planned", []).append((case["nproc"], 100 * of["planned idle"][0]))
        memory.setdefault(f"{kind}, {case['nproc']} processes", []).append(
            (record["metrics"]["seconds_of_video"], of["peak MiB"][0]))  # fmt: skip
    sort = lambda lines: {name: sorted(points) for name, points in lines.items()}  # noqa: E731
    planned = frozenset(name for name in idle if name.endswith("planned"))
    gain = {name: [(num, fps / points[0][1]) for num, fps in points] for name, points in sort(speed).items()}
    yield draw_lines(Lines(title="speed-up over the fewest processes", x="processes", y="times", lines=gain))
    yield draw_lines(Lines(title="idle", x="processes", y="% of the time", lines=sort(idle), dashed=planned))
    yield draw_lines(Lines(title="memory against length", x="seconds of video", y="peak MiB", lines=sort(memory)))
    yield from _drift(folder, cases)


def _drift(folder: Path, cases: dict[str, list[dict]]) -> Iterator[str]:
    """Each measure of drift, second by second."""
    from pipelines.evaluate import Source, evaluate_video

    curves = {name: evaluate_video(Source(video=folder / f"{name}.mp4")).curves for name in cases
              if (folder / f"{name}.mp4").is_file()}  # fmt: skip
    for measure in DRIFTING if curves else ():
        lines = {name: [(float(second), float(value)) for second, value in enumerate(found[measure])]
                 for name, found in curves.items()}  # fmt: skip
        yield draw_lines(Lines(title=measure.replace("_", " "), x="second", y="", lines=lines))
