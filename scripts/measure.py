"""Print the figures of the README: python scripts/measure.py [minute | memory | processes | vae | dit | oracle | gpu].

Each is measured on this machine, now: whole commands in processes of their own, comparisons interleaved, medians.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = 5
NUM_FILMS = 200
LENGTHS = (10, 60, 120, 300, 600)
"""Seconds of video whose memory is compared."""


def command(folder: Path, seconds: float, name: str, *more: str) -> dict:
    """Run `longvid generate` in a new process: its metrics, with the whole process's wall seconds and peak MiB."""
    metrics = folder / f"{name}-metrics.json"
    words = ["generate", "--seconds", str(seconds), "--seed", "0", "--output", str(folder / f"{name}.mp4"), *more]
    start = time.perf_counter()
    child = [sys.executable, "-m", "pipelines.cli", *words, "--metrics", str(metrics), "--quiet", "--overwrite"]
    subprocess.run(child, check=True, stdout=subprocess.DEVNULL)
    return {**json.loads(metrics.read_text()), "process_s": time.perf_counter() - start}


def minute(folder: Path) -> None:
    """A minute of video of each model in the box, by its default method, everything included."""
    for model in ("tiny", "tiny-fast"):
        found = command(folder, 60, f"minute-{model}", "--model", model)
        print(
            f"{model}, 60 s of video: {found['process_s']:.1f} s for the whole command, {found['wall_s']:.1f} s of "
            f"work, first frames in the file after {found['first_frame_s']:.2f} s of work, {found['fps']:.1f} frames/s,"
            f" latent_sha256 {found['latent_sha256'][:16]}"
        )


def memory(folder: Path) -> None:
    """Peak memory against length, by the default model; a picture of it, `memory.svg`, is left here."""
    from longvid.lines import Lines, draw_lines

    peaks: dict[int, list[float]] = {seconds: [] for seconds in LENGTHS}
    for seconds in LENGTHS * 3:
        peaks[seconds].append(command(folder, seconds, "one")["peak_memory_mb"][0])
    medians = {seconds: statistics.median(found) for seconds, found in peaks.items()}
    said = (f"{seconds} s {peak:.0f} MiB ({100 * (peak / medians[LENGTHS[0]] - 1):+.1f} %)"
            for seconds, peak in medians.items())  # fmt: skip
    print("peak memory by length of the video, medians of 3: " + ", ".join(said))
    Path("memory.svg").write_text(draw_lines(Lines(
        title="peak memory against length, tiny-fast", x="seconds of video", y="MiB", log_x=True,
        lines={"medians of 3": list(medians.items())},
    )))  # fmt: skip


