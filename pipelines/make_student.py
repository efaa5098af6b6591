"""Distil a model folder into one of few steps: `longvid train distill --model TEACHER --out DIR`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from longvid.captions import caption
from longvid.checkpoints.diffusers_folder import Folder, copy_folder, load_dit, open_folder
from longvid.checkpoints.safetensor_files import fingerprint
from longvid.method import Method
from longvid.models.dit import DiTConfig
from longvid.models.text import TextEncoder
from longvid.models.vae_config import VAEConfig
from longvid.plan import num_latents_of
from longvid.worlds import sample_world
from pipelines.configure import BASE, model_defaults, resolve_model
from pipelines.distill import Distillation, distill
from pipelines.engine_many import check_spread
from pipelines.film_latents import BLOCK, CLIP, SINK
from pipelines.methods import make_method
from pipelines.optimise import Engine, alone
from pipelines.several import read_prompts
from pipelines.train import TrainRequest, check_new

FIRST_STEPS = 6
"""A student's first latent, where it is made alone, takes so many times the steps of a block: what it shows is settled
there."""

GAPS = 4
"""Lengths of rollouts for a teacher that was trained on clips with a gap after the first latent: as many, a block
apart."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A request, complete and checked: the teacher's folder, what is asked of it, and the training.

    `start` is the folder that the student begins as, if not as the teacher.
    """

    request: TrainRequest
    opened: Folder
    start: Folder | None
    prompts: tuple[str, ...]
    training: Distillation


def configure_student(request: TrainRequest, num_processes: int) -> Student:
    """Raises ValueError for a request that cannot be met; nothing is written."""
    opened = open_folder(resolve_model(request.model or BASE))
    defaults, given = model_defaults(opened), dict(request.distil)
    loop, file = request.loop_config(), given.pop("prompts", None)
    if not file and not opened.longvid:
        raise ValueError("this model knows more than procedural films, so it must be told what to make; add "
                         "--prompts-file F, a prompt a line")  # fmt: skip
    start = open_folder(resolve_model(given.pop("student"))) if "student" in given else None
    if start and DiTConfig.from_dict(start.transformer) != DiTConfig.from_dict(opened.transformer):
        raise ValueError(f"{start.path} has a transformer of another shape than {opened.path}, and a student has its "
                         "teacher's; leave --student out")  # fmt: skip
    method = make_method(given.pop("method", "rolling-fast"))
    factor = VAEConfig.from_dict(opened.vae).spatial_factor
    clip = SINK + CLIP if opened.longvid else num_latents_of(defaults["num_frames"])
    training = Distillation(
        loop=loop, method=method, clip=clip, fps=defaults["fps"],
        latent_size=(opened.transformer["in_channels"], defaults["height"] // factor, defaults["width"] // factor),
        lengths=tuple(clip + BLOCK * i for i in range(GAPS if opened.longvid else 1)), **request.dit, **given,
    )  # fmt: skip
    check_spread("distill", training, num_processes)
    check_new(loop.out, request.resume)
    if result_of(request).exists():
        raise ValueError(f"{result_of(request)} is there already; give another --out, or move it away")
    prompts = tuple(read_prompts(Path(file))) if file else ()
    return Student(request=request, opened=opened, start=start, training=training, prompts=prompts)


def result_of(request: TrainRequest) -> Path:
    """The folder of the student."""
    return request.out / "model"


def student_defaults(opened: Folder, method: Method) -> dict:
    """What `longvid.json` of a model says that was made of that folder's to be used by a method of few steps."""
    defaults = {**model_defaults(opened), "method": method.name}
    defaults["name"] = f"{defaults.get('name', opened.path.name)}-fast"
    of_teacher = defaults.pop("changes", {})
    if method.first_steps:  # the rolling methods, which alone take these
        together = min(of_teacher.get("blocks_per_pass", 1), max(1, method.num_steps // 2))  # a tick keeps two passes
        retire = of_teacher.get("retire", method.retire)
        defaults["changes"] = {
            "first_steps": FIRST_STEPS * method.num_steps,
            "blocks_per_pass": together,
            "retire": retire,
        }
    return defaults


def make_student(job: Student, engine: Engine = alone, *, is_first: bool = True) -> Iterator[dict]:
    """Distil and write the student's folder; yields records."""
    config, opened = job.training, job.opened
    dit = load_dit(opened, torch.float32, config.device).train()
    encoder = TextEncoder.load(opened.path, torch.float32, config.device)
    prompts = _captions if not job.prompts else lambda rng, count: list(rng.choice(job.prompts, count))
    options = {"model": fingerprint(opened.path), "method": config.method.name}
    student = None
    if job.start:
        student = load_dit(job.start, torch.float32, config.device).train()
        options["student"] = fingerprint(job.start.path)
    for record in distill(config, dit, encoder, prompts, student=student, resume=job.request.resume, engine=engine,
                          options=options):  # fmt: skip
        if "distill" not in record:
            yield record
        elif is_first:
            copy_folder(opened, result_of(job.request), record["distill"],
                        longvid=student_defaults(opened, config.method))  # fmt: skip
            yield {"written": str(result_of(job.request))}


def _captions(rng: np.random.Generator, count: int) -> list[str]:
    return [caption(sample_world(rng), rng) for _ in range(count)]
