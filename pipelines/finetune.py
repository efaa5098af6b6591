"""Train a model folder's DiT on, or a LoRA of it: `longvid train dit --data DIR`.

The data are a folder of videos, or procedural films that `longvid train latents` has encoded.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from longvid.checkpoints.diffusers_folder import Folder, copy_folder, load_dit, load_vae, open_folder
from longvid.checkpoints.safetensor_files import fingerprint
from longvid.method import Method
from longvid.models.lora import FILE, add_lora, save_lora
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.types import Text
from longvid.video_folder import CaptionedVideo, read_captions
from pipelines.checks import held_out, samples, validation
from pipelines.configure import BASE, check_size, model_defaults, resolve_model
from pipelines.engine_many import check_spread
from pipelines.film_latents import FILM_SETS, HELD_OUT, LONG, FilmLatents, holds_films
from pipelines.make_student import student_defaults
from pipelines.methods import make_method
from pipelines.optimise import Engine, LoopConfig, alone
from pipelines.train import SAMPLE_PROMPTS, TrainRequest, check_new, dit_options
from pipelines.train_dit import DiTTraining, train_dit
from pipelines.video_latents import ClipConfig, encode_videos, open_clips

DEFAULTS = {"num_steps": 1000, "batch_size": 8, "learning_rate": 1e-4, "optimizer": "adamw"}
HELD_OUT_SHARE = 0.1
"""Share of the videos, one at least, that validation sees and training does not; all train without validation."""

NUM_SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """A request, complete and checked: model, data, the training, and by which method the result is to be used.

    The data are videos and how clips are cut out of them, or `films`, a folder of encoded ones.
    """

    request: TrainRequest
    opened: Folder
    training: DiTTraining
    method: Method | None
    videos: tuple[CaptionedVideo, ...] = ()
    clips: ClipConfig | None = None
    films: Path | None = None

    @property
    def unit(self) -> int:
        """What sides of a picture are multiples of, in pixels: the VAE's factor times the patch."""
        patch = self.opened.transformer.get("patch_size", [1, 2, 2])[1]
        return VAEConfig.from_dict(self.opened.vae).spatial_factor * patch


def configure_finetuning(request: TrainRequest, num_processes: int) -> Finetuning:
    """Raises ValueError for a request that cannot be met; nothing is written."""
    opened = open_folder(resolve_model(request.model or BASE))
    defaults, given = model_defaults(opened), dict(request.data)
    folder = Path(given.pop("folder"))
    data = _films(folder, given) if holds_films(folder) else _videos(folder, given, opened, defaults, request.seed)
    values = {**DEFAULTS, **request.loop}
    loop = LoopConfig(out=request.out / "dit", seed=request.seed, adamw_learning_rate=values["learning_rate"], **values)
    fps = data["clips"].fps if "clips" in data else defaults["fps"]
    training = DiTTraining(loop=loop, **{"fps": fps, "picture_share": (0.2, 0.2), **request.dit,
                                         **dit_options(request.options)})  # fmt: skip
    check_new(loop.out, request.resume)
    check_spread("dit", training, num_processes)
    if result_of(request).exists():
        raise ValueError(f"{result_of(request)} is there already; give another --out, or move it away")
    return Finetuning(request=request, opened=opened, training=training, method=_method_after(request), **data)


def _method_after(request: TrainRequest) -> Method | None:
    """What a model that has learned guidance is for; None: what it was for before."""
    if "method" not in request.distil:
        return None
    method = make_method(request.distil["method"])
    if method.num_lanes > 1:
        raise ValueError(f"method {method.name} has guidance {method.guidance_scale}, and a model that has learned "
                         "guidance needs none; try rolling-fast")  # fmt: skip
    return method


def _films(folder: Path, given: dict) -> dict:
    if given:
        raise ValueError(f"{next(iter(given))} is about clips of videos, and {folder} holds films that are encoded; "
                         "leave it out")  # fmt: skip
    return {"films": folder}


def _videos(folder: Path, given: dict, opened: Folder, defaults: dict, seed: int) -> dict:
    videos = tuple(read_captions(folder))
    size = {name: given.pop(name, defaults[name]) for name in ("height", "width", "fps")}
    check_size(opened, size["height"], size["width"])
    return {"videos": videos, "clips": ClipConfig(**size, **given, seed=seed)}


