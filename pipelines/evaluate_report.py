"""What an evaluation leaves: figures as JSON, curves and readings as CSV, curves as a picture; a table in words."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longvid.adherence import ASPECTS
from longvid.chart import Panel, draw_panels
from longvid.contact_sheet import write_png
from longvid.oracle import Reading
from pipelines.evaluate import Result
from pipelines.record import check_file, write_json

FILES = ("evaluation.json", "seconds.csv", "curves.png")

_PANELS = {
    "sharpness": "sharpness", "contrast": "contrast", "brightness": "brightness", "saturation": "saturation",
    "histogram_distance": "colours unlike the opening", "opening_similarity": "likeness to the opening",
    "moved": "share that moves", "flicker": "flicker",
}  # fmt: skip


def check_report(out: Path, *, overwrite: bool) -> None:
    """Raise ValueError unless the files can be written in `out`, a folder that is there or can be made."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder; give one for the results, such as {out}-results")
    if out.is_dir():
        for name in FILES:
            check_file(out / name, overwrite=overwrite)
    elif not out.parent.is_dir():
        raise ValueError(f"{out} is in a folder that does not exist; create it first: mkdir -p {out.parent}")


def write_report(out: Path, content: dict, results: Sequence[Result]) -> None:
    """Write all files."""
    out.mkdir(exist_ok=True)
    write_json(out / FILES[0], content)
    _write_csv(out / FILES[1], results)
    write_png(out / FILES[2], draw_panels(panels(results)))


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result.curves))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "second", *names, "read_count", "read_things", "read_background"])
        for result in results:
            for second in range(len(result.curves["moved"])):
                values = [result.curves[name][second] if name in result.curves else np.nan for name in names]
                cells = [f"{value:.6g}" if np.isfinite(value) else "" for value in values]
                read = _in_words(result.readings[second]) if result.readings else ["", "", ""]
                writer.writerow([result.name, second, *cells, *read])


def _in_words(reading: Reading) -> list[str]:
    things = [f"{thing.colour} {thing.shape} {thing.motion}" for thing in reading.things]
    return [str(reading.count), "; ".join(things), f"{' '.join(reading.background_colours)} {reading.background}"]


def panels(results: Sequence[Result]) -> list[Panel]:
    """A panel for each curve that there is: what is right first, then what drifts."""
    found = []
    for name, title in ({aspect: f"{aspect} right" for aspect in ASPECTS} | _PANELS).items():
        curves = [result.curves[name] for result in results if name in result.curves]
        if any(np.isfinite(curve).any() for curve in curves):
            is_share = name in ASPECTS
            found.append(Panel(title=title, curves=curves, low=0.0 if name != "opening_similarity" else None,
                               high=1.0 if is_share else None))  # fmt: skip
    return found


def table(content: dict) -> Iterator[str]:
    """The means over all videos, in lines."""
    mean = content["mean"]
    yield f"{len(content['videos'])} videos, {mean['frames']:.0f} frames each at {mean['fps']:.3g} frames/s (means)"
    if adherence := mean.get("adherence"):
        yield "right, share of seconds   all      first 10 s  last 10 s"
        for name in ASPECTS:
            cells = [adherence[part].get(name) for part in ("share", "first_10s", "last_10s")]
            yield f"  {name:<22}" + "".join(f"  {_figure(cell):<9}" for cell in cells)
    yield "drift                     opening  slope per minute"
    for name, drift in mean["drift"].items():
        yield f"  {name.replace('_', ' '):<22}  {_figure(drift['opening']):<9}{_figure(drift['slope_per_minute'])}"
    for name in ("seam_ratio", "still_share", "flicker", "collapse"):
        yield f"{name.replace('_', ' '):<24}  {_figure(mean.get(name))}"
    if latents := mean.get("latents"):
        yield f"latents, worst channel    mean {_figure(latents['worst_mean'])}, deviation " \
              f"{_figure(latents['worst_deviation'])} per minute"  # fmt: skip
    if found := content["frechet"]:
        yield f"frechet distance          {_figure(found['distance'])} (true films: {_figure(found['true_to_true'])})"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
