"""Attention over concatenated context, and the 3-axis rotary positions of Wan.

Axes: b batch, f latents, h height and w width in patches, n heads, d head dimension, s = h * w tokens of one latent.

Keys are kept before rotation and rotated when they are read, by their place in what this pass sees. So a position is
an offset from the start of the context, never a count of the whole video, and no video is too long for the table.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class KV(NamedTuple):
    """Self-attention features of some latents in one layer, keys before rotation: each (b, f, s, n, d)."""

    keys: Tensor
    values: Tensor

    def narrow(self, start: int, stop: int) -> "KV":
        """The latents from `start` up to `stop`."""
        return KV(self.keys[:, start:stop], self.values[:, start:stop])


class Sight(NamedTuple):
    """What the latents `start` to `stop` of a pass see in one layer.

    That are the features `before`, the pass's own of latents `own` to `stop`, and those `after`, one behind the other.
    """

    start: int
    stop: int
    own: int
    before: Sequence[KV] = ()
    after: Sequence[KV] = ()

    @property
    def num_before(self) -> int:
        """Latents seen before the first that looks."""
        return sum(kv.keys.shape[1] for kv in self.before) + self.start - self.own

    @property
    def num_latents(self) -> int:
        """Latents seen in all."""
        return self.num_before + self.stop - self.start + sum(kv.keys.shape[1] for kv in self.after)


class Exchange:
    """Where attention finds the other tokens: here all are in one place already, and nothing moves.

    A caller that gives the model some rows of patches of every latent alone hands it an exchange of its own, which
    brings all tokens together within attention, for some of the heads, and counts what it sends and how long it waits.
    """

    num_bytes: int = 0
    waited_s: float = 0.0

    def num_rows(self, rows: int) -> int:
        """Rows of patches of the whole of which a pass has so many."""
        return rows

    def by_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors (b, f, some tokens, n, d) as (b, f, s, some heads, d)."""
        return parts

    def by_tokens(self, x: Tensor) -> Tensor:
        """The way back: (b, f, s, some heads, d) as (b, f, some tokens, n, d)."""
        return x


class Rotation(NamedTuple):
    """Every token's angles, complex (tokens, 1, d / 2), float32.

    For training also their parts, each twice, (tokens, 1, d), and the matrix (d, d) by which each pair (a, b) of
    neighbouring features becomes (-b, a).
    """

    turn: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    quarter: Tensor | None = None


@lru_cache(maxsize=64)
def rotation(
    num_latents: int, height: int, width: int, head_dim: int, device: torch.device, for_training: bool = False
) -> Rotation:
    """Angles of `num_latents * height * width` tokens at time positions 0, 1, ...

    Of a head's `d` dimensions height and width get `2 * (d // 6)` each and time the rest (44/42/42 of 128), with
    base 10000 per axis (Wan 2.1). Computed in float64.
    """
    spatial = 2 * (head_dim // 6)
    angles = []
    for axis, (count, dim) in enumerate([(num_latents, head_dim - 2 * spatial), (height, spatial), (width, spatial)]):
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * frequencies
        shape = [1, 1, 1, dim // 2]
        shape[axis] = count
        angles.append(angle.view(shape).expand(num_latents, height, width, -1))
    angle = torch.cat(angles, -1).flatten(0, 2)[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    turn = torch.complex(cos, sin)
    if not for_training:
        return Rotation(turn)
    quarter = torch.kron(torch.eye(head_dim // 2), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])).to(device)
    return Rotation(turn, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), quarter)


def rotate(x: Tensor, turn: Rotation, start: int = 0) -> Tensor:
    """Turn each pair of neighbouring features of `x` (b, tokens, n, d) by the angle of token `start + its index`.

    In training without complex numbers, which compilers cannot fuse and whose gradients are slow: (a, b) becomes
    (-b, a) by a product that is exact, since numbers that lie apart in memory are slow to a CPU.
    """
    stop = start + x.shape[1]
    if turn.quarter is not None:
        turned = (x @ turn.quarter.type_as(x)).float()
        return (x.float() * turn.cos[start:stop] + turned * turn.sin[start:stop]).type_as(x)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn.turn[start:stop]).flatten(-2).type_as(x)


Rotate = Callable[[Tensor, Rotation, int], Tensor]
"""`rotate`, or what does the same."""


def join(pieces: Sequence[KV], turn: Rotation, by: Rotate = rotate) -> tuple[Tensor, Tensor]:
    """Features one behind the other, the keys turned by their place among them: each (b, tokens, n, d)."""
    keys, values = ([part.flatten(1, 2) for part in parts] for parts in zip(*pieces, strict=True))
    if len(pieces) == 1:
        return by(keys[0], turn, 0), values[0]
    return by(torch.cat(keys, 1), turn, 0), torch.cat(values, 1)


def look(
    query: Tensor, own: KV, sight: Sight, turn: Rotation, visible: "Tensor | BlockMask | None" = None,
    by: Rotate = rotate,
) -> Tensor:  # fmt: skip
    """Self-attention of those latents of a pass that a sight is for: queries (b, f, s, n, d) to (b, tokens, n, d).

    `query` and `own` are of the whole pass; positions count from the first latent seen.
    """
    asked = query[:, sight.start : sight.stop].flatten(1, 2)
    seen = [*sight.before, own.narrow(sight.own, sight.stop), *sight.after]
    return attend(by(asked, turn, sight.num_before * query.shape[2]), *join(seen, turn, by), visible)


def visible_in(mask: Tensor, tokens_per_latent: int, device: torch.device) -> "Tensor | BlockMask":
    """What `attend` takes for a mask (latents, latents) that is True where a latent may see another.

    On a GPU that is a flex attention's block mask, which skips what is hidden and keeps no score; elsewhere 0 or minus
    infinity for each pair of tokens, to be added to scores.
    """
    mask = mask.to(device)
    if device.type == "cuda":
        return block_mask(mask, tokens_per_latent)
    seen = mask.repeat_interleave(tokens_per_latent, 0).repeat_interleave(tokens_per_latent, 1)
    return torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))


def block_mask(mask: Tensor, tokens_per_latent: int) -> "BlockMask":
    """The same for flex attention, on the mask's device."""

    def may_see(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[query // tokens_per_latent, key // tokens_per_latent]

    queries, keys = (size * tokens_per_latent for size in mask.shape)
    return _flex("create_block_mask")(may_see, None, None, queries, keys, device=mask.device)


@cache
def _flex(name: str) -> Callable:
    """One of torch's functions of flex attention, compiled where there is a GPU: else it would keep all scores."""
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function) if torch.cuda.is_available() else function


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: "Tensor | BlockMask | None" = None) -> Tensor:
    """Softmax attention; all (b, tokens, n, d). `visible`, of `visible_in`, is for training only.

    Trained on a CPU it is written out: the gradient of the fused kernel is slow there.
    """
    heads_first = [x.transpose(1, 2) for x in (query, keys, values)]
    if query.requires_grad and query.device.type == "cpu":
        q, k, v = heads_first
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if visible is not None:
            scores = scores + visible
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    if visible is None or isinstance(visible, Tensor):
        bias = None if visible is None else visible.to(query.dtype)
        return F.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)
    return _flex("flex_attention")(*heads_first, block_mask=visible).transpose(1, 2)
