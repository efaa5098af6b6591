"""What a DiT's layers do to each token alone, compiled: norms, modulation, gates and rotations in one pass each.

Between a large model's products these read and write all hidden states many times over, mostly in float32. Products
and attention stay as they are, so nothing is compiled anew for another number of latents, another context or another
layer: a quarter of a minute once, for any length and method.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvid.models.attention import Rotation
from longvid.models.dit import DiT, TokenWise, gated


def compile_token_wise(dit: DiT) -> DiT:
    """The DiT, for inference alone; a compiler is needed (on a GPU Triton, which comes with torch; else C++)."""
    for layer in dit.blocks.values():
        layer.token_wise = COMPILED
    return dit


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, scaled and shifted, in float32; in x's dtype."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).type_as(x)


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm in the dtype of its weight; in x's dtype."""
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).type_as(x)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of neighbouring features turned, (b, tokens, n, d) by (tokens, 1, d / 2): no complex numbers, which
    compilers cannot fuse."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


_modulated, _gated, _normed, _rotated = (torch.compile(f, dynamic=True) for f in (modulated, gated, normed, rotated))


def _layer_normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return _normed(x, norm.weight, norm.bias, norm.eps)


def _rotate(x: Tensor, turn: Rotation, start: int = 0) -> Tensor:
    part = turn.turn[start : start + x.shape[1]]
    return _rotated(x, part.real, part.imag)


COMPILED = TokenWise(modulated=_modulated, gated=_gated, normed=_layer_normed, rotate=_rotate)
