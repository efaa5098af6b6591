"""The released folder format: `model_index.json transformer/ vae/ text_encoder/ tokenizer/ scheduler/`.

Wan2.1 and SkyReels-V2 are published so, and what longvid trains is saved so, for diffusers to load. What only longvid
knows of a checkpoint (its default method, for one) stands beside them in `longvid.json`.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from longvid.checkpoints.safetensor_files import load_into, module_tensors, open_tensors, read_json, save_tensors
from longvid.models.dit import SKYREELS, WAN, DiT, DiTConfig
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig

VAE_CLASS = "AutoencoderKLWan"
PIPELINES = {WAN: "WanPipeline", SKYREELS: "SkyReelsV2DiffusionForcingPipeline"}
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CONFIGS = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
DIFFUSERS_VERSION = "0.35.0"  # the first that has every class written here
FLOAT32 = {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}  # as diffusers keeps them


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A checkpoint's configurations, parsed; its tensors stay on disk. `longvid` is empty for foreign checkpoints."""

    path: Path
    index: dict
    transformer: dict
    vae: dict
    scheduler: dict
    longvid: dict


def open_folder(path: Path | str) -> Folder:
    """Read the configurations and check that every part and every tensor file is there and whole.

    Raises ValueError naming the part that is lacking, damaged, or of a class that longvid does not know.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: is not a folder; give one that holds model_index.json")
    index = read_json(path / "model_index.json")
    if (index.get("transformer_2") or [None])[0] is not None:
        raise ValueError(f"{path}: has two transformers (Wan2.2 A14B), which is not supported; use a Wan2.1 folder")
    for part in CONFIGS:
        if not (path / part).is_dir():
            raise ValueError(f"{path}: its part {part}/ is missing; fetch the whole folder")
    configs = {part: read_json(path / part / name) for part, name in CONFIGS.items()}
    _check_class(path, configs, "transformer", tuple(PIPELINES))
    _check_class(path, configs, "vae", (VAE_CLASS,))
    for part, stem in STEMS.items():
        open_tensors(path / part, stem)
    return Folder(
        path=path,
        index=index,
        transformer=configs["transformer"],
        vae=configs["vae"],
        scheduler=configs["scheduler"],
        longvid=read_json(path / "longvid.json") if (path / "longvid.json").exists() else {},
    )


def load_dit(
    folder: Folder, dtype: torch.dtype, device: torch.device | str = "cpu", layers: range | None = None
) -> DiT:
    """The DiT, or the part of it that holds `layers`; only that part is read from disk.

    Projections are in `dtype`; norms, time embedder and modulation tables stay in float32, as in diffusers. Raises
    ValueError for a config that the DiT does not honour and for a missing, surplus or misshapen tensor.
    """
    config = DiTConfig.from_dict(folder.transformer)
    with torch.device("meta"):
        dit = DiT(config, layers)
        whole = set(DiT(config).state_dict())
    tensors = open_tensors(folder.path / "transformer", STEMS["transformer"])
    load_into(
        dit,
        tensors,
        dtype=dtype,
        device=device,
        keep_float32=lambda name: not FLOAT32.isdisjoint(name.split(".")),
        allow_surplus=lambda name: name in whole,
    )
    return dit


def load_vae(
    folder: Folder, dtype: torch.dtype, device: torch.device | str = "cpu", *, back_alone: bool = False
) -> VAE:
    """The VAE, all of it in `dtype`, or its decoder's back alone; only that is read from disk.

    Raises ValueError as `load_dit` does.
    """
    with torch.device("meta"):
        vae = VAE(VAEConfig.from_dict(folder.vae))
    whole = set(vae.state_dict())
    if back_alone:
        vae = vae.back_alone()
    tensors = open_tensors(folder.path / "vae", STEMS["vae"])
    load_into(vae, tensors, dtype=dtype, device=device, allow_surplus=lambda name: name in whole)
    return vae


def num_elements(folder: Folder, part: str) -> int:
    """Numbers that the files of a part hold, from their headers."""
    files = open_tensors(folder.path / part, STEMS[part])
    return sum(math.prod(files.shape(name)) for name in files.names)


def stored_bytes(folder: Folder, part: str, module: nn.Module) -> int:
    """Bytes that the parameters of a network, or of a part of it, take in the folder's files: what is read of them."""
    files = open_tensors(folder.path / part, STEMS[part])
    return sum(math.prod(files.shape(name)) * files.dtype(name).itemsize for name in module_tensors(module))


def scheduler_config(flow_shift: float) -> dict:
    """`scheduler/scheduler_config.json`: UniPC of order 2 (bh2) for flow matching, ending at level 0."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "num_train_timesteps": 1000,
        "flow_shift": flow_shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
    }


def save_folder(path: Path | str, *, dit: DiT, vae: VAE, text: TextEncoder, scheduler: dict, longvid: dict) -> None:
    """Write a folder that `open_folder` and diffusers' `DiffusionPipeline.from_pretrained` read.

    The DiT must be whole. Tensors keep their dtype. The folder is written aside and renamed, so it is complete or not
    there. Raises FileExistsError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path}: exists already; give a path that does not, or move it away")
    if not (dit.is_first and dit.is_last):
        raise ValueError(f"layers={dit.layers} are a part of the DiT; save one that holds all {dit.config.num_layers}")
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    transformer = dit.config.to_dict()
    networks = {"transformer": (dit, transformer), "vae": (vae, {**vae.config.to_dict(), "_class_name": VAE_CLASS})}
    for part, (module, config) in networks.items():
        save_tensors(aside / part, STEMS[part], module_tensors(module))
        _write_json(aside / part / CONFIGS[part], {**config, "_diffusers_version": DIFFUSERS_VERSION})
    text.save(aside)
    _write_json(aside / "scheduler" / CONFIGS["scheduler"], {**scheduler, "_diffusers_version": DIFFUSERS_VERSION})
    if longvid:
        _write_json(aside / "longvid.json", longvid)
    index = {
        "_class_name": PIPELINES[transformer["_class_name"]],
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", text.tokenizer.class_name],
        "transformer": ["diffusers", transformer["_class_name"]],
        "vae": ["diffusers", VAE_CLASS],
    }
    _write_json(aside / "model_index.json", index)
    os.replace(aside, path)


def copy_folder(folder: Folder, path: Path | str, dit: DiT, *, longvid: dict | None = None) -> None:
    """Write the folder anew with another DiT of the same shape, in the dtypes that it has in its files.

    The rest is copied, `longvid.json` replaced if it is given. The folder is written aside and renamed. Raises
    FileExistsError if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path}: exists already; give a path that does not, or move it away")
    aside, stem = path.with_name(f".{path.name}.part"), STEMS["transformer"]
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(folder.path, aside, ignore=shutil.ignore_patterns(f"{stem}*.safetensors*", ".*"))
    files = open_tensors(folder.path / "transformer", stem)
    tensors = {name: tensor.cpu().to(files.dtype(name)) for name, tensor in module_tensors(dit).items()}
    save_tensors(aside / "transformer", stem, tensors)
    for file in (folder.path / "vae").glob(f"{stem}*.safetensors*"):
        shutil.copy(file, aside / "vae" / file.name)
    if longvid is not None:
        _write_json(aside / "longvid.json", longvid)
    os.replace(aside, path)


def _check_class(path: Path, configs: dict[str, dict], part: str, known: tuple[str, ...]) -> None:
    given = configs[part].get("_class_name")
    if given not in known:
        raise ValueError(f"{path / part / CONFIGS[part]}: _class_name={given!r} is not known; use {' or '.join(known)}")


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
