"""Convolutions of the causal video VAE over activations `(b, t, h, w, c)`, channels last.

    b  batch    t  frames    h w  height and width    c o  channels in and out    k  temporal taps

Three ways to one result. `conv3d_plain` is the definition and, on a GPU, the fast way. A CPU runs float32 3-D
convolutions of few channels 5 to 20 times slower than images, so there `conv3d_by_taps` makes images of them, and
`conv3d_minimal` does the same with fewer products. They know nothing of streams or of the past.
"""

import functools

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    """`(b, t, h, w, c) -> (b, t, h', w', o)`: each frame as an image."""
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride, padding, groups=groups)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def conv3d_plain(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """`(b, t, h, w, c) -> (b, t', h, w, o)`: "same" in space, "valid" and strided in time; the slow twin on a CPU."""
    pad = (0, weight.shape[3] // 2, weight.shape[4] // 2)
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, (stride, 1, 1), pad)
    return y.permute(0, 2, 3, 4, 1)


def stacked_taps(weight: Tensor) -> Tensor:
    """`(o, c, k, y, x) -> (o, k c, y, x)`, channels last: the kernel for frames stacked as channels."""
    return rearrange(weight, "o c k y x -> o y x (k c)").permute(0, 3, 1, 2)


def conv3d_by_taps(x: Tensor, kernel: Tensor, bias: Tensor, taps: int, stride: int = 1) -> Tensor:
    """`conv3d_plain` as one image convolution (or matrix product) over the temporal taps, stacked as channels."""
    if taps > 1:
        last = stride * ((x.shape[1] - taps) // stride) + 1
        x = torch.cat([x[:, k : k + last : stride] for k in range(taps)], -1)
    if kernel.shape[2:] == (1, 1):
        return F.linear(x, kernel.flatten(1), bias)
    return conv2d(x, kernel, bias, padding=kernel.shape[2] // 2)


@functools.cache
def minimal_filter(num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices A, G, B of a minimal filter of 3 taps: `y = A ((G g) * (B d))` for `num_out + 2` inputs d.

    Toom-Cook's evaluation and interpolation (Winograd, "Arithmetic complexity of computations", 1980; Lavin and Gray,
    arXiv 1509.09308): `num_out + 2` products where the definition has `3 num_out`. With points at even distance
    around 0 and at infinity the rounding error in float32 is that of the definition.
    """
    points = torch.tensor({2: [0, 1, -1], 4: [0, 2 / 3, -2 / 3, 4 / 3, -4 / 3]}[num_out], dtype=torch.float64)

    def powers(num: int) -> Tensor:
        at_infinity = F.one_hot(torch.tensor([num - 1]), num)
        return torch.cat([torch.linalg.vander(points, N=num), at_infinity])

    a, g, b = powers(num_out).T, powers(3), torch.linalg.inv(powers(num_out + 2)).T
    return a.float(), g, b.float()


def minimal_kernels(weight: Tensor, num_out: int) -> Tensor:
    """`(o, c, 3, y, x) -> ((num_out + 2) o, c, y, x)`, channels last: the kernels of `conv3d_minimal`."""
    _, g, _ = minimal_filter(num_out)
    kernels = torch.einsum("ik,ockyx->ioyxc", g, weight.double()).to(weight.dtype)
    return kernels.flatten(0, 1).permute(0, 3, 1, 2)


def conv3d_minimal(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """`conv3d_plain` of 3 taps for 2 or 4 frames out, with 2/3 or 1/2 of the products: `minimal_filter` along time."""
    num_out = x.shape[1] - 2
    a, _, b = minimal_filter(num_out)
    mixed = torch.matmul(b, x.flatten(2)).view_as(x)
    mixed = rearrange(mixed, "b i h w c -> b 1 h w (i c)")
    products = conv2d(mixed, kernels, None, padding=kernels.shape[2] // 2, groups=num_out + 2)
    products = rearrange(products, "b 1 h w (i o) -> b i (h w o)", i=num_out + 2)
    return torch.matmul(a, products).view(x.shape[0], num_out, *x.shape[2:4], -1).add_(bias)


def coarse_kernels(weight: Tensor) -> Tensor:
    """`(o, c, 3, 3) -> (4 o, c, 2, 2)`, channels last: the kernels of `upsample_conv2d`, one per fine pixel."""
    rows = torch.stack([weight[:, :, 0], weight[:, :, 1:].sum(2), weight[:, :, :2].sum(2), weight[:, :, 2]], 2)
    both = torch.stack([rows[..., 0], rows[..., 1:].sum(-1), rows[..., :2].sum(-1), rows[..., 2]], -1)
    return rearrange(both, "o c (p y) (q x) -> (p q o) y x c", p=2, q=2).permute(0, 3, 1, 2)


def upsample_conv2d(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """`(b, t, h, w, c) -> (b, t, 2h, 2w, o)`: nearest upsampling by 2, then a 3x3 convolution with padding 1.

    Of 3 neighbouring fine rows 2 show the same coarse row, so each of the 4 fine pixels of a coarse one is a 2x2
    convolution of the coarse image: 16 products where the fine image has 36, and no fine image of the input.
    """
    y = rearrange(conv2d(x, kernels, bias.repeat(4), padding=1), "b t h w (p q o) -> b t h w p q o", p=2, q=2)
    height, width = x.shape[2:4]
    fine = y.new_empty(*x.shape[:2], height, 2, width, 2, len(bias))
    for p in range(2):
        for q in range(2):
            fine[:, :, :, p, :, q] = y[:, :, p : p + height, q : q + width, p, q]
    return fine.view(*x.shape[:2], 2 * height, 2 * width, len(bias))
