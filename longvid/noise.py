"""Noise addressed, never drawn in order: eps = f(seed, block[, step]), the same on every process and device.

Each address is hashed to the 128-bit key of its own counter-based generator (Philox, Salmon et al., SC 2011). torch's
CPU generator is not used: it keeps 32 bits of its seed, which is few enough for two blocks of a long video to collide.
Everything is drawn on the CPU; the caller moves it to a device.
"""

from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch

from longvid.types import Latents


def block_noise(seed: int, block: int, shape: tuple[int, ...], step: int | None = None) -> Latents:
    """Standard normal noise of one block, float32 on the CPU, independent between addresses.

    `shape` is (1, c, f, h, w). `step` is given where a solver needs fresh noise at each step; None is the noise that
    the block begins with.
    """
    return torch.from_numpy(_generator("block", seed, block, step).standard_normal(shape, dtype=np.float32))


def coordinated_noise(seed: int, block: int, shape: tuple[int, ...], block_size: int, overlap: int) -> Latents:
    """DualParal's noise for a block to begin with: a pool of frames, permuted anew for each block.

    The pool is `block_size + overlap` frames of noise. The last `overlap` latents of block k-1 and block k together
    are always a permutation of it, so that no noise repeats within a window, while all blocks share it. With
    `overlap` 0 each block is a permutation of the same frames. Only the frames asked for are drawn.

    `shape` is (1, c, f, h, w). A block shorter than `block_size` takes the last f of its latents; block 0 may be
    longer, up to the whole pool. float32 on the CPU.

    Source: DualParal (arXiv 2505.21070), coordinated noise initialisation.
    Raises ValueError if overlap is not within 0 and block_size, or if the block is longer than said.
    """
    batch, channels, num_latents, height, width = shape
    assert batch == 1 and block >= 0, f"shape {shape} and block {block}: one video, blocks from 0"
    if not 0 <= overlap <= block_size:
        raise ValueError(f"overlap={overlap} must be between 0 and block_size={block_size}; try {block_size // 2}")
    longest = block_size if block else block_size + overlap
    if not 0 < num_latents <= longest:
        raise ValueError(f"block {block} of {num_latents} latents: its noise is for 1 to {longest}; try {block_size}")
    noise = np.empty((channels, num_latents, height, width), dtype=np.float32)
    for latent, frame in enumerate(_pool_order(seed, block, block_size, overlap)[-num_latents:]):
        noise[:, latent] = _generator("pool", seed, frame).standard_normal((channels, height, width), dtype=np.float32)
    return torch.from_numpy(noise)[None]


@lru_cache(maxsize=1024)
def _pool_order(seed: int, block: int, block_size: int, overlap: int) -> tuple[int, ...]:
    """The pool's frames as block `block` finds them: `overlap` of the block before, then its own `block_size`.

    Walks from the block whose number lacks the lowest set bit of this one. So a walk over n blocks takes n log n
    steps in any order, a jump to block n takes n, and neither recurses deeper than the bits of n.
    """
    if block == 0:
        return tuple(range(block_size + overlap))
    start = block & (block - 1)
    order = _pool_order(seed, start, block_size, overlap)
    for k in range(start + 1, block + 1):
        others = order[:block_size]
        shuffled = (others[i] for i in _generator("order", seed, k).permutation(block_size))
        order = (*order[block_size:], *shuffled)
    return order


def _generator(*address: str | int | None) -> np.random.Generator:
    key = blake2b("/".join(map(str, address)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
