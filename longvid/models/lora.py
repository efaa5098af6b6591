"""LoRA (arXiv 2106.09685): beside a linear layer two narrow ones, whose product is added to what it gives.

Names in files are those of diffusers and peft: `transformer.blocks.0.attn1.to_q.lora_A.weight`, (rank, in), and
`lora_B`, (out, rank). alpha is the rank, so the product is added as it is; files that say otherwise are honoured.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longvid.models.dit import DiT

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the names of the layers that are adapted: the projections of self- and cross-attention."""

PREFIX = "transformer."
FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""


def add_lora(dit: DiT, rank: int, *, seed: int = 0) -> None:
    """Freeze the DiT and put trainable adapters beside its attention's projections; at first they add nothing.

    Raises ValueError for a rank that is not positive, or more than the model's width.
    """
    if not 1 <= rank <= dit.config.dim:
        raise ValueError(f"lora={rank} must be a rank from 1 to {dit.config.dim}, the width of the model; try 16")
    dit.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in list(dit.named_modules()):
        if not (isinstance(linear, nn.Linear) and name.startswith("blocks.") and name.endswith(TARGETS)):
            continue
        place = {"device": linear.weight.device, "dtype": torch.float32}
        linear.lora_A = nn.Linear(linear.in_features, rank, bias=False, **place)
        linear.lora_B = nn.Linear(rank, linear.out_features, bias=False, **place)
        with torch.no_grad():
            start = torch.randn(rank, linear.in_features, generator=generator) / rank
            linear.lora_A.weight.copy_(start)
            linear.lora_B.weight.zero_()
        linear.register_forward_hook(_add)


def _add(linear: nn.Linear, given: tuple[Tensor], out: Tensor) -> Tensor:
    return out + linear.lora_B(linear.lora_A(given[0].to(linear.lora_A.weight.dtype))).to(out.dtype)


def save_lora(path: Path, dit: DiT) -> None:
    """Write the adapters of a DiT as a file that diffusers' `load_lora_weights` reads."""
    found = {PREFIX + name: p.detach().cpu().contiguous() for name, p in dit.named_parameters() if ".lora_" in name}
    assert found, "a DiT without adapters"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    save_file(found, aside, metadata={"format": "pt"})
    os.replace(aside, path)


@torch.no_grad()
def merge_lora(dit: DiT, path: Path, scale: float = 1.0) -> int:
    """Add the product of each adapter of a file, times `scale`, to its layer's weight; gives how many there are.

    Raises ValueError, the DiT as it was, for a file that cannot be read, and a tensor that has no layer, no
    counterpart or another shape.
    """
    pairs, alpha = _read(path)
    layers = dict(dit.named_modules())
    for name, (down, up) in pairs.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear) or layer.weight.shape != (up.shape[0], down.shape[1]):
            shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
            raise ValueError(f"{path}: {PREFIX}{name} has {shapes}, which fit no layer of this model; use the model "
                             "that it was trained on")  # fmt: skip
    for name, (down, up) in pairs.items():
        weight = layers[name].weight
        factor = scale * (alpha / len(down) if alpha else 1.0)
        weight.copy_(weight.float() + factor * (up.float() @ down.float()))
    return len(pairs)


def _read(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The pairs of a file by layer, and alpha if its metadata has one, else 0."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the {FILE} of a LoRA")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            about = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it again") from None
    pairs = {}
    for name in tensors:
        layer, mark, end = name.removeprefix(PREFIX).rpartition(".lora_")
        other = f"{PREFIX}{layer}.lora_{'B' if end.startswith('A') else 'A'}.weight"
        if not (name.startswith(PREFIX) and mark and end in ("A.weight", "B.weight") and other in tensors):
            raise ValueError(f"{path}: {name} is not as diffusers names LoRA weights, in pairs, such as {PREFIX}"
                             "blocks.0.attn1.to_q.lora_A.weight and lora_B.weight")  # fmt: skip
        pairs[layer] = (tensors[f"{PREFIX}{layer}.lora_A.weight"], tensors[f"{PREFIX}{layer}.lora_B.weight"])
    if not pairs:
        raise ValueError(f"{path} holds no tensor; give the {FILE} of a LoRA")
    return pairs, float(about.get("transformer.lora_alpha", 0))
