"""Named shapes: model folders of random weights, to measure speed and memory where no checkpoint is at hand.

What a pass costs does not depend on the weights' values. The text encoder is a stand-in that gives states of the right
size: its time and memory are not those of the released one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from longvid.checkpoints.diffusers_folder import save_folder, scheduler_config
from longvid.models.dit import SKYREELS, WAN, DiT, DiTConfig
from longvid.models.text import TextEncoder
from longvid.models.tokenizers import ByteTokenizer
from longvid.models.umt5 import UMT5Config, UMT5Encoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, the size of picture that it is meant for, and what its folder says of it; `dtype` is its weights'."""

    dit: DiTConfig
    vae: VAEConfig
    height: int
    width: int
    text_tokens: int
    dtype: str
    defaults: Mapping


def _wan(num_heads: int, num_layers: int, ffn_dim: int) -> Shape:
    """Wan2.1 T2V: `transformer/config.json` and `vae/config.json` of the released folders."""
    dit = DiTConfig(
        class_name=WAN, num_attention_heads=num_heads, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=ffn_dim, num_layers=num_layers,
    )  # fmt: skip
    return Shape(dit=dit, vae=VAEConfig(), height=480, width=832, text_tokens=512, dtype="bfloat16",
                 defaults={"method": "dualparal", "fps": 16, "num_frames": 81, "prompt": "any"})  # fmt: skip


def _small(*, num_heads: int, head_dim: int, num_layers: int, ffn_dim: int, text_dim: int, vae: VAEConfig, height: int,
           width: int, text_tokens: int, fps: int) -> Shape:  # fmt: skip
    """The embedded model's classes with other numbers."""
    dit = DiTConfig(
        class_name=SKYREELS, num_attention_heads=num_heads, attention_head_dim=head_dim, in_channels=vae.z_dim,
        out_channels=vae.z_dim, text_dim=text_dim, freq_dim=64, ffn_dim=ffn_dim, num_layers=num_layers,
    )  # fmt: skip
    return Shape(dit=dit, vae=vae, height=height, width=width, text_tokens=text_tokens, dtype="float32",
                 defaults={"method": "rolling", "fps": fps, "num_frames": 17, "prompt": "any"})  # fmt: skip


def _small_vae(base_dim: int, z_dim: int, dim_mult: tuple[int, ...], num_res_blocks: int) -> VAEConfig:
    return VAEConfig(base_dim=base_dim, z_dim=z_dim, dim_mult=dim_mult, num_res_blocks=num_res_blocks,
                     temperal_downsample=(True, True), latents_mean=(0.0,) * z_dim,
                     latents_std=(1.0,) * z_dim)  # fmt: skip


SHAPES = {
    "wan-1.3b": _wan(12, 30, 8960),
    "wan-14b": _wan(40, 40, 13824),
    "small": _small(num_heads=4, head_dim=64, num_layers=8, ffn_dim=768, text_dim=128, height=128, width=128, fps=16,
                    text_tokens=160, vae=_small_vae(16, 8, (1, 2, 2), 1)),
    "micro": _small(num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, height=16, width=32, fps=8,
                    text_tokens=40, vae=_small_vae(4, 4, (1, 1, 1), 1)),
}  # fmt: skip
"""Names for `longvid bench --shape`."""


def find_shape(name: str) -> tuple[Shape, int, int]:
    """The shape of `NAME` or `NAME@HEIGHTxWIDTH`, and its size. Raises ValueError for another name, or no such size."""
    found = re.fullmatch(r"([^@]+)(?:@(\d+)x(\d+))?", name)
    if not found or found[1] not in SHAPES:
        raise ValueError(f"shape {name!r} is unknown; use {', '.join(SHAPES)}, or one with a size: wan-1.3b@480x832")
    shape = SHAPES[found[1]]
    height, width = (int(found[2]), int(found[3])) if found[2] else (shape.height, shape.width)
    unit = 2 ** (len(shape.vae.dim_mult) - 1) * shape.dit.patch_size[1]
    if not height or not width or height % unit or width % unit:
        fit = [max(unit, size - size % unit) for size in (height, width)]
        raise ValueError(f"shape {name!r}: height and width must be multiples of {unit}; try "
                         f"{found[1]}@{fit[0]}x{fit[1]}")  # fmt: skip
    return shape, height, width


def save_shape(name: str, path: Path) -> Path:
    """Write a folder of random weights of a named shape, always the same; returns the path. Raises as `find_shape`."""
    shape, height, width = find_shape(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit, vae = DiT(shape.dit).to(getattr(torch, shape.dtype)), VAE(shape.vae)
        text = _text(shape)
        for network in (dit, vae):
            _stir(network)
    defaults = {"name": name, "height": height, "width": width, **shape.defaults}
    save_folder(path, dit=dit, vae=vae, text=text, scheduler=scheduler_config(3.0), longvid=defaults)
    return path


def _text(shape: Shape) -> TextEncoder:
    config = UMT5Config(vocab_size=384, d_model=shape.dit.text_dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return TextEncoder(UMT5Encoder(config).reset(), ByteTokenizer(shape.text_tokens))


@torch.no_grad()
def _stir(network: nn.Module) -> None:
    """Move what begins at zero or one, so that every number counts."""
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
