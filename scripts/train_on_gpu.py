"""Train the models in the box on with one GPU, in minutes: python scripts/train_on_gpu.py DIR.

Parts, each kept in DIR and not done again: `films` are drawn on all cores and encoded; `decoder` is the VAE's; `tiny`
and `tiny-fast` are model folders. All begin as the model that is given, but with `--new` tiny's DiT begins anew.
`--only` does some alone, so that two processes can do them beside each other: what needs films that are not there yet
waits for them. What is learned is what `longvid train decoder` and `longvid train dit` teach; here films stay on the
GPU and a step is one CUDA graph. At last each model learns from pictures that it makes itself and the oracle grades
(`--graded`). Linux only. Without a GPU: scripts/train_tiny.sh.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longvid.checkpoints.diffusers_folder import Folder, load_dit, load_vae, open_folder, save_folder, scheduler_config
from longvid.frames import to_video
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from pipelines.configure import BASE
from pipelines.draw_films import AT_ONCE, draw_and_encode, draw_anywhere, encode_drawn
from pipelines.film_latents import LONG, OPENINGS, PICTURES
from pipelines.graded_pictures import GradedPictures, GradingSizes
from pipelines.graph_training import GraphTraining
from pipelines.make_student import student_defaults
from pipelines.methods import make_method
from pipelines.optimise import LoopConfig
from pipelines.resident_films import ResidentFilms, StepSizes, step_loss
from pipelines.train_decoder import DecoderTraining, decoder_loss
from pipelines.train_dit import DiTTraining, Teacher, new_dit, prepare

PARTS = ("films", "decoder", "tiny", "tiny-fast")
DECODED_LATENTS = 15
DECODED_AT_ONCE = 16
GUIDANCE = 3.0
LONGEST_WAIT = 600
"""Seconds for which films of another process are waited for."""
LEAST_AGREEMENT = 0.9
"""Cosine of a step's gradients to those found plainly; bfloat16 takes it to 0.99."""
GRADED_EVERY, GRADED_RATE = 30, 5e-4
"""Steps after which a model makes new pictures to be graded, and how fast it learns from them."""


def make_films(options: argparse.Namespace, vae: VAE) -> None:
    """Draw and encode pictures, openings and long films."""
    sets = dict(zip((PICTURES, OPENINGS, LONG), options.films, strict=True))
    for name, films in draw_and_encode(vae, sets, seed=options.seed, workers=options.workers,
                                       seconds=options.seconds[0], spins=options.spins):  # fmt: skip
        save(films, options.dir / f"{name}.pt")
        print(f"{name}: {len(films['latents'])} films", flush=True)


def train_decoder(options: argparse.Namespace, vae: VAE) -> None:
    """The decoder learns from films that are drawn and encoded once."""
    device = options.device
    num_frames = 4 * (DECODED_LATENTS - 1) + 1
    frames = draw_anywhere(options.decoded, num_frames, seed=options.seed + 1, workers=options.workers)
    frames = torch.from_numpy(frames).to(device)
    latents = [encode_drawn(vae, some, is_cut=False) for some in frames.split(AT_ONCE)]
    latents = torch.cat(latents)
    vae.requires_grad_(False)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    config = DecoderTraining(loop=loop(options, 1e-3), worst_noise=0.2)
    rng = np.random.default_rng(options.seed + 1)

    def loss() -> Tensor:
        past = int(rng.choice(config.pasts))
        chosen = torch.from_numpy(rng.integers(0, len(frames), max(1, round(options.scale * DECODED_AT_ONCE))))
        count = past + config.num_latents
        video = to_video(frames[chosen.to(device), : 4 * (count - 1) + 1])
        return decoder_loss(vae, video, past, config, latents=latents[chosen.to(device), :, :count])["loss"]

    torch.backends.cudnn.benchmark = True
    training = GraphTraining(vae, loss, learning_rate=config.loop.learning_rate, ema_decay=0.998, has_graph=False)
    report("decoder", training.run(options.seconds[1]), loss)
    training.put_averages()
    save(vae.state_dict(), options.dir / "decoder.pt")


