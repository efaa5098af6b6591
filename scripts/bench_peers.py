"""One video through diffusers' pipeline and through longvid, interleaved in one run; writes bench/results/peers.

    python scripts/bench_peers.py --seconds 60 --repeats 3
    python scripts/bench_peers.py --shape small --seconds 10 --sequence-parallel 2 --threads 1 --out DIR

The same folder, prompt, frames, steps and guidance go through diffusers' `SkyReelsV2DiffusionForcingPipeline`
(windows of 97 frames that share 17), through longvid with the same windows (`skyreels-sync`), and through longvid
with the model's own method, all in float32. `--nproc N` adds the last on N processes that have the threads of one
together, `--sequence-parallel K` K processes that share heads (Ulysses, no stages) and K that share layers. Each runs
in processes of its own, with nothing kept from the run before.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WINDOW, OVERLAP, CONDITION = 97, 17, 20
"""Frames of diffusers' windows, those that two share, and thousandths of noise on these: what SkyReels-V2 recommends,
and what `skyreels-sync` is."""

DIFFUSERS, WINDOWS, OWN, ALSO = "diffusers", "longvid, windows", "longvid", "longvid, also"


def arguments() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", metavar="DIR", help="a folder in diffusers' format (default: tiny)")
    parser.add_argument("--shape", metavar="NAME", help="random weights of a named shape in place of a model")
    parser.add_argument("--also", metavar="DIR", help="a further folder through longvid alone, with its own defaults")
    parser.add_argument("--prompt", default="a red ball bounces on a navy background")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--flow-shift", type=float, default=3.0)
    parser.add_argument("--blocks-per-pass", type=int, metavar="N", help="of the model's own method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--nproc", type=int, metavar="N", help="also on N processes, with the threads of one together")
    parser.add_argument("--sequence-parallel", type=int, metavar="K", help="also K processes, as heads and as stages")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "peers"), metavar="DIR")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    return parser


def requested(options: argparse.Namespace, case: str):
    """What a case of longvid asks for, as a complete configuration; diffusers is asked for the same."""
    from pipelines.configure import configure

    common = {"prompt": options.prompt, "seconds": options.seconds, "seed": options.seed, "device": "cpu",
              "dtype": "float32"}  # fmt: skip
    if case == ALSO:
        return configure(model=options.also, **common)
    common["vae_dtype"] = "float32"  # as diffusers
    together = {"blocks_per_pass": options.blocks_per_pass} if options.blocks_per_pass else {}
    method = {"method": "skyreels-sync"} if case == WINDOWS else together
    run = configure(model=options.model, num_steps=options.steps, guidance_scale=options.guidance_scale,
                    flow_shift=options.flow_shift, **method, **common)  # fmt: skip
    first_steps = min(run.method.first_steps, run.method.num_steps)
    return replace(run, method=replace(run.method, first_steps=first_steps))


class Clock:
    """Seconds spent in calls."""

    def __init__(self):
        self.seconds = 0.0

    def timed(self, call: Callable) -> Callable:
        """The call, timed."""

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            found = call(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return found

        return wrapped


def through_diffusers(options: argparse.Namespace, video: Path) -> dict:
    """The whole video, decoded at its end, as the pipeline does."""
    import torch
    from diffusers import SkyReelsV2DiffusionForcingPipeline
    from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing as module

    from longvid.checkpoints.diffusers_folder import open_folder
    from longvid.media import VideoWriter
    from longvid.models.vae_config import VAEConfig

    run, text, vae = requested(options, WINDOWS), Clock(), Clock()
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(run.model, dtype=torch.float32)
    module.prompt_clean = str.strip  # mends broken characters with ftfy, which need not be installed
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt, pipe.vae.decode = text.timed(pipe.encode_prompt), vae.timed(pipe.vae.decode)
    config = VAEConfig.from_dict(open_folder(run.model).vae)  # the pipeline does not count the VAE's patches
    height, width = (size // config.spatial_factor * pipe.vae_scale_factor_spatial for size in (run.height, run.width))
    start = time.perf_counter()
    frames = pipe(
        run.prompt, negative_prompt=run.negative_prompt, height=height, width=width, num_frames=run.num_frames,
        num_inference_steps=options.steps, guidance_scale=options.guidance_scale, fps=run.fps,
        generator=torch.Generator().manual_seed(run.seed), base_num_frames=WINDOW, overlap_history=OVERLAP,
        addnoise_condition=CONDITION, max_sequence_length=min(512, pipe.tokenizer.model_max_length),
    ).frames[0][: run.num_frames]  # fmt: skip
    denoise = time.perf_counter() - start - text.seconds - vae.seconds
    with VideoWriter(video, height=run.height, width=run.width, fps=run.fps, overwrite=True) as writer:
        writer.write((frames * 255).round().astype("uint8"))
        first = time.time()
    return {"frames": len(frames), "denoise_s": denoise, "vae_s": vae.seconds, "first_frame_at": first}


def through_longvid(options: argparse.Namespace, case: str, video: Path) -> dict:
    """Frames as blocks leave."""
    from longvid.media import VideoWriter
    from pipelines.generate import Observer, generate
    from pipelines.trace import Trace

    run, trace, first = requested(options, case), Trace("cpu"), None
    with VideoWriter(video, height=run.height, width=run.width, fps=run.fps, overwrite=True) as writer:
        for frames in generate(run, Observer(trace)):
            writer.write(frames)
            first = first or time.time()
    spent = {name: sum(s.end - s.start for s in trace.spans if s.name == name) / 1e9 for name in ("pass", "decode")}
    return {"frames": writer.num_frames, "denoise_s": spent["pass"], "vae_s": spent["decode"], "first_frame_at": first,
            "config": {**run.record(), "model": run.model.name}}  # fmt: skip


def child(options: argparse.Namespace, case: str, file: Path) -> None:
    """One case, in this process: figures to `file`, the video beside it."""
    import torch

    from pipelines.usage import peak_memory_mb

    torch.set_num_threads(options.threads)
    video = file.with_suffix(".mp4")
    found = through_diffusers(options, video) if case == DIFFUSERS else through_longvid(options, case, video)
    file.write_text(json.dumps(found | {"peak_memory_mb": [peak_memory_mb("cpu")]}))


def run_alone(words: list[str], case: str, file: Path) -> dict:
    """A case in a new process; what it measured, and the time of the whole."""
    start = time.time()
    subprocess.run([sys.executable, __file__, *words, "--child", case, str(file)], check=True, cwd=ROOT)
    seconds, found = time.time() - start, json.loads(file.read_text())
    return found | {"process_s": seconds, "first_frame_s": found.pop("first_frame_at") - start}


@dataclass(frozen=True)
class Together:
    """A case of longvid on several processes of so many threads, as one of the layouts of `longvid bench`."""

    case: str
    layout: str
    num: int
    threads: int

    @property
    def name(self) -> str:
        """Short."""
        layout = "" if self.layout == "fastest" else f" as {self.layout}"
        return f"{self.case}, {self.num} processes{layout}"


def together(options: argparse.Namespace) -> list[Together]:
    """The cases on several processes that are asked for."""
    found = []
    if num := options.nproc:
        cases = [OWN, ALSO] if options.also else [OWN]
        found += [Together(case, "fastest", num, max(1, options.threads // num)) for case in cases]
    if num := options.sequence_parallel:
        found += [Together(OWN, layout, num, options.threads) for layout in ("stages", "sequence")]
    return found


def run_together(options: argparse.Namespace, how: Together, file: Path) -> dict:
    """Several processes by `longvid generate`."""
    from pipelines.bench import LAYOUTS

    run, num = requested(options, how.case), how.num
    metrics = file.with_suffix(".metrics.json")
    method = [] if how.case == ALSO else [
        "--num-inference-steps", options.steps, "--guidance-scale", options.guidance_scale, "--flow-shift",
        options.flow_shift, *(["--first-steps", options.steps] if run.method.first_steps else []),
        *(["--blocks-per-pass", options.blocks_per_pass] if options.blocks_per_pass else [])]  # fmt: skip
    words = ["generate", "--model", run.model, "--prompt", run.prompt, "--num-frames", run.num_frames, "--seed",
             run.seed, "--device", "cpu", "--vae-dtype", run.vae_dtype, *method, "--nproc", num, "--threads",
             how.threads, *(word.format(nproc=num) for word in LAYOUTS[how.layout]), "--output",
             file.with_suffix(".mp4"), "--metrics", metrics, "--quiet", "--overwrite"]  # fmt: skip
    start = time.time()
    subprocess.run([sys.executable, "-m", "pipelines.cli", *map(str, words)], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    found = {"process_s": time.time() - start, **json.loads(metrics.read_text())}
    found["config"]["model"] = run.model.name
    found["first_frame_s"] += found["process_s"] - found["wall_s"]
    return found


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be, before anything runs."""
    from parallel.grid import Degrees
    from pipelines.spread import grids_of

    for case in (WINDOWS, OWN, *([ALSO] if options.also else [])):
        requested(options, case)
    asked = {"fastest": lambda num: Degrees(), "stages": lambda num: Degrees(stages=num, lanes=1),
             "sequence": lambda num: Degrees(sequence=num, lanes=1)}  # fmt: skip
    for how in together(options):
        grids_of(how.num, requested(options, how.case), asked[how.layout](how.num))


