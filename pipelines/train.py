"""Train the embedded model part by part: `vae`, `decoder`, `text`, `latents`, `dit`, then `pack` into a model folder.

Each part keeps its checkpoint and log in a folder of its own under the training folder, and can be resumed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from longvid.checkpoints import diffusers_folder
from longvid.checkpoints.diffusers_folder import save_folder, scheduler_config
from longvid.intervals import IntervalCost
from longvid.levels import LevelSampler
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.multitask import Multitask
from longvid.weighting import LossWeighting
from pipelines.checks import held_out, samples, validation
from pipelines.configure import resolve_model
from pipelines.engine_many import check_spread
from pipelines.film_latents import FILM_SETS, HELD_OUT, LONG, FilmLatents, make_latents
from pipelines.methods import make_method
from pipelines.objective import Objective
from pipelines.optimise import Engine, LoopConfig, alone
from pipelines.train_decoder import DecoderTraining, train_decoder
from pipelines.train_dit import TINY_DIT, DiTTraining, new_dit, train_dit
from pipelines.train_text import TextTraining, train_text
from pipelines.train_vae import VAETraining, train_vae

RECIPE = {
    "vae": {"num_steps": 1900, "batch_size": 8, "learning_rate": 5e-3},
    "decoder": {"num_steps": 1100, "batch_size": 1, "learning_rate": 6e-4, "adamw_learning_rate": 6e-4},
    "text": {"num_steps": 2000, "batch_size": 64, "learning_rate": 4e-3},
    "dit": {"num_steps": 20000, "batch_size": 8, "learning_rate": 2e-3},
    "distill": {
        "num_steps": 1000,
        "batch_size": 4,
        "learning_rate": 5e-4,
        "adamw_learning_rate": 5e-4,
        "ema_decay": 0.99,
    },
}  # fmt: skip
"""How the embedded model is trained, and a student of a model (which none in the box is); its card says how it was."""

TINY_DEFAULTS = {
    "name": "tiny", "method": "rolling", "height": 128, "width": 128, "fps": 16, "num_frames": 961,
    "prompt": "a red ball bounces on a navy background",
    "changes": {"num_steps": 8, "lag": 2, "first_steps": 32, "blocks_per_pass": 2, "retire": False},
}  # fmt: skip
"""What `longvid.json` of the embedded model says; with 16 steps at lag 4 it does no better (its card)."""

SAMPLE_PROMPTS = ("a red ball bounces on a navy background", "a yellow star spins on black", "a cyan ring drifts right")
"""What is shown of a DiT while it trains."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What is to be trained and how, as asked for: what is left out takes the recipe's value.

    `loop` are fields of LoopConfig, `dit` of DiTTraining, `options` levels and objective of the DiT, by name. Every
    `validate_every` steps (0: never) the loss on held-out films is taken, every `sample_every` videos are made.
    `data` (the `folder` of videos, and fields of ClipConfig, or a folder of encoded films) is what a DiT of `model` is
    trained on, with `lora` adapters of that rank. `distil` are `method`, which a DiT that learns guidance has too,
    `student` (a folder) and `prompts` (a file), and fields of Distillation.
    """

    part: str
    out: Path
    seed: int = 0
    resume: bool = False
    model: Path | None = None
    loop: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    dit: Mapping[str, str | bool] = field(default_factory=dict)
    options: Mapping[str, str | int | bool] = field(default_factory=dict)
    validate_every: int = 0
    sample_every: int = 0
    data: Mapping[str, str | int | float] = field(default_factory=dict)
    lora: int = 0
    distil: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self):
        is_trained = self.part in RECIPE
        misplaced = [] if is_trained else [name for name in self.loop if name != "num_steps"]
        if self.part != "dit":
            shared = ("dtype", "device", "compile") if self.part == "distill" else ("dtype", "device")
            misplaced += [*self.options, *(name for name in self.dit if name not in shared)]
            misplaced += [name for name in ("validate_every", "sample_every", "data", "lora") if getattr(self, name)]
        learns_guidance = self.part == "dit" and self.dit.get("teacher_guidance") and not self.lora
        not_distilling = [name for name in self.distil if not (learns_guidance and name == "method")]
        if self.part != "distill" and not_distilling:
            raise ValueError(f"{not_distilling[0]} is an option of the part distill, not of {self.part}; leave it out")
        if self.part not in ("dit", "vae", "distill"):
            misplaced += [*self.dit, *(name for name in ("deepspeed", "accumulation") if name in self.loop)]
        if misplaced:
            raise ValueError(f"{misplaced[0]} is an option of the part dit, not of {self.part}; leave it out")
        of_a_model = {"model": self.model, "lora": self.lora, **self.data,
                      "teacher_guidance": self.dit.get("teacher_guidance")}  # fmt: skip
        if self.part == "dit" and "folder" not in self.data and any(of_a_model.values()):
            given = next(name for name, value in of_a_model.items() if value)
            raise ValueError(f"{given} is for training a model on, and no folder of videos or encoded films is given; "
                             "add --data DIR")  # fmt: skip
        if min(self.validate_every, self.sample_every) < 0:
            raise ValueError(f"validate_every={self.validate_every}, sample_every={self.sample_every} must be at least "
                             "0; try 500")  # fmt: skip

    def on(self, device: str) -> "TrainRequest":
        """The same on a device; a text encoder is on none."""
        return replace(self, dit={**self.dit, "device": device})

    def loop_config(self) -> LoopConfig:
        """The loop of vae, decoder, text or dit. Raises ValueError for numbers that cannot be."""
        return LoopConfig(out=self.out / self.part, seed=self.seed, **{**RECIPE[self.part], **self.loop})

    def training(self) -> VAETraining | DecoderTraining | TextTraining | DiTTraining:
        """The whole configuration of vae, decoder, text or dit."""
        if self.part == "decoder":
            return DecoderTraining(loop=self.loop_config())
        if self.part == "text":
            return TextTraining(loop=self.loop_config())
        if self.part == "vae":
            return VAETraining(loop=self.loop_config(), **self.dit)
        return DiTTraining(loop=self.loop_config(), fps=TINY_DEFAULTS["fps"], **self.dit, **dit_options(self.options))


def check_request(request: TrainRequest, num_processes: int) -> None:
    """Raise ValueError for what cannot be trained, or not by so many processes. Nothing is computed or written."""
    if request.part not in RECIPE:
        if num_processes > 1:
            raise ValueError(f"nproc={num_processes} is for vae and dit; {request.part} runs in one process")
        return
    config = request.training()
    check_new(config.loop.out, request.resume)
    check_spread(request.part, config, num_processes)


def train(request: TrainRequest, engine: Engine = alone, *, is_first: bool = True) -> Iterator[dict]:
    """Run one part, yielding its log records. Of several processes the first writes.

    Raises ValueError if a part that it needs has not been trained, or a checkpoint is of another configuration.
    """
    part, out = request.part, request.out
    if part == "latents":
        yield from _encode_films(request)
        return
    if part == "pack":
        yield pack(out, request.model)
        return
    config = request.training()
    for record in _train_part(request, config, engine):
        if part not in record:
            yield record
        elif is_first:
            _save_part(part, record[part], config.loop.out)


def _encode_films(request: TrainRequest) -> Iterator[dict]:
    most = request.loop.get("num_steps")
    vae = _vae_of(request.model) if request.model else load_vae(request.out)
    for films in (*FILM_SETS, HELD_OUT):
        num_films = min(films.num_films, most or 10**9)
        for count in make_latents(request.out / "latents", vae, request.seed, films, num_films):
            yield {"set": films.name, "films": count}


def _vae_of(model: Path) -> VAE:
    return diffusers_folder.load_vae(diffusers_folder.open_folder(resolve_model(model)), torch.float32).eval()


def _train_part(request: TrainRequest, config, engine: Engine) -> Iterator[dict]:
    match request.part:
        case "vae":
            return train_vae(config, resume=request.resume, engine=engine)
        case "decoder":
            return train_decoder(load_vae(request.out, as_first_trained=True), config, resume=request.resume)
        case "text":
            return train_text(config, resume=request.resume)
        case _:
            return _train_dit(request, config, engine)


def _train_dit(request: TrainRequest, config: DiTTraining, engine: Engine) -> Iterator[dict]:
    out, text, checks = request.out, load_text(request.out), []
    sets = {films.name: FilmLatents(out / "latents", films) for films in FILM_SETS}
    dit = new_dit(config)
    if request.validate_every:
        films = held_out(FilmLatents(out / "latents", HELD_OUT))
        checks.append(validation(dit, config, films, text, request.validate_every))
    if request.sample_every:
        method = make_method(TINY_DEFAULTS["method"])
        checks.append(samples(dit, load_vae(out), text, method, config, sets[LONG.name], SAMPLE_PROMPTS,
                              request.sample_every))  # fmt: skip
    return train_dit(config, sets, text, resume=request.resume, dit=dit, engine=engine, checks=checks)


def dit_options(given: Mapping[str, str | int | bool]) -> dict[str, LevelSampler | Objective]:
    """`levels` and `objective` of a DiTTraining from the options given; ValueError for those that do nothing."""
    kinds = {"loss_weighting": LossWeighting, "multitask": Multitask, "interval_cost": IntervalCost}
    values = {name: kinds.get(name, lambda value: value)(value) for name, value in given.items()}
    levels = LevelSampler(values.pop("levels", LevelSampler.STAIRCASE))
    if values.get("multitask", Multitask.NONE) is Multitask.NONE:
        for name in ("num_intervals", "interval_cost"):
            if name in values:
                raise ValueError(f"{name}={values[name]} needs a way to combine intervals; add --multitask uw")
    return {"levels": levels, "objective": Objective(**values)}


def check_new(folder: Path, resume: bool) -> None:
    """Raise ValueError rather than train over a checkpoint that is there."""
    if (folder / "state.pt").exists() and not resume:
        raise ValueError(f"{folder / 'state.pt'} is there already; add --resume to go on, or give another --out")


def _save_part(part: str, model: VAE | TextEncoder | DiT, folder: Path) -> None:
    if part == "text":
        model.save(folder)
    else:
        torch.save({"config": model.config.to_dict(), "weights": model.state_dict()}, folder / "model.pt")


def load_vae(out: Path, *, as_first_trained: bool = False) -> VAE:
    """The trained VAE of a training folder, with the decoder that was trained on if there is one."""
    part = "decoder" if (out / "decoder" / "model.pt").exists() and not as_first_trained else "vae"
    saved = _load(out / part / "model.pt", part)
    vae = VAE(VAEConfig.from_dict(saved["config"]))
    vae.load_state_dict(saved["weights"])
    return vae.eval()


def load_text(out: Path) -> TextEncoder:
    """The trained text encoder of a training folder."""
    if not (out / "text" / "text_encoder").is_dir():
        raise ValueError(f"{out / 'text'} holds no trained text encoder; run: longvid train text --out {out}")
    return TextEncoder.load(out / "text", torch.float32)


def load_dit(out: Path) -> DiT:
    """The trained DiT of a training folder."""
    dit = DiT(TINY_DIT)
    dit.load_state_dict(_load(out / "dit" / "model.pt", "dit")["weights"])
    return dit.eval()


def _load(path: Path, part: str) -> dict:
    if not path.exists():
        raise ValueError(f"{path} is missing; run first: longvid train {part} --out {path.parent.parent}")
    return torch.load(path, weights_only=True)


def pack(out: Path, model: Path | None) -> dict:
    """Write the model folder, in bfloat16."""
    if model is None:
        raise ValueError("pack needs the folder to write; such as --model tiny")
    dit, vae, text = load_dit(out).bfloat16(), load_vae(out).bfloat16(), load_text(out)
    text.encoder.bfloat16()
    save_folder(model, dit=dit, vae=vae, text=text, scheduler=scheduler_config(3.0), longvid=TINY_DEFAULTS)
    return {"model": str(model), "bytes": sum(f.stat().st_size for f in model.rglob("*") if f.is_file())}