def train_dit(options: argparse.Namespace, name: str, folder: Folder) -> None:
    """`tiny` learns from films, `tiny-fast` what the model that it begins as says with guidance."""
    text = TextEncoder.load(folder.path, torch.float32, options.device)
    is_fast = name == "tiny-fast"
    config = DiTTraining(loop=loop(options, 5e-4 if is_fast else 2e-3), fps=16, device=options.device,
                         compile=options.device != "cpu", teacher_guidance=GUIDANCE if is_fast else 0.0)  # fmt: skip
    is_new = options.new and not is_fast
    dit = new_dit(config).to(options.device) if is_new else load_dit(folder, torch.float32, options.device)
    dit.train().requires_grad_(True)
    frozen = deepcopy(dit).requires_grad_(False)
    if is_fast and options.student:
        add_lesson(dit, options)
    for model in (dit, frozen):
        prepare(model, config)
    torch.manual_seed(options.seed + 2 + is_fast)
    films = ResidentFilms({name: load(options.dir / f"{name}.pt") for name in (PICTURES.name, OPENINGS.name)}, text,
                          config, StepSizes().scaled(options.scale))  # fmt: skip
    teacher = Teacher(dit=frozen, no_text=films.no_text, scale=GUIDANCE) if is_fast else None

    def film_loss() -> Tensor:
        return step_loss(dit, films, frozen, teacher)

    def learn(seconds: float, last: float = 0.0) -> None:
        training = GraphTraining(dit, film_loss, learning_rate=config.loop.learning_rate,
                                 ema_decay=0.998 if is_fast else 0.999,
                                 follower=None if is_fast else frozen)  # fmt: skip
        if (found := training.agreement()) < LEAST_AGREEMENT:
            sys.exit(f"{name}: the gradients that this GPU finds are not those that torch finds plainly (cosine "
                     f"{found:.2f}): a kernel is wrong; another version of torch may do")  # fmt: skip
        report(name, training.run(seconds, last), film_loss)
        training.put_averages()

    if is_new:
        learn(options.new, last=1.0)
    films.add(LONG.name, load(options.dir / f"{LONG.name}.pt"))
    learn(options.seconds[3 if is_fast else 2])
    defaults = student_defaults(folder, make_method("rolling-fast")) if is_fast else folder.longvid
    vae = decoder_of(options, folder)
    if options.graded:
        save(dit.state_dict(), options.dir / f"{name}-ungraded.pt")
        before = deepcopy(dit).requires_grad_(False)
        prepare(before, config)
        method = make_method(defaults["method"], **defaults.get("changes", {}))
        graded = GradedPictures(before, vae, text, method, config, GradingSizes().scaled(options.scale))
        report(name, learn_from_grades(dit, graded, film_loss, options), film_loss)
    text.encoder.to("cpu", torch.bfloat16)
    vae = vae.cpu().bfloat16()
    save_folder(options.dir / name, dit=dit.cpu().bfloat16(), vae=vae, text=text,
                scheduler=scheduler_config(3.0), longvid=defaults)  # fmt: skip


def learn_from_grades(
    dit: DiT, graded: GradedPictures, film_loss: Callable[[], Tensor], options: argparse.Namespace
) -> Iterator[dict]:
    """Learn from what the model makes itself, and as before beside that, yielding records with the grade at last."""
    training = GraphTraining(dit, lambda: film_loss() + graded.loss(dit), learning_rate=GRADED_RATE, ema_decay=0.98,
                             look_every=GRADED_EVERY)  # fmt: skip
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:
        graded.draw(pool, training.averages)
        for record in training.run(options.graded):
            yield {**record, "grade": graded.draw(pool, training.averages)}
    training.put_averages()


@torch.no_grad()
def add_lesson(dit: DiT, options: argparse.Namespace) -> None:
    """Add to the weights what `--student` has learned beside `--model` (task arithmetic, arXiv 2212.04089)."""
    student, before = (dict(load_dit(open_folder(path), torch.float32, options.device).named_parameters())
                       for path in (options.student, options.model))  # fmt: skip
    for name, p in dit.named_parameters():
        p.add_(student[name] - before[name])


def decoder_of(options: argparse.Namespace, folder: Folder) -> VAE:
    """The folder's VAE, with the decoder that was trained on once it is there."""
    vae, path = load_vae(folder, torch.float32, options.device), options.dir / "decoder.pt"
    if path.exists():
        vae.load_state_dict(torch.load(path, map_location=options.device, weights_only=True))
    return vae


