"""What a plan does on a grid of processes, as text, JSON and a chart."""

import colorsys
from collections.abc import Iterator

import numpy as np

from longvid.contact_sheet import draw_text, label
from parallel.cost import Timeline

WIDTH, MARGIN = 1600, 24
MOST_ROWS = 64


def grid_json(timeline: Timeline, layers: list[range], memory: list[dict[str, int]], one: float, unit: str) -> dict:
    """All of it as JSON holds it; times in `unit`."""
    grid = timeline.grid
    processes = []
    for rank in range(grid.world_size):
        place = grid.place(rank)
        processes.append({
            "rank": rank, "stage": place.stage, "band": place.band, "lane": place.lane,
            "layers": [layers[place.stage].start, layers[place.stage].stop], "idle": timeline.idle[rank],
            "bytes_sent": timeline.sent[rank], **{f"{name}_bytes": size for name, size in memory[rank].items()},
        })  # fmt: skip
    return {
        "unit": unit, "stages": grid.num_stages, "sequence": grid.num_bands, "lanes": grid.num_lanes,
        "decoder_back": grid.back, "decode_lag": grid.decode_lag,
        "makespan": timeline.makespan, "speed_up": one / timeline.makespan, "first_block": timeline.first_block,
        "idle_fraction": float(np.mean(timeline.idle)), "processes": processes,
    }  # fmt: skip


def grid_text(found: dict) -> Iterator[str]:
    """Lines of text for people."""
    unit = found["unit"]
    degrees = " x ".join(f"{found[name]} {name}" for name in ("stages", "sequence", "lanes"))
    yield (f"{degrees}: makespan {found['makespan']:.4g} {unit}, {found['speed_up']:.2f} times one process; first "
           f"block after {found['first_block']:.4g} {unit}; idle {100 * found['idle_fraction']:.1f} %")  # fmt: skip
    if found["decoder_back"]:
        yield f"the decoder's back on process {found['decoder_back']}, {found['decode_lag']} passes late"
    yield "rank  stage  band  lane  layers     idle   sent MiB  weights MiB  features MiB  activations MiB"
    for p in found["processes"]:
        mib = [p[name] / 2**20 for name in ("bytes_sent", "weights_bytes", "features_bytes", "activations_bytes")]
        lane = "all" if p["lane"] is None else p["lane"]
        layers = f"{p['layers'][0]}-{p['layers'][1] - 1}"
        yield (f"{p['rank']:4d}  {p['stage']:5d}  {p['band']:4d}  {lane!s:>4}  {layers:9}  {100 * p['idle']:4.1f} %  "
               f"{mib[0]:8.1f}  {mib[1]:11.1f}  {mib[2]:12.1f}  {mib[3]:15.1f}")  # fmt: skip


def chart(timeline: Timeline, *, in_seconds: bool) -> np.ndarray:
    """Process against time, coloured by block, uint8 (height, width, 3); decoding is dark, waiting is white.

    Of more than 64 processes every so many is drawn. Lane 1 is paler than lane 0.
    """
    world = timeline.grid.world_size
    ranks = range(0, world, -(-world // MOST_ROWS))
    row = max(8, min(40, 640 // len(ranks)))
    image = np.full((2 * MARGIN + row * len(ranks), WIDTH + 2 * MARGIN, 3), 255, np.uint8)
    scale = WIDTH / timeline.makespan
    for place, rank in enumerate(ranks):
        band = image[MARGIN + place * row + 1 : MARGIN + (place + 1) * row - 1, MARGIN : MARGIN + WIDTH]
        for i, p in enumerate(timeline.plan.passes):
            start, end = timeline.starts[rank, i] * scale, timeline.ends[rank, i] * scale
            if end == end:
                band[:, round(start) : max(round(end), round(start) + 1)] = colour(p.covers[0].block, p.lane)
        for start, end, _ in timeline.decoding(rank):
            band[:, round(start * scale) : max(round(end * scale), round(start * scale) + 1)] = (40, 40, 40)
    if in_seconds:
        for tenth in range(0, 11, 2):
            words = draw_text(label(timeline.makespan * tenth / 10), 1)
            left = min(MARGIN + WIDTH * tenth // 10, image.shape[1] - words.shape[1])
            image[-MARGIN + 8 : -MARGIN + 8 + len(words), left : left + words.shape[1]][words] = 0
    return image


def colour(block: int, lane: int) -> tuple[int, int, int]:
    """A block's colour: neighbours differ, since hues go by the golden section."""
    red, green, blue = colorsys.hls_to_rgb(block * 0.618034 % 1, 0.55 + 0.17 * lane, 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)