def drift(video: Path, prompt: str) -> dict:
    """The drift report of a video."""
    from pipelines.evaluate import Source, evaluate_video

    found = evaluate_video(Source(video=video, prompt=prompt)).figures
    return {name: found[name] for name in ("drift", "still_share", "flicker", "collapse", "adherence")}


FIGURES = {
    "whole process s": lambda r: r["process_s"], "denoising s": lambda r: r.get("denoise_s"),
    "VAE s": lambda r: r.get("vae_s"), "first frame s": lambda r: r["first_frame_s"],
    "peak MiB": lambda r: sum(r["peak_memory_mb"]), "sent MiB": lambda r: sum(r.get("bytes_sent", [0])) / 2**20,
}  # fmt: skip
SLOPES = ("sharpness", "saturation", "contrast", "brightness", "histogram_distance")


def table(records: list[dict], command: str) -> Iterator[str]:
    """Markdown: medians with half their range, each against diffusers; then what the videos are like."""
    cases: dict[str, list[dict]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    first = records[0]
    yield f"`{command}`, {first['date']}, {first['hardware']['cpu']}, {first['hardware']['cores']} cores; torch "\
          f"{first['versions']['torch']}, diffusers {first['versions']['diffusers']}, float32; medians of "\
          f"{len(cases[DIFFUSERS])} interleaved runs, ± half their range. The first frame counts from the start of "\
          "the process, imports and loading included; memory is the sum over processes. Not measured: GPUs, other "\
          "sizes, other models."  # fmt: skip
    yield ""
    yield "| case | " + " | ".join(FIGURES) + " | times faster than diffusers | of its memory |"
    yield "|---" * (len(FIGURES) + 3) + "|"
    middle = lambda name, of: statistics.median(of(r) for r in cases[name])  # noqa: E731
    time_of, memory_of = FIGURES["whole process s"], FIGURES["peak MiB"]
    for name, found in cases.items():
        cells = []
        for of in FIGURES.values():
            values = [of(record) for record in found]
            cells.append("-" if None in values else f"{statistics.median(values):.4g} ± "
                         f"{(max(values) - min(values)) / 2:.2g}")  # fmt: skip
        gain = middle(DIFFUSERS, time_of) / middle(name, time_of)
        yield f"| {name} | " + " | ".join(cells) + f" | {gain:.2f} | " \
              f"{middle(name, memory_of) / middle(DIFFUSERS, memory_of):.2f} |"  # fmt: skip
    yield ""
    yield "| slope per minute of | " + " | ".join(SLOPES) + " | share still | collapse | right of what was asked |"
    yield "|---" * (len(SLOPES) + 4) + "|"
    for name, found in cases.items():
        report = found[-1]["video"]
        right = [share for share in (report["adherence"] or {"share": {}})["share"].values() if share is not None]
        cells = [f"{report['drift'][slope]['slope_per_minute']:.3g}" for slope in SLOPES]
        cells += [f"{report['still_share']:.2f}", _number(report["collapse"]), _number(statistics.mean(right or [0]))]
        yield f"| {name} | " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    """Run all cases in turn, again and again; leave records, a table and the last video of each."""
    options = arguments().parse_args()
    if options.child:
        child(options, options.child[0], Path(options.child[1]))
        return
    from pipelines.bench import hardware
    from pipelines.record import versions
    from pipelines.shapes import save_shape

    if options.repeats < 1:
        sys.exit(f"repeats={options.repeats} must be at least 1; try 3")
    out, command = Path(options.out).resolve(), f"python scripts/bench_peers.py {shlex.join(sys.argv[1:])}".strip()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        words = sys.argv[1:]
        if options.shape:
            options.model = str(save_shape(options.shape, Path(folder) / options.shape.replace("@", "-")))
            words = [*words, "--model", options.model]
        try:
            check(options)
        except ValueError as error:
            sys.exit(str(error))
        out.mkdir(parents=True, exist_ok=True)
        alone = [DIFFUSERS, WINDOWS, OWN, *([ALSO] if options.also else [])]
        about = {"command": command, "date": date.today().isoformat(), "hardware": hardware(),
                 "versions": {**versions(), "diffusers": version("diffusers")}}  # fmt: skip
        for repeat in range(options.repeats):
            for case in (*alone, *together(options)):
                name = case if case in alone else case.name
                file = out / f"{name.replace(', ', '-').replace(' ', '-')}.json"
                try:
                    found = run_alone(words, case, file) if case in alone else run_together(options, case, file)
                except subprocess.CalledProcessError as error:
                    sys.exit(f"{name} ended with {error.returncode}; what it said is above")
                found["video"] = drift(file.with_suffix(".mp4"), options.prompt)
                records.append({"case": name, "repeat": repeat, **about, **found})
                for left in (file, file.with_suffix(".metrics.json"), file.with_suffix(".json")):
                    left.unlink(missing_ok=True)
                print(f"{name}: {found['process_s']:.1f} s", file=sys.stderr)
    (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (out / "table.md").write_text("\n".join(table(records, command)) + "\n")
    print((out / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
