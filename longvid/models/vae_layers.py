"""Layers of the causal video VAE (Wan2.1, arXiv 2503.20314, section 4.1; Wan2.2 adds the residual resampling).

    b  batch    t  frames at this depth    h w  height and width at this depth    c  channels

Activations are `(b, t, h, w, c)`: channels last, so a frame is a contiguous image, a norm over channels reads memory
in order and a 1x1x1 convolution is a matrix product. Parameter names and shapes are those of diffusers'
`AutoencoderKLWan`. No layer keeps anything between calls: what a causal layer needs of the past comes from a `Stream`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.models.vae_conv import (
    coarse_kernels,
    conv2d,
    conv3d_by_taps,
    conv3d_minimal,
    conv3d_plain,
    minimal_kernels,
    packed,
    stacked_taps,
    upsample_conv2d,
)


class VAEState(NamedTuple):
    """What a call leaves to the next one of its stream.

    `past` holds the last input frames, `(b, 2 or 1, h, w, c)`, of every causal layer in the order in which a call meets
    them. `kernels` are weights in the form in which the CPU's paths want them, for speed alone: what is kept of a
    stream for later is `past`.
    """

    past: tuple[Tensor, ...]
    kernels: dict[tuple, Tensor]


class Stream:
    """A walk through the causal layers: hands each its past and notes what it will ask for next time.

    Args:
        state: what the call before returned; None at the start of a video, where the past is zero.
        keep: whether to note the state. A whole clip that nothing follows does without.
    """

    def __init__(self, state: VAEState | None = None, *, keep: bool = True):
        self.is_start = state is None
        self._past = iter(state.past if state else ())
        self._keep = keep
        self._kept: list[Tensor] = []
        self._kernels: dict[tuple, Tensor] = state.kernels if state else {}

    def extend(self, x: Tensor, num_frames: int = 2) -> Tensor:
        """`(b, t, h, w, c)` with `num_frames` frames of the past before it; its own last ones are noted."""
        return self._note(torch.cat([self._take(x, num_frames), x], 1), num_frames)

    def extend_activated(self, x: Tensor, norm: "RMSNorm") -> Tensor:
        """`extend` of SiLU(norm(x)), by two frames; where no gradient is taken, made in one piece of memory."""
        if torch.is_grad_enabled():
            return self.extend(F.silu(norm(x)))
        past = self._take(x, 2)
        y = x.new_empty(x.shape[0], 2 + x.shape[1], *x.shape[2:])
        y[:, :2] = past
        F.silu(norm(x, out=y[:, 2:]), inplace=True)
        return self._note(y, 2)

    def advance(self) -> VAEState:
        """Go on to the next piece, after every layer was met: what was noted is the past now. Returns it."""
        assert self._keep and next(self._past, None) is None
        state, self._kept = VAEState(tuple(self._kept), self._kernels), []
        self.is_start, self._past = False, iter(state.past)
        return state

    def prepared(self, prepare: Callable[..., Tensor], weight: Tensor, *args: int) -> Tensor:
        """`prepare(weight, *args)`, once per stream: within one, weights do not change."""
        key = (prepare, weight, *args)
        if key not in self._kernels:
            self._kernels[key] = prepare(*key[1:])
        return self._kernels[key]

    def _take(self, x: Tensor, num_frames: int) -> Tensor:
        return x.new_zeros(x.shape[0], num_frames, *x.shape[2:]) if self.is_start else next(self._past)

    def _note(self, x: Tensor, num_frames: int) -> Tensor:
        if self._keep:
            self._kept.append(x[:, -num_frames:].clone())
        return x


def conv3d(x: Tensor, weight: Tensor, bias: Tensor, stream: Stream, stride: int = 1) -> Tensor:
    """`(b, t, h, w, c) -> (b, t', h, w, o)`: `conv3d_plain`, on the path that is fast for x."""
    if x.device.type != "cpu":
        return conv3d_plain(x, weight, bias, stride)
    if x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return conv3d_plain(x, stream.prepared(packed, weight), bias, stride)
    exact = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if weight.shape[2:] == (3, 3, 3) and x.shape[1] == 6 and exact and not torch.is_grad_enabled():
        return conv3d_minimal(x, stream.prepared(minimal_kernels, weight), bias)
    return conv3d_by_taps(x, stream.prepared(stacked_taps, weight), bias, weight.shape[2], stride)


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and the two frames before; over the present alone where its kernel is 1."""

    def forward(self, x: Tensor, stream: Stream, norm: "RMSNorm | None" = None) -> Tensor:
        """`(b, t, h, w, c) -> (b, t, h, w, o)`; with a norm, of SiLU(norm(x))."""
        if self.kernel_size[0] == 1:
            return conv3d(x, self.weight, self.bias, stream)
        x = stream.extend(x) if norm is None else stream.extend_activated(x, norm)
        if stream.is_start and x.shape[1] == 3:
            return conv3d(x[:, 2:], self.weight[:, :, 2:], self.bias, stream)  # the rest would meet zeros
        return conv3d(x, self.weight, self.bias, stream)


class RMSNorm(nn.Module):
    """`gamma x / rms(x)` over channels; gamma is stored with the unit axes of a channels-first image or video."""

    def __init__(self, dim: int, num_axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_axes))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`(..., c) -> (..., c)`, rms in float32; into `out`, in x's dtype, where no gradient is taken."""
        wide, gamma = x.float(), self.gamma.flatten().float()
        scale = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(1e-12)
        if out is None:
            return (wide * scale * gamma).to(x.dtype)
        if wide is x:
            return torch.mul(x, scale, out=out).mul_(gamma)
        return out.copy_(wide.mul_(scale).mul_(gamma))  # a CPU is slow to scale few channels of bfloat16 by the pixel


