"""Speed of 1 to 1,024 GPUs on paper: python scripts/scaling.py writes bench/results/scaling and docs/scaling-*.svg.

The plan of a video goes through the simulator (`parallel.cost`) with costs by roofline (`parallel.roofline`). Nothing
here was measured on a GPU: figures of the H100 and of its links are the maker's, the share of its peak and the VAE's
time are from published runs, all named by `assumed`.
"""

import json
import math
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from longvid.lines import Lines, draw_lines
from longvid.plan import Plan, make_plan, num_latents_of
from parallel.cost import Costs, ModelShape, best_split, memory, simulate
from parallel.grid import Grid
from parallel.roofline import Link, Processor, layer_operations, roofline_costs
from pipelines.methods import dualparal

ROOT = Path(__file__).resolve().parents[1]
OUT, DOCS = ROOT / "bench" / "results" / "scaling", ROOT / "docs"
FRAMES, STEPS, TEXT_TOKENS = 1025, 50, 512
NUMBERS = [2**power for power in range(11)]
VIDEOS = 64

WAN_14B_720P_S = 1837.9
"""Seconds of Wan2.1 T2V-14B, 81 frames of 720 x 1280, 50 guided steps, one H100: the table of Wan2.1's README."""
VAE_FRAME_S = 0.0229
"""Seconds of the Wan VAE for a frame of 480 x 832 on an H100, as users of Self-Forcing measured."""

MODELS = {"1.3B": (30, 1536, 8960, 12), "14B": (40, 5120, 13824, 40)}
"""Layers, width, feed-forward, heads: Wan2.1's configurations."""
SIZES = {"480p": (480, 832), "720p": (720, 1280)}
LINKS = [Link(name="NVLink 450 GB/s", latency=5e-6, bandwidth=450e9),
         Link(name="PCIe 64 GB/s", latency=10e-6, bandwidth=64e9),
         Link(name="400 Gb/s", latency=15e-6, bandwidth=50e9),
         Link(name="100 Gb/s", latency=15e-6, bandwidth=12.5e9)]  # fmt: skip
LAYOUTS = ("best", "stages", "stages x lanes", "sequence", "sequence x lanes")