def result_of(request: TrainRequest) -> Path:
    """What is there when all is done: a LoRA's file, or a model folder."""
    return request.out / (FILE if request.lora else "model")


def finetune(job: Finetuning, engine: Engine = alone, *, is_first: bool = True) -> Iterator[dict]:
    """Encode what is not encoded yet, train, and write the result; yields records.

    Raises ValueError if too many of the videos cannot be used.
    """
    request, config, opened = job.request, job.training, job.opened
    model = fingerprint(opened.path)
    material = _encoded_films(job) if job.films else (yield from _encoded_videos(job, model))
    dit = load_dit(opened, torch.float32, config.device).train()
    if request.lora:
        add_lora(dit, request.lora, seed=request.seed)
    checks = []
    if material.held_out:
        checks.append(validation(dit, config, material.held_out, material.text, request.validate_every))
    if request.sample_every:
        method = make_method(model_defaults(opened)["method"])
        checks.append(samples(dit, _networks(job)[0], material.text, method, config, material.sets[LONG.name],
                              material.prompts, request.sample_every))  # fmt: skip
    options = {"model": model, "lora": request.lora}
    for record in train_dit(config, material.sets, material.text, resume=request.resume, dit=dit, engine=engine,
                            checks=checks, options=options):  # fmt: skip
        if "dit" not in record:
            yield record
        elif is_first:
            result = result_of(request)
            defaults = student_defaults(opened, job.method) if job.method else None
            save_lora(result, dit) if request.lora else copy_folder(opened, result, dit, longvid=defaults)
            yield {"written": str(result)}


@dataclass(frozen=True, kw_only=True)
class _Material:
    """Sets of latents by name, the same that training does not see, states of captions, and what to show samples of."""

    sets: Mapping[str, FilmLatents]
    held_out: Mapping[str, FilmLatents] | None
    text: Callable[..., Text]
    prompts: Sequence[str]


def _networks(job: Finetuning) -> tuple[VAE, TextEncoder]:
    device = job.training.device
    vae = load_vae(job.opened, torch.float32, device).eval()
    return vae, TextEncoder.load(job.opened.path, torch.float32, device)


def _encoded_films(job: Finetuning) -> _Material:
    sets = {films.name: FilmLatents(job.films, films) for films in FILM_SETS}
    channels, known = sets[LONG.name].latents.shape[1], job.opened.transformer["in_channels"]
    if channels != known:
        raise ValueError(f"{job.films} holds latents of {channels} channels, and {job.opened.path} takes {known}; "
                         f"encode films with its VAE: longvid train latents --model {job.opened.path}")  # fmt: skip
    hidden = held_out(FilmLatents(job.films, HELD_OUT)) if job.request.validate_every else None
    text = TextEncoder.load(job.opened.path, torch.float32, job.training.device)
    return _Material(sets=sets, held_out=hidden, text=text, prompts=SAMPLE_PROMPTS)


def _encoded_videos(job: Finetuning, model: str) -> Generator[dict, None, _Material]:
    """Encodes what is not encoded yet, each process its share, yielding a record for each video that is left out."""
    is_one = not dist.is_initialized()
    rank, num = (0, 1) if is_one else (dist.get_rank(), dist.get_world_size())
    cache = job.request.out / "cache"
    yield from encode_videos(cache, job.videos, job.clips, model, job.unit, lambda: _networks(job), rank=rank,
                             num_processes=num)  # fmt: skip
    if not is_one:
        dist.barrier()
    shown, text = open_clips(cache, job.videos, job.clips, model)
    hidden = None
    if job.request.validate_every:
        shown, hidden = shown.split(np.random.default_rng(job.request.seed), HELD_OUT_SHARE)
    captions = dict.fromkeys(video.caption for video in job.videos if video.caption in text.files)
    return _Material(sets=shown.sets(), held_out=hidden.sets() if hidden else None, text=text,
                     prompts=list(captions)[:NUM_SAMPLES])  # fmt: skip