def processes(folder: Path) -> None:
    """Two processes of one thread each: memory of each, a long video against a short one, and what snapshots cost."""
    peaks: dict[int, list[list[float]]] = {10: [], 60: []}
    for seconds in (10, 60) * 3:
        trace = folder / "trace.json"
        words = ["--nproc", "2", "--threads", "1", "--trace", str(trace)]
        peaks[seconds].append(command(folder, seconds, "two", *words)["peak_memory_mb"])
        events = json.loads(trace.read_text())["traceEvents"]
    medians = {seconds: [statistics.median(runs) for runs in zip(*found, strict=True)]
               for seconds, found in peaks.items()}  # fmt: skip
    for rank, (short, long) in enumerate(zip(*medians.values(), strict=True)):
        print(f"peak memory of process {rank}: 10 s of video {short:.0f} MiB, 60 s {long:.0f} MiB, "
              f"{100 * (long / short - 1):+.1f} % (medians of 3)")  # fmt: skip
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 0]
    whole = max(e["ts"] + e["dur"] for e in spans)
    for rank in range(2):
        share = sum(e["dur"] for e in spans if e["tid"] == rank and e["name"] == "snapshot") / whole
        print(f"snapshots take {100 * share:.2f} % of the run on process {rank}")


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of two calls, interleaved."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):
        for call, seconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            if repeat:
                seconds.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def vae(folder: Path) -> None:
    """Decoding with the embedded VAE against diffusers' of the same weights: float32 both, and as `generate` does."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKLWan

    from longvid.checkpoints.diffusers_folder import load_vae, open_folder
    from longvid.frames import to_video
    from longvid.worlds import draw, sample_world
    from pipelines.configure import BASE, choose_vae_dtype

    ours = load_vae(open_folder(BASE), torch.float32).eval()
    dtype = choose_vae_dtype("cpu", None)
    default = load_vae(open_folder(BASE), torch.float32).decoding_in(getattr(torch, dtype)).eval()
    film = to_video(torch.from_numpy(draw(sample_world(np.random.default_rng(0)), 81))[None])
    theirs = AutoencoderKLWan.from_pretrained(BASE / "vae", torch_dtype=torch.float32).eval()
    z = torch.randn(1, ours.config.z_dim, 13, 16, 16, generator=torch.Generator().manual_seed(0))
    shape = [1, -1, 1, 1, 1]
    raw = z * torch.tensor(ours.config.latents_std).view(shape) + torch.tensor(ours.config.latents_mean).view(shape)
    with torch.no_grad():
        difference = (ours.decode(z)[0] - theirs.decode(raw).sample).abs().max()
        a, b = ratio(lambda: ours.decode(z), lambda: theirs.decode(raw))
        c, d = ratio(lambda: default.decode(z), lambda: theirs.decode(raw))
        latents = ours.encode(film)[0]
        error = (ours.decode(latents)[0] - default.decode(latents)[0]).square().mean()
    print(f"VAE decode by default ({dtype}): ours {49 / c:.0f} frames/s, diffusers in float32 {49 / d:.1f}, "
          f"ratio {d / c:.1f}; {10 * math.log10(4 / max(error, 1e-20)):.0f} dB from float32")  # fmt: skip
    print(f"VAE decode, 49 frames 128x128, {torch.get_num_threads()} threads: ours {49 / a:.0f} frames/s, diffusers "
          f"{49 / b:.1f}, ratio {b / a:.1f}, largest difference {difference:.1e}")  # fmt: skip


def dit(folder: Path) -> None:
    """One forward of the embedded DiT, packed as in a run, against diffusers' of the same weights, 13 latents."""
    import torch
    from diffusers import SkyReelsV2Transformer3DModel

    from longvid.checkpoints.diffusers_folder import load_dit, open_folder
    from longvid.models.packed import pack
    from pipelines.configure import BASE

    ours = pack(load_dit(open_folder(BASE), torch.float32).eval())
    theirs = SkyReelsV2Transformer3DModel.from_pretrained(BASE / "transformer", torch_dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, ours.config.in_channels, 13, 16, 16, generator=generator)
    text = torch.randn(1, 160, ours.config.text_dim, generator=generator)
    t = torch.arange(13)[None] * 70
    with torch.no_grad():
        words = ours.text_features(text)

        def reference():
            return theirs(x, t, text, enable_diffusion_forcing=True, return_dict=False)[0]

        difference = (ours(x, t.float(), words)[0] - reference()).abs().max()
        a, b = ratio(lambda: ours(x, t.float(), words), reference)
    print(f"DiT forward, 13 latents 16x16: ours {1e3 * a:.1f} ms, diffusers {1e3 * b:.1f} ms, ratio {a / b:.2f}, "
          f"largest difference {difference:.1e}")  # fmt: skip


