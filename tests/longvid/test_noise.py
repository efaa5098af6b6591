"""Noise by address: the same everywhere, in any order, independent, normal; and DualParal's pool."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from longvid.noise import _pool_order, block_noise, coordinated_noise

SHAPE = (1, 4, 3, 8, 8)
POOLS = [(8, 8), (10, 5), (3, 0), (4, 2), (1, 1), (1, 0)]


def frame_ids(noise, pool):
    """Which frame of the pool each latent is; every latent must be one, bit for bit."""
    matches = (noise[0].unsqueeze(2) == pool[0].unsqueeze(1)).all(dim=-1).all(dim=-1).all(dim=0)
    assert (matches.sum(dim=1) == 1).all()
    return matches.int().argmax(dim=1).tolist()


def blocks(block_size, overlap, num_blocks, seed=3):
    """The pool, and for each block the frames of the pool it got."""
    pool = coordinated_noise(seed, 0, (1, 2, block_size + overlap, 4, 4), block_size, overlap)
    shape = (1, 2, block_size, 4, 4)
    got = [coordinated_noise(seed, k, shape, block_size, overlap) for k in range(num_blocks)]
    return pool, [frame_ids(noise, pool) for noise in got]


# Addresses ------------------------------------------------------------------------------------------------------------


def test_an_address_has_one_noise_whatever_was_drawn_before():
    first = block_noise(7, 2, SHAPE)
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    others = [block_noise(7, k, SHAPE, step) for k in (5, 2, 0) for step in (1, 0)]
    assert torch.equal(block_noise(7, 2, SHAPE), first) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(block_noise(7, 2, SHAPE, step=1), others[2])
    assert first.shape == SHAPE and first.dtype == torch.float32 and first.device.type == "cpu"
    assert torch.equal(block_noise(np.int64(7), np.int64(2), SHAPE), first)


def test_another_process_draws_the_same():
    code = (
        "import sys, longvid.noise as n; sys.stdout.buffer.write(bytes(n.block_noise(7, 2, (1, 4, 3, 8, 8)).numpy()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == bytes(block_noise(7, 2, SHAPE).numpy())


def test_the_numbers_are_pinned():
    """A video is a function of its seed: changing these numbers changes every video."""
    noise = block_noise(0, 0, (1, 1, 1, 1, 4)).flatten().tolist()
    assert noise == pytest.approx([-0.38186797, -0.67988050, 1.76865852, 1.95445812], abs=1e-7)
    assert _pool_order(0, 3, 4, 2) == (2, 5, 4, 1, 0, 3)


def test_addresses_are_uncorrelated_and_normal():
    shape, count = (1, 4, 3, 16, 16), 4 * 3 * 16 * 16
    addresses = [(seed, block, step) for seed in (0, 1, 2**32, 2**63) for block in (0, 1, 11) for step in (None, 0, 1)]
    noise = torch.stack([block_noise(s, b, shape, step).flatten() for s, b, step in addresses]).double()
    # Over n normals the mean has deviation 1/sqrt(n), the sum of squares is chi-square of n: n, deviation sqrt(2n).
    assert (noise.mean(dim=1).abs() < 5 / math.sqrt(count)).all()
    assert ((noise**2).sum(dim=1) - count).abs().max() < 5 * math.sqrt(2 * count)
    correlation = noise @ noise.T / count - torch.eye(len(addresses))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(count)
    pooled = noise.flatten().sort().values
    steps = (torch.arange(len(pooled)) + 0.5) / len(pooled)
    distance = (torch.special.ndtr(pooled) - steps).abs().max().item()  # Kolmogorov-Smirnov
    assert distance < 2.2 / math.sqrt(len(pooled))


# The pool -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size, overlap", POOLS)
def test_overlap_and_block_are_a_permutation_of_the_pool(block_size, overlap):
    _, ids = blocks(block_size, overlap, 30)
    for before, block in zip(ids, ids[1:], strict=False):
        assert sorted(before[block_size - overlap :] + block) == list(range(block_size + overlap))


@pytest.mark.parametrize("block_size, overlap", [(8, 8), (10, 5), (4, 2)])
def test_blocks_are_shuffled_and_every_frame_is_reused(block_size, overlap):
    _, ids = blocks(block_size, overlap, 30)
    assert len({tuple(block) for block in ids}) > 25
    for frame in range(block_size + overlap):
        assert sum(frame in block for block in ids) >= 5


def test_permutations_are_uniform():
    """With no overlap the first frame of a block is any of three, equally often: chi-square of 2, 0.1 % beyond 13.8."""
    counts = torch.bincount(torch.tensor([_pool_order(1, k, 3, 0)[0] for k in range(1, 901)]), minlength=3)
    assert ((counts - 300.0) ** 2 / 300).sum() < 13.8


def test_the_pool_is_independent_normal_and_of_its_seed():
    shape, count = (1, 4, 16, 16, 16), 4 * 16 * 16
    pools = torch.cat([coordinated_noise(seed, 0, shape, 8, 8) for seed in (0, 1)], dim=2)
    frames = pools[0].transpose(0, 1).flatten(1).double()
    gram = frames @ frames.T / count - torch.eye(32)
    assert gram.fill_diagonal_(0).abs().max() < 5 / math.sqrt(count)
    assert (frames.mean(dim=1).abs() < 5 / math.sqrt(count)).all()
    assert ((frames**2).sum(dim=1) - count).abs().max() < 5 * math.sqrt(2 * count)


def test_coordinated_noise_does_not_depend_on_the_order_of_calls():
    shape = (1, 2, 4, 4, 4)
    forward = [coordinated_noise(5, k, shape, 4, 2) for k in range(20)]
    _pool_order.cache_clear()
    for k in (13, 2, 19, 7, 0):
        assert torch.equal(coordinated_noise(5, k, shape, 4, 2), forward[k])


def test_a_far_block_is_reached_without_deep_recursion():
    _pool_order.cache_clear()
    assert sorted(_pool_order(0, 4095, 4, 2)) == list(range(6))


def test_short_blocks_take_the_last_and_the_first_may_take_all():
    full = coordinated_noise(0, 5, (1, 2, 8, 4, 4), 8, 3)
    short = coordinated_noise(0, 5, (1, 2, 5, 4, 4), 8, 3)
    assert torch.equal(short, full[:, :, -5:])
    pool = coordinated_noise(0, 0, (1, 2, 11, 4, 4), 8, 3)
    assert frame_ids(pool, pool) == list(range(11))
    assert torch.equal(coordinated_noise(0, 0, (1, 2, 8, 4, 4), 8, 3), pool[:, :, 3:])


@pytest.mark.parametrize(
    "block, num_latents, block_size, overlap, said",
    [
        (1, 4, 4, 5, "overlap=5"),
        (1, 4, 4, -1, "overlap=-1"),
        (0, 7, 4, 2, "block 0 of 7 latents"),
        (1, 5, 4, 2, "block 1 of 5 latents"),
        (1, 0, 4, 2, "block 1 of 0 latents"),
    ],
)
def test_errors_say_what_was_given(block, num_latents, block_size, overlap, said):
    with pytest.raises(ValueError, match=said):
        coordinated_noise(0, block, (1, 2, num_latents, 4, 4), block_size, overlap)