def shape_of(model: str, size: str) -> ModelShape:
    """A Wan model at a size, in bfloat16: the VAE makes 8 x 8 pixels one, patches are 2 x 2."""
    num_layers, dim, ffn_dim, _ = MODELS[model]
    height, width = SIZES[size]
    return ModelShape(num_layers=num_layers, dim=dim, ffn_dim=ffn_dim, num_rows=height // 16,
                      tokens_per_latent=height // 16 * (width // 16), bytes_per_element=2,
                      latent_bytes=4 * 16 * (height // 8) * (width // 8))  # fmt: skip


def h100() -> Processor:
    """989.4 TFLOP/s of dense bfloat16 and 3.35 TB/s (the maker's data sheet), and the share that Wan's run reached."""
    shape, latents = shape_of("14B", "720p"), 21
    per_latent, per_pair = layer_operations(shape, TEXT_TOKENS)
    operations = 2 * 50 * shape.num_layers * (per_latent * latents + per_pair * latents**2)
    decode = 81 * VAE_FRAME_S * (720 * 1280) / (480 * 832)
    peak = 989.4e12
    return Processor(name="H100 SXM", peak=peak, memory_bandwidth=3.35e12,
                     share=operations / (WAN_14B_720P_S - decode) / peak)  # fmt: skip


def costs_of(model: str, size: str, link: Link) -> Costs:
    """Costs of a model's passes over a link."""
    height, width = SIZES[size]
    decode = 4 * VAE_FRAME_S * height * width / (480 * 832)
    return roofline_costs(shape_of(model, size), h100(), link, text_tokens=TEXT_TOKENS, decode=decode)


def grids(model: str, size: str) -> list[Grid]:
    """All that the model and the size allow."""
    num_layers, _, _, heads = MODELS[model]
    bands = [k for k in range(1, heads + 1) if heads % k == 0 and k <= shape_of(model, size).num_rows]
    return [Grid(num_stages=s, num_bands=k, num_lanes=n) for n in (1, 2) for k in bands
            for s in range(1, num_layers + 1)]  # fmt: skip


def is_of(grid: Grid, layout: str) -> bool:
    """Whether a grid is of a named layout."""
    match layout:
        case "stages":
            return grid.num_bands == grid.num_lanes == 1
        case "stages x lanes":
            return grid.num_bands == 1
        case "sequence":
            return grid.num_stages == grid.num_lanes == 1
        case "sequence x lanes":
            return grid.num_stages == 1
    return True


class Case:
    """A model at a size over a link: what each grid takes for one video, simulated once."""

    def __init__(self, model: str, size: str, link: Link, plan: Plan):
        self.model, self.size, self.link, self.plan = model, size, link, plan
        self.shape, self.costs = shape_of(model, size), costs_of(model, size, link)
        self.grids = sorted(grids(model, size), key=self.least)
        self._found: dict[Grid, dict] = {}

    def least(self, grid: Grid) -> float:
        """What a grid takes at least: the work of its busiest process, or, tick after tick, one pass through it."""
        k, stages = grid.num_bands, grid.num_stages
        work = [self.costs.layer(p, k) + self.costs.exchange(p, k, self.shape) for p in self.kinds]
        layer, num_layers = sum(work) / len(work), self.shape.num_layers
        busiest = len(self.plan.passes) / grid.num_lanes * math.ceil(num_layers / stages) * layer
        return max(busiest, (self.plan.passes[-1].tick + 1) * num_layers * layer)

    @property
    def kinds(self) -> tuple:
        """The passes, thinned out: every 25th."""
        return self.plan.passes[::25]

    def run(self, grid: Grid) -> dict:
        """A grid's simulation."""
        if grid not in self._found:
            layers = best_split(self.plan, grid, self.costs, self.shape)
            timeline = simulate(self.plan, grid, layers, self.costs, self.shape)
            needed = memory(self.plan, grid, layers, self.shape)
            self._found[grid] = {
                "stages": grid.num_stages, "sequence": grid.num_bands, "lanes": grid.num_lanes,
                "makespan_s": float(timeline.makespan), "first_block_s": float(timeline.first_block),
                "idle": timeline.mean_idle,
                "sent_bytes": max(timeline.sent), "memory_bytes": max(sum(part.values()) for part in needed),
            }  # fmt: skip
        return self._found[grid]

    def best(self, num: int, layout: str) -> dict | None:
        """The fastest grid of a layout on at most `num` GPUs; None if it cannot use more than half of them."""
        able = [grid for grid in self.grids if num / 2 < grid.world_size <= num and is_of(grid, layout)]
        found = [self.run(grid) for grid in able[: 2 if layout == "best" else 1]]  # by what they take at least
        if layout == "best" and num > 1:
            found.append(self.best(num // 2, layout))  # the rest may idle
        return min(found, key=lambda result: result["makespan_s"]) if found else None

    def records(self) -> Iterator[dict]:
        """Rows: for each number of GPUs and layout the speed-up over one GPU, for one video and for many."""
        one = self.run(Grid(num_stages=1))["makespan_s"]
        about = {"model": self.model, "size": self.size, "link": self.link.name, "one_gpu_s": one}
        for layout in LAYOUTS:
            for num in NUMBERS if layout == "best" or self.link is LINKS[-1] else [8]:
                if found := self.best(num, layout):
                    yield {**about, "layout": layout, "gpus": num, "speed_up": one / found["makespan_s"], **found}
        for num in NUMBERS:
            together = min((self.many(num, each) for each in NUMBERS if each <= num), key=lambda x: x["makespan_s"])
            gain = VIDEOS * one / together["makespan_s"]
            yield {**about, "layout": f"{VIDEOS} videos", "gpus": num, "speed_up": gain, **together}

    def many(self, num: int, each: int) -> dict:
        """Many videos, each on `each` of the GPUs, one after the other."""
        found = self.best(each, "best")
        if not found:
            return {"makespan_s": math.inf}
        return {**found, "gpus_per_video": each, "makespan_s": found["makespan_s"] * math.ceil(VIDEOS * each / num)}


def table(records: list[dict]) -> Iterator[str]:
    """Markdown: what was assumed, the figures at 8 GPUs, and the best layout of each number."""
    first = records[0]
    yield f"`python scripts/scaling.py`, {first['date']}. **Predicted, not measured**: {first['assumed']}"
    pick = {(r["model"], r["size"], r["link"], r["layout"], r["gpus"]): r for r in records}
    for model, size in dict.fromkeys((r["model"], r["size"]) for r in records):
        one = next(r["one_gpu_s"] for r in records if (r["model"], r["size"]) == (model, size))
        yield ""
        yield f"{model}, {size}, {FRAMES} frames, {STEPS} guided steps: {one:,.0f} s on one GPU. Times faster on 8:"
        yield ""
        yield "| link | best | stages | sequence | sequence x lanes | best over sequence | best over sequence x lanes |"
        yield "|---|---|---|---|---|---|---|"
        for link in LINKS:
            gains = {name: pick.get((model, size, link.name, name, 8)) for name in LAYOUTS}
            best, peers = gains["best"], [gains["sequence"], gains["sequence x lanes"]]
            cells = [f"{best['speed_up']:.2f} ({_grid(best)})", f"{gains['stages']['speed_up']:.2f}"]
            cells += [f"{peer['speed_up']:.2f} ({_grid(peer)})" if peer else "-" for peer in peers]
            cells += [f"{best['speed_up'] / peer['speed_up']:.2f}" if peer else "-" for peer in peers]
            yield f"| {link.name} | " + " | ".join(cells) + " |"
        yield ""
        yield "Best layout (stages x sequence x lanes), times faster than one GPU, idle, memory of the fullest process:"
        yield ""
        yield "| GPUs | " + " | ".join(link.name for link in LINKS) + f" | {VIDEOS} videos, 100 Gb/s |"
        yield "|---" * (len(LINKS) + 2) + "|"
        for num in NUMBERS:
            cells = [_cell(pick.get((model, size, link.name, "best", num))) for link in LINKS]
            many = pick[model, size, LINKS[-1].name, f"{VIDEOS} videos", num]
            cells.append(f"{many['speed_up']:.0f}, {many['gpus_per_video']} GPUs for each")
            yield f"| {num} | " + " | ".join(cells) + " |"


def _grid(record: dict) -> str:
    return f"{record['stages']} x {record['sequence']} x {record['lanes']}"


def _cell(record: dict | None) -> str:
    if record is None:
        return "no layout"
    memory = record["memory_bytes"] / 2**30
    return f"{_grid(record)}: {record['speed_up']:.1f}, {100 * record['idle']:.0f} %, {memory:.1f} GiB"


def charts(records: list[dict]) -> Iterator[tuple[str, str]]:
    """Pictures: for each model, layouts at 720p over 100 Gb/s; the best layout over each link; memory."""
    line = lambda key, **of: [(r["gpus"], r[key]) for r in records if all(r[k] == v for k, v in of.items())]  # noqa: E731
    ideal = [(num, num) for num in NUMBERS]
    for model in MODELS:
        of = {"model": model, "size": "720p"}
        name = model.lower()
        lines = {layout: line("speed_up", **of, link="100 Gb/s", layout=layout) for layout in
                 (*LAYOUTS, f"{VIDEOS} videos")}  # fmt: skip
        common = {"x": "GPUs", "log_x": True, "log_y": True}
        yield f"scaling-layouts-{name}.svg", draw_lines(Lines(
            title=f"{model}, 720p, 100 Gb/s: what GPUs share", y="times faster than one GPU",
            lines={"ideal": ideal, **lines}, dashed=frozenset({"ideal"}), **common))  # fmt: skip
        lines = {link.name: line("speed_up", **of, link=link.name, layout="best") for link in LINKS}
        yield f"scaling-links-{name}.svg", draw_lines(Lines(
            title=f"{model}, 720p: the best layout, by link", y="times faster than one GPU",
            lines={"ideal": ideal, **lines}, dashed=frozenset({"ideal"}), **common))  # fmt: skip
        lines = {layout: [(num, size / 2**30) for num, size in line("memory_bytes", **of, link="100 Gb/s",
                          layout=layout)] for layout in ("stages", "stages x lanes", "sequence")}  # fmt: skip
        yield f"scaling-memory-{name}.svg", draw_lines(Lines(
            title=f"{model}, 720p: memory of the fullest process", y="GiB", lines=lines, **common))  # fmt: skip


def assumed() -> str:
    """What the figures rest on."""
    gpu, latencies = h100(), ", ".join(f"{1e6 * link.latency:.0f} us ({link.name})" for link in LINKS)
    return (
        f"{gpu.name}, {gpu.peak / 1e12:.1f} TFLOP/s of bfloat16 and {gpu.memory_bandwidth / 1e12:.2f} TB/s by its data "
        f"sheet, of which layers reach {100 * gpu.share:.1f} %, as Wan2.1's published {WAN_14B_720P_S} s for 81 frames "
        "of 14B at 720p on one H100 say; each pass reads its weights; the VAE takes "
        f"{1e3 * VAE_FRAME_S:.1f} ms for a frame of 480 x 832, as published for an H100, on the first process; all "
        f"links are alike, with latencies of {latencies} assumed; launches of kernels and contention are left out; "
        "method dualparal, blocks of 8 latents."
    )


def main() -> None:
    """Simulate, write, draw."""
    records = []
    plan = make_plan(dualparal(num_steps=STEPS), num_latents_of(FRAMES))
    for model in MODELS:
        for size in SIZES:
            for link in LINKS:
                rows = list(Case(model, size, link, plan).records())
                records += [{**row, "date": date.today().isoformat(), "assumed": assumed()} for row in rows]
                print(f"{model} {size} {link.name}: {len(rows)} figures", file=sys.stderr)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (OUT / "table.md").write_text("\n".join(table(records)) + "\n")
    for name, svg in charts(records):
        (DOCS / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