def gpu(folder: Path) -> None:
    """One forward of Wan2.1 1.3B's shape on a GPU, random weights, bfloat16, 81 frames 480x832, against diffusers'."""
    import torch
    from diffusers import WanTransformer3DModel

    from longvid.models.compiled import compile_token_wise
    from longvid.models.dit import DiT, TokenWise
    from pipelines.shapes import find_shape

    shape, *_ = find_shape("wan-1.3b")
    with torch.device("cuda"):
        ours = DiT(shape.dit).to(torch.bfloat16).eval()
        config = {name: value for name, value in shape.dit.to_dict().items() if name != "_class_name"}
        theirs = WanTransformer3DModel(**config).to(torch.bfloat16).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 16, 21, 60, 104, device="cuda", dtype=torch.bfloat16)
    text, t = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16), torch.full((1,), 500.0, device="cuda")
    with torch.no_grad():
        words = ours.text_features(text)

        def finished(forward: Callable[[], object]) -> object:
            found = forward()
            torch.cuda.synchronize()
            return found

        def here() -> object:
            return finished(lambda: ours(x, t[:, None], words)[0])

        def reference() -> object:
            return finished(lambda: theirs(x, t, text, return_dict=False)[0])

        size = reference().float().norm()
        difference = (here().float() - reference().float()).norm() / size
        a, b = ratio(here, reference)
        print(f"DiT forward on {torch.cuda.get_device_name()}, Wan 1.3B, 21 latents 60x104: ours {1e3 * a:.0f} "
              f"ms, diffusers {1e3 * b:.0f} ms, ratio {a / b:.2f}, relative difference {difference:.1e}",
              flush=True)  # fmt: skip
        begun = time.perf_counter()
        compile_token_wise(ours)
        difference = (here().float() - reference().float()).norm() / size
        taken = time.perf_counter() - begun
        a, b = ratio(here, reference)
        print(f"with --compile: ours {1e3 * a:.0f} ms, diffusers as before {1e3 * b:.0f} ms, ratio {a / b:.2f}, "
              f"relative difference {difference:.1e}, first forwards {taken:.0f} s", flush=True)  # fmt: skip
        for layer in ours.blocks.values():
            layer.token_wise = TokenWise()
            layer.compile(dynamic=False)
        theirs.compile_repeated_blocks(dynamic=False)
        a, b = ratio(here, reference)
    print(f"whole layers compiled on both sides: ours {1e3 * a:.0f} ms, diffusers {1e3 * b:.0f} ms, ratio "
          f"{a / b:.2f}")  # fmt: skip


def oracle(folder: Path) -> None:
    """How often the oracle is right about films of known worlds, as drawn and after the embedded VAE, and its seams."""
    import numpy as np
    import torch

    from longvid.adherence import judge, scene_of, shares
    from longvid.checkpoints.diffusers_folder import load_vae, open_folder
    from longvid.oracle import read_film
    from longvid.quality import measure, seam_ratio
    from longvid.worlds import draw, sample_world
    from pipelines.configure import BASE
    from pipelines.generate import decode, encode_frames

    network = load_vae(open_folder(BASE), torch.float32).eval()
    true, decoded, errors, seams = [], [], [], {4: [], 12: []}
    for index in range(NUM_FILMS):
        rng = np.random.default_rng((77, index))
        world = sample_world(rng)
        film = draw(world, 65, start=int(rng.integers(0, 3000)))
        seen, _ = decode(network, encode_frames(network, film), None)
        errors.append(np.square(film.astype(float) - seen).mean())
        for size, found in seams.items():
            found.append([seam_ratio(measure([frames]).change, range(1, 65, size)) for frames in (film, seen)])
        for rows, frames in ((true, film), (decoded, seen)):
            rows.extend(judge(scene_of(world), reading) for reading in read_film(frames, 16))
    psnr = statistics.mean(10 * np.log10(255**2 / error) for error in errors)
    for name, rows in (("as drawn", true), (f"after the VAE ({psnr:.1f} dB)", decoded)):
        right = ", ".join(f"{aspect} {100 * share:.1f} %" for aspect, share in shares(rows).items())
        print(f"oracle, {NUM_FILMS} films of 4 s {name}: {right}")
    for size, found in seams.items():
        drawn, coded = np.mean(found, 0)
        print(f"seam ratio of the same every {size} frames: {drawn:.2f} as drawn, {coded:.2f} after the VAE")


FIGURES = {"minute": minute, "memory": memory, "processes": processes, "vae": vae, "dit": dit, "oracle": oracle,
           "gpu": gpu}  # fmt: skip


def main() -> None:
    """Print the figures that were named, or all that need no GPU."""
    names = sys.argv[1:] or [name for name in FIGURES if name != "gpu"]
    if unknown := [name for name in names if name not in FIGURES]:
        sys.exit(f"no figure {unknown[0]!r}; there are {', '.join(FIGURES)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            FIGURES[name](Path(folder))


if __name__ == "__main__":
    main()
