"""Convolutions of the causal video VAE over activations `(b, t, h, w, c)`, channels last.

    b  batch    t  frames    h w  height and width    c o  channels in and out    k  temporal taps

Three ways to one result. `conv3d_plain` is the definition and, on a GPU or in bfloat16, the fast way. A CPU runs
float32 3-D convolutions of few channels 5 to 20 times slower than images, so there `conv3d_by_taps` makes images of
them, and `conv3d_minimal` does the same with fewer products. They know nothing of streams or of the past.
"""

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


def packed(weight: Tensor) -> Tensor:
    """The kernel of `conv3d_plain` with its channels last, as the activations have them."""
    return weight.contiguous(memory_format=torch.channels_last_3d)


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


EVALUATE = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # fmt: skip
"""What `conv3d_minimal` convolves, as sums of the 6 frames; `INTERPOLATE` makes 4 frames of the 6 results."""
INTERPOLATE = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def minimal_kernels(weight: Tensor) -> Tensor:
    """`(o, c, 3, y, x) -> (6, o, c, y, x)`, channels last: the kernels of `conv3d_minimal`.

    The kernel as a polynomial in time, at the points 0, 1, -1, 2, -2 (each over its Lagrange denominator) and infinity.
    """
    powers = [[1, 0, 0], [1, 1, 1], [1, -1, 1], [1, 2, 4], [1, -2, 4], [0, 0, 1]]
    denominators = [[4], [-6], [-6], [24], [24], [1]]
    points = weight.new_tensor(powers, dtype=torch.float64) / weight.new_tensor(denominators, dtype=torch.float64)
    kernels = torch.einsum("ik,ockyx->ioyxc", points, weight.double())
    return kernels.to(weight.dtype).permute(0, 1, 4, 2, 3)


def conv3d_minimal(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """`(b, 6, h, w, c) -> (b, 4, h, w, o)`: `conv3d_plain` of 3 taps, with 6 image convolutions in place of 12.

    A minimal filter along time: Toom-Cook's evaluation and interpolation, F(4, 3) of Lavin and Gray (arXiv 1509.09308,
    section 4.3), as matrix products over frames. The rounding error in float32 is about 4 times that of the definition.
    """
    frames = (x.new_tensor(EVALUATE) @ x.flatten(2)).view_as(x)
    products = x.new_empty(len(x), 6, *x.shape[2:4], len(bias))
    for i, kernel in enumerate(kernels):  # a constant in time is interpolated by the point 1 alone: the bias is there
        products[:, i] = conv2d(frames[:, i : i + 1], kernel, bias if i == 1 else None, padding=kernel.shape[2] // 2)[
            :, 0
        ]
    return (x.new_tensor(INTERPOLATE) @ products.flatten(2)).view(len(x), 4, *products.shape[2:])


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