def loop(options: argparse.Namespace, learning_rate: float) -> LoopConfig:
    """Seed and rate; how long is known in seconds."""
    return LoopConfig(out=options.dir, num_steps=1, batch_size=1, learning_rate=learning_rate, seed=options.seed)


def report(name: str, records: Iterator[dict], loss: Callable[[], Tensor]) -> None:
    """Print records as they come; a loss that runs away, or is no number, ends it all before anything is kept.

    What `loss` then is without what was compiled says whether that is to blame.
    """
    first = None
    for record in records:
        found = record["loss"]
        first = found if first is None else first
        grade = f", grade {record['grade']:.3f}" if "grade" in record else ""
        print(f"{name}: step {record['step']} of {record['of']}, loss {found:.4f}{grade}, {record['seconds']:.0f} s",
              flush=True)  # fmt: skip
        if not found <= 2 * first:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                plain = loss().item()
            sys.exit(f"{name}: the loss went from {first:.2f} to {found:.2f} (uncompiled: {plain:.2f}): stopped, "
                     "nothing of this part is kept. Another --seed may do; `longvid train dit` teaches the same in "
                     "more time.")  # fmt: skip


def load(path: Path) -> dict:
    """Films of a set, once they are there."""
    waited = 0
    while not path.exists():
        if not waited:
            print(f"waiting for {path.name}", flush=True)
        if waited == LONGEST_WAIT:
            sys.exit(f"{path} is not there after {LONGEST_WAIT} s: is another process making films? --only films does")
        time.sleep(1)
        waited += 1
    return torch.load(path, weights_only=True, mmap=True)


def save(found: dict, path: Path) -> None:
    """Write aside and rename."""
    aside = path.with_suffix(".part")
    torch.save(found, aside)
    aside.rename(path)


def main() -> None:
    """Do the parts that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dir", type=Path, help="where parts and models go")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, metavar="PART",
                        help=f"some of {', '.join(PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--model", type=Path, default=BASE, help="folder to begin with (default: tiny in the box)")
    parser.add_argument("--new", type=float, default=0, metavar="S",
                        help="tiny's DiT begins anew, for S seconds with pictures and openings alone")  # fmt: skip
    parser.add_argument("--student", type=Path, metavar="DIR",
                        help="a student of --model: tiny-fast begins with what it had learned beside that")  # fmt: skip
    parser.add_argument("--seconds", type=float, nargs=4, default=(75, 145, 210, 80), metavar="S",
                        help="for films, decoder, tiny and tiny-fast (default: 75 145 210 80)")  # fmt: skip
    parser.add_argument("--graded", type=float, default=60, metavar="S",
                        help="seconds more for each, from its own pictures (default: 60; 0: none)")  # fmt: skip
    parser.add_argument("--films", type=int, nargs=3, default=(32_000, 8_000, 40_000), metavar="N",
                        help="pictures, openings and long films at most (default: 32000 8000 40000)")  # fmt: skip
    parser.add_argument("--spins", type=float, default=3.0, metavar="W",
                        help="how often things spin, against each other motion (default: 3)")  # fmt: skip
    parser.add_argument("--decoded", type=int, default=2048, metavar="N", help="films for the decoder (default: 2048)")
    parser.add_argument("--scale", type=float, default=1.0, help="size of a step's batches (default: 1)")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw (default: 14)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "this trains on a GPU, and there is none; without one: scripts/train_tiny.sh DIR\n")
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = open_folder(options.model)
    parts = {
        "films": (f"{LONG.name}.pt", lambda: make_films(options, load_vae(folder, torch.float32, options.device))),
        "decoder": ("decoder.pt", lambda: train_decoder(options, load_vae(folder, torch.float32, options.device))),
        "tiny": ("tiny", lambda: train_dit(options, "tiny", folder)),
        "tiny-fast": ("tiny-fast", lambda: train_dit(options, "tiny-fast", open_folder(options.dir / "tiny"))),
    }
    for name, (made, make) in parts.items():
        if name in options.only and not (options.dir / made).exists():
            make()


if __name__ == "__main__":
    main()
