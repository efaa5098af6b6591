"""A run's point on disk: written by all of its processes, read by any number of them.

A snapshot is a folder named by the number of passes done. It holds a file for the features of each layer and lane (one
for each band where a stage was cut in bands, of its heads), so that a process reads those of its own part whoever wrote
them, and one for the latents and solver state. Each file appears whole (written aside, then renamed) with a checksum; a
snapshot counts once all its files are there.
"""

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvid.flow import UniPCState
from longvid.models.attention import KV
from longvid.models.cache import Cache, Entry
from longvid.plan import Plan
from longvid.sampler import NoiseOf, Point, Queue

KEPT = 2
"""Whole snapshots that are kept: if the last is damaged, the one before is used."""


QUEUE = "queue.safetensors"


class Damaged(ValueError):
    """A file of a snapshot is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """(layer, lane) of the features that a process has, and which of so many bands, of equally many heads each."""

    pairs: tuple[tuple[int, int], ...]
    band: int = 0
    num_bands: int = 1


def part_of(layers: Sequence[int], lanes: Sequence[int], band: int = 0, num_bands: int = 1) -> Part:
    """All pairs of some layers and lanes."""
    return Part(pairs=tuple((layer, lane) for layer in layers for lane in lanes), band=band, num_bands=num_bands)


def write(folder: Path, point: Point, part: Part) -> None:
    """Write this process's part of a snapshot of all, and the queue where it is held."""
    place = folder / f"{point.done:09d}"
    place.mkdir(parents=True, exist_ok=True)
    for layer, lane in part.pairs:
        entries = {block: entry for (block, of), entry in point.cache.entries.items() if of == lane}
        features = {}
        for block, entry in entries.items():
            features[f"{block}.keys"], features[f"{block}.values"] = entry.features[layer]
        notes = [[block, entry.step, entry.start] for block, entry in entries.items()]
        _write(place / _name(layer, lane, part.band, part.num_bands), features, {"entries": notes})
    if point.queue:
        tensors, notes = _queue_tensors(point.queue)
        _write(place / QUEUE, tensors, {**notes, "num_bands": part.num_bands})


def drop_old(folder: Path, whole: Part) -> None:
    """Remove all snapshots but the last whole ones, and what is younger."""
    for done in sorted(found(folder, whole))[:-KEPT]:
        shutil.rmtree(folder / f"{done:09d}", ignore_errors=True)


def found(folder: Path, whole: Part) -> list[int]:
    """Passes done at each snapshot that has all its files, in order."""
    places = sorted(folder.glob("[0-9]" * 9)) if folder.is_dir() else []
    return [int(place.name) for place in places if all((place / name).exists() for name in _names(place, whole))]


def check(folder: Path, done: int, whole: Part) -> None:
    """Read every file of a snapshot; raises Damaged, naming the file, if one is not what was written."""
    place = folder / f"{done:09d}"
    for name in _names(place, whole):
        _read(place / name)


def read(folder: Path, done: int, part: Part, device: torch.device, queue: tuple[Plan, NoiseOf] | None) -> Point:
    """A process's part of the point at `done` passes, with the queue for the one that holds it."""
    place, entries = folder / f"{done:09d}", {}
    num_bands = _num_bands(place)
    for layer, lane in part.pairs:
        tensors, notes = _read_heads(place, layer, lane, part, num_bands)
        for block, step, start in notes["entries"]:
            kv = KV(*(tensors[f"{block}.{name}"].to(device) for name in ("keys", "values")))
            entry = entries.setdefault((block, lane), Entry(step, start, {}))
            entry.features[layer] = kv
    held = _queue_from(*_read(place / QUEUE), *queue, device) if queue else None
    return Point(done=done, cache=Cache(entries), queue=held)


def _read_heads(place: Path, layer: int, lane: int, part: Part, num_bands: int) -> tuple[dict[str, Tensor], dict]:
    """Features of a layer and lane, of the heads of the reader's band, from files of as many bands as there were."""
    found: dict[str, list[Tensor]] = {}
    for band in range(num_bands):
        if band * part.num_bands >= (part.band + 1) * num_bands or (band + 1) * part.num_bands <= part.band * num_bands:
            continue
        tensors, notes = _read(place / _name(layer, lane, band, num_bands))
        for name, x in tensors.items():
            own, start = x.shape[-2] * num_bands // part.num_bands, band * x.shape[-2]
            first, stop = max(part.band * own, start), min((part.band + 1) * own, start + x.shape[-2])
            found.setdefault(name, []).append(x.narrow(-2, first - start, stop - first))
    return {name: torch.cat(parts, -2) for name, parts in found.items()}, notes


def _name(layer: int, lane: int, band: int, num_bands: int) -> str:
    of = f"-band-{band}-of-{num_bands}" if num_bands > 1 else ""
    return f"layer-{layer:03d}-lane-{lane}{of}.safetensors"


def _names(place: Path, whole: Part) -> list[str]:
    """All files of a snapshot."""
    num_bands = _num_bands(place)
    return [*(_name(*pair, band, num_bands) for pair in whole.pairs for band in range(num_bands)), QUEUE]


def _num_bands(place: Path) -> int:
    """Bands of the run that wrote the queue; files of an earlier attempt with others may lie beside its own."""
    try:
        return _read_notes(place / QUEUE)["num_bands"]
    except Damaged:
        named = [int(path.stem.rpartition("-of-")[2]) for path in place.glob("*-of-*.safetensors")]
        return max(named, default=1)


def _queue_tensors(queue: Queue) -> tuple[dict[str, Tensor], dict]:
    tensors = {f"latents.{block}": x for block, x in queue.latents.items()}
    for block, state in queue.states.items():
        if state is not None:
            tensors |= {f"x0.{block}": state.x0, f"sample.{block}": state.sample}
            if state.earlier_x0 is not None:
                tensors[f"earlier_x0.{block}"] = state.earlier_x0
    finite = [[*place, bool(flag)] for place, flag in queue.finite.items()]
    return tensors, {"steps": list(queue.steps.items()), "finite": finite}


def _queue_from(tensors: dict[str, Tensor], notes: dict, plan: Plan, noise: NoiseOf, device: torch.device) -> Queue:
    tensors = {name: x.to(device) for name, x in tensors.items()}
    of = {name: int(name.partition(".")[2]) for name in tensors}
    latents = {of[name]: x for name, x in tensors.items() if name.startswith("latents.")}
    states = {
        block: UniPCState(x0=tensors[f"x0.{block}"], earlier_x0=tensors.get(f"earlier_x0.{block}"),
                          sample=tensors[f"sample.{block}"])
        for name, block in of.items() if name.startswith("x0.")
    }  # fmt: skip
    finite = {(block, step): torch.tensor(flag) for block, step, flag in notes["finite"]}
    return Queue.restored(
        plan, noise, device, latents=latents, steps=dict(notes["steps"]), states=states, finite=finite
    )


def _write(path: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Write aside, then rename; every tensor in memory of its own, with the sum over all of them."""
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    aside = path.with_suffix(".part")
    save_file(tensors, aside, {"notes": json.dumps(notes), "sum": str(_sum(tensors))})
    aside.rename(path)


def _read_notes(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["notes"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise Damaged(f"{path} cannot be read ({error})") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata()
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} cannot be read ({error})") from error
    if notes is None or notes.get("sum") != str(_sum(tensors)):
        raise Damaged(f"{path} is damaged: its checksum is not that of its content")
    return tensors, json.loads(notes["notes"])


def _sum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over names and bytes, in the order of names."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].view(torch.uint8).numpy(), total) if tensors[name].numel() else total
    return total