class ResidualBlock(nn.Module):
    """Two rounds of norm, SiLU, causal convolution, beside a shortcut."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t, h, w, o)`."""
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, stream)
        x = self.conv2(self.conv1(x, stream, self.norm1), stream, self.norm2)
        return x + shortcut if torch.is_grad_enabled() else x.add_(shortcut)


class AttentionBlock(nn.Module):
    """One head of attention among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, num_axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t, h, w, c)`."""
        qkv = F.linear(self.norm(x), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = rearrange(qkv, "b t h w (n c) -> n (b t) 1 (h w) c", n=3)
        y = F.scaled_dot_product_attention(q, k, v).view_as(x)
        return x + F.linear(y, self.proj.weight.flatten(1), self.proj.bias)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest size."""

    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t, h, w, c)`."""
        x = self.resnets[0](x, stream)
        return self.resnets[1](self.attentions[0](x, stream), stream)


class Upsample(nn.Module):
    """Twice the height and width; with `temporal` also twice the frames, save the first of a video, which stays one."""

    def __init__(self, dim: int, out_dim: int, *, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(dim, out_dim, 3)])
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, 2t or t, 2h, 2w, o)`; 2t - 1 frames at the start of a video."""
        if self.time_conv is not None:
            # The first frame of a video is neither doubled nor seen by the convolution of those that follow.
            first, rest = x.split([1, x.shape[1] - 1], 1) if stream.is_start else (x[:, :0], x)
            rest = self.time_conv(rest, stream) if rest.shape[1] else stream.extend(rest)[:, :0].repeat(1, 1, 1, 1, 2)
            x = torch.cat([first, rearrange(rest, "b t h w (k c) -> b (t k) h w c", k=2)], 1)
        conv = self.resample[1]
        return upsample_conv2d(x, stream.prepared(coarse_kernels, conv.weight), conv.bias)


class Downsample(nn.Module):
    """Half the height and width; with `temporal` also half the frames, save the first of a video, which stays one."""

    def __init__(self, dim: int, *, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(dim, dim, 3)])
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t/2 or t, h/2, w/2, c)`; (t + 1)/2 frames at the start of a video."""
        x = conv2d(F.pad(x, (0, 0, 0, 1, 0, 1)), self.resample[1].weight, self.resample[1].bias, stride=2)
        if self.time_conv is None:
            return x
        first = x[:, : 1 if stream.is_start else 0]
        x = stream.extend(x, 1)[:, first.shape[1] :]
        if x.shape[1] == 1:
            return first
        return torch.cat([first, conv3d(x, self.time_conv.weight, self.time_conv.bias, stream, stride=2)], 1)


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling (Wan2.1)."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None):
        super().__init__()
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t', h', w', o)`."""
        for resnet in self.resnets:
            x = resnet(x, stream)
        return x if self.upsamplers is None else self.upsamplers[0](x, stream)


class ResidualUpBlock(nn.Module):
    """Residual blocks and an upsampling, beside a shortcut that repeats channels as pixels (Wan2.2)."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: Upsample | None):
        super().__init__()
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))
        self.upsampler = upsample
        self.out_dim = out_dim

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t', h', w', o)`."""
        shortcut = x
        for resnet in self.resnets:
            x = resnet(x, stream)
        if self.upsampler is None:
            return x
        return self.upsampler(x, stream) + self._repeat(shortcut, stream)

    def _repeat(self, x: Tensor, stream: Stream) -> Tensor:
        """Each channel repeated, then channels laid out as pixels and frames; of a video's first frame the last."""
        k = 1 if self.upsampler.time_conv is None else 2
        x = x.repeat_interleave(self.out_dim * 4 * k // x.shape[-1], dim=-1)
        x = rearrange(x, "b t h w (o k p q) -> b (t k) (h p) (w q) o", k=k, p=2, q=2)
        return x[:, k - 1 :] if stream.is_start else x


class ResidualDownBlock(nn.Module):
    """Residual blocks and a downsampling, beside a shortcut that averages pixels laid out as channels (Wan2.2)."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, downsample: Downsample | None):
        super().__init__()
        dims = [in_dim] + [out_dim] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(i, o) for i, o in zip(dims[:-1], dims[1:], strict=True))
        self.downsampler = downsample
        self.out_dim = out_dim

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, c) -> (b, t', h', w', o)`."""
        shortcut = self._average(x, stream)
        for resnet in self.resnets:
            x = resnet(x, stream)
        return shortcut + (x if self.downsampler is None else self.downsampler(x, stream))

    def _average(self, x: Tensor, stream: Stream) -> Tensor:
        """Means of neighbouring channels of (channel, frame, pixel); a video's first frame is paired with zeros."""
        p = 1 if self.downsampler is None else 2
        k = 2 if self.downsampler is not None and self.downsampler.time_conv is not None else 1
        if stream.is_start:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, k - 1, 0))
        x = rearrange(x, "b (t k) (h p) (w q) c -> b t h w (c k p q)", k=k, p=p, q=p)
        return x.unflatten(-1, (self.out_dim, -1)).mean(-1)
