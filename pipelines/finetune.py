"""Fine-tune a model folder's DiT, or a LoRA of it, on a folder of videos: `longvid train dit --data DIR`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from longvid.checkpoints.diffusers_folder import Folder, copy_folder, load_dit, load_vae, open_folder
from longvid.checkpoints.safetensor_files import fingerprint
from longvid.models.lora import FILE, add_lora, save_lora
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE, VAEConfig
from longvid.video_folder import CaptionedVideo, read_captions
from pipelines.checks import samples, validation
from pipelines.configure import BASE, check_size, model_defaults, resolve_model
from pipelines.engine_many import check_spread
from pipelines.film_latents import LONG
from pipelines.methods import make_method
from pipelines.optimise import Engine, LoopConfig, alone
from pipelines.train import TrainRequest, check_new, dit_options
from pipelines.train_dit import DiTTraining, train_dit
from pipelines.video_latents import ClipConfig, encode_videos, open_clips

DEFAULTS = {"num_steps": 1000, "batch_size": 8, "learning_rate": 1e-4, "optimizer": "adamw"}
HELD_OUT_SHARE = 0.1
"""Share of the videos, one at least, that validation sees and training does not; all train without validation."""

NUM_SAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """A request, complete and checked: model, videos, how they are cut, and the training."""

    request: TrainRequest
    opened: Folder
    videos: tuple[CaptionedVideo, ...]
    clips: ClipConfig
    training: DiTTraining

    @property
    def unit(self) -> int:
        """What sides of a picture are multiples of, in pixels: the VAE's factor times the patch."""
        patch = self.opened.transformer.get("patch_size", [1, 2, 2])[1]
        return VAEConfig.from_dict(self.opened.vae).spatial_factor * patch


def configure_finetuning(request: TrainRequest, num_processes: int) -> Finetuning:
    """Raises ValueError for a request that cannot be met; nothing is written."""
    opened = open_folder(resolve_model(request.model or BASE))
    defaults, given = model_defaults(opened), dict(request.data)
    videos = tuple(read_captions(Path(given.pop("folder"))))
    size = {name: given.pop(name, defaults[name]) for name in ("height", "width", "fps")}
    check_size(opened, size["height"], size["width"])
    clips = ClipConfig(**size, **given, seed=request.seed)
    loop = LoopConfig(out=request.out / "dit", seed=request.seed, **{**DEFAULTS, **request.loop})
    training = DiTTraining(loop=loop, fps=clips.fps, picture_share=(0.2, 0.2), **request.dit,
                           **dit_options(request.options))  # fmt: skip
    check_new(loop.out, request.resume)
    check_spread("dit", training, num_processes)
    if result_of(request).exists():
        raise ValueError(f"{result_of(request)} is there already; give another --out, or move it away")
    return Finetuning(request=request, opened=opened, videos=videos, clips=clips, training=training)


def result_of(request: TrainRequest) -> Path:
    """What is there when all is done: a LoRA's file, or a model folder."""
    return request.out / (FILE if request.lora else "model")


def finetune(job: Finetuning, engine: Engine = alone, *, is_first: bool = True) -> Iterator[dict]:
    """Encode what is not encoded yet, train, and write the result; yields records.

    Raises ValueError if too many of the videos cannot be used.
    """
    request, config, opened = job.request, job.training, job.opened
    is_one = not dist.is_initialized()
    rank, num = (0, 1) if is_one else (dist.get_rank(), dist.get_world_size())
    model, cache = fingerprint(opened.path), request.out / "cache"

    def networks() -> tuple[VAE, TextEncoder]:
        vae = load_vae(opened, torch.float32, config.device).eval()
        return vae, TextEncoder.load(opened.path, torch.float32, config.device)

    yield from encode_videos(cache, job.videos, job.clips, model, job.unit, networks, rank=rank, num_processes=num)
    if not is_one:
        dist.barrier()
    videos, text = open_clips(cache, job.videos, job.clips, model)
    shown, hidden = videos, None
    if request.validate_every:
        shown, hidden = videos.split(np.random.default_rng(request.seed), HELD_OUT_SHARE)
    sets = shown.sets()
    dit = load_dit(opened, torch.float32, config.device).train()
    if request.lora:
        add_lora(dit, request.lora, seed=request.seed)
    checks = []
    if hidden:
        checks.append(validation(dit, config, hidden.sets(), text, request.validate_every))
    if request.sample_every:
        method = make_method(model_defaults(opened)["method"])
        prompts = list(dict.fromkeys(video.caption for video in job.videos if video.caption in text.files))
        checks.append(samples(dit, networks()[0], text, method, config, sets[LONG.name], prompts[:NUM_SAMPLES],
                              request.sample_every))  # fmt: skip
    options = {"model": model, "lora": request.lora}
    for record in train_dit(config, sets, text, resume=request.resume, dit=dit, engine=engine, checks=checks,
                            options=options):  # fmt: skip
        if "dit" not in record:
            yield record
        elif is_first:
            result = result_of(request)
            save_lora(result, dit) if request.lora else copy_folder(opened, result, dit)
            yield {"written": str(result)}
