"""Train the embedded model part by part: `vae`, `text`, `latents`, `dit`, then `pack` into a model folder.

Each part keeps its checkpoint and log in a folder of its own under the training folder, and can be resumed.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from longvid.checkpoints.diffusers_folder import save_folder, scheduler_config
from longvid.intervals import IntervalCost
from longvid.levels import LevelSampler
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE, VAEConfig
from longvid.multitask import Multitask
from longvid.weighting import LossWeighting
from pipelines.film_latents import FILM_SETS, FilmLatents, make_latents
from pipelines.objective import Objective
from pipelines.optimise import LoopConfig
from pipelines.train_dit import TINY_DIT, DiTTraining, train_dit
from pipelines.train_text import TextTraining, train_text
from pipelines.train_vae import VAETraining, train_vae

RECIPE = {
    "vae": {"steps": 1900, "batch_size": 8, "learning_rate": 5e-3},
    "text": {"steps": 2000, "batch_size": 64, "learning_rate": 4e-3},
    "dit": {"steps": 4900, "batch_size": 8, "learning_rate": 2e-3},
}
"""How the embedded model is trained; its card says how it was."""

TINY_DEFAULTS = {
    "name": "tiny", "method": "rolling", "height": 128, "width": 128, "fps": 16, "num_frames": 961,
    "prompt": "a red ball bounces on a navy background",
}  # fmt: skip
"""What `longvid.json` of the embedded model says."""


def train(
    part: str,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    model: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    compile: bool = False,
    options: Mapping[str, str | int | bool] = MappingProxyType({}),
) -> Iterator[dict]:
    """Run one part, yielding its log records; `options` are levels and objective of the DiT, by name.

    Raises ValueError if a part that it needs has not been trained, or a checkpoint is of another configuration.
    """
    if options and part != "dit":
        raise ValueError(f"{next(iter(options))} is an option of the part dit, not of {part}; leave it out")
    chosen = dit_options(options)
    if part == "latents":
        vae = load_vae(out)
        for films in FILM_SETS:
            wanted = min(films.num_films, steps or films.num_films)
            for count in make_latents(out / "latents", vae, seed, films, wanted):
                yield {"set": films.name, "films": count}
        return
    if part == "pack":
        yield pack(out, model)
        return
    recipe = RECIPE[part]
    loop = LoopConfig(
        out=out / part,
        num_steps=steps or recipe["steps"],
        batch_size=batch_size or recipe["batch_size"],
        learning_rate=learning_rate or recipe["learning_rate"],
        seed=seed,
    )
    check_new(loop.out, resume)
    if part == "vae":
        records = train_vae(VAETraining(loop=loop), resume=resume)
    elif part == "text":
        records = train_text(TextTraining(loop=loop), resume=resume)
    else:
        sets = {films.name: FilmLatents(out / "latents", seed, films) for films in FILM_SETS}
        records = train_dit(DiTTraining(loop=loop, compile=compile, **chosen), sets, load_text(out), resume=resume)
    for record in records:
        if part in record:
            _save_part(part, record[part], loop.out)
        else:
            yield record


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


def load_vae(out: Path) -> VAE:
    """The trained VAE of a training folder."""
    saved = _load(out / "vae" / "model.pt", "vae")
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
