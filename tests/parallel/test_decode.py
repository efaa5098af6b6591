"""A decoder that is cut shows what a whole one shows, whatever the plan, and knows beforehand what will come."""

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from longvid.interleave import interleave
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.plan import make_plan
from parallel.cost import decoding_order, feeding_order
from parallel.decode import BEFORE, Back, Front, Whole, blocks_before
from parallel.grid import Grid
from pipelines.methods import METHODS

SIZE = (4, 2, 3)
GRIDS = [Grid(num_stages=3, cuts_decoder=True), Grid(num_stages=1, num_lanes=2, cuts_decoder=True),
         Grid(num_stages=3, cuts_decoder=True, decode_lag=2)]  # fmt: skip


class Link:
    """Both ends of a link, which holds a message to what was expected of it and keeps what may be under way."""

    def __init__(self):
        self.coming, self.expected, self.held, self.most = deque(), iter(()), [], 0

    def expect(self, messages):
        self.expected = iter(messages)

    def send(self, x, index, arrived):
        assert not self.held or index >= self.held[-1]
        self.held = [i for i in self.held if i > arrived] + [index]
        self.most = max(self.most, len(self.held))
        self.coming.append(x)

    def receive(self):
        x = self.coming.popleft()
        assert (tuple(x.shape), x.dtype) == next(self.expected)
        return x


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = VAEConfig(base_dim=4, z_dim=SIZE[0], dim_mult=(1, 1, 1), num_res_blocks=1,
                       temperal_downsample=(True, True), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)  # fmt: skip
    return VAE(config).eval().requires_grad_(False)


def plans():
    for name, preset in METHODS.items():
        yield name, make_plan(preset(num_steps=3), 22)
    yield "extension", make_plan(METHODS["rolling"](num_steps=3), 22, (3, 3))
    yield "several", interleave(make_plan(METHODS["rolling"](num_steps=3), 10), 3, 2)


@pytest.mark.parametrize("grid", GRIDS, ids=["stages", "lanes", "stages, later"])
@pytest.mark.parametrize("name, plan", plans(), ids=[name for name, _ in plans()])
@pytest.mark.parametrize("begun", [0.0, 0.6])
def test_it_shows_what_a_whole_decoder_shows(vae, grid, name, plan, begun):
    start = int(begun * len(plan.passes))
    there, back_again = Link(), Link()
    stages = [SimpleNamespace(grid=grid, decoding=pair) for pair in ((there, back_again), (back_again, there))]
    back, front = Back(vae, stages[0], plan, start, SIZE), Front(vae, stages[1], plan, start, SIZE)
    whole, due = Whole(vae, plan), decoding_order(plan, grid, start)
    shown = {}
    latents = [torch.randn(1, SIZE[0], size, *SIZE[1:]) for size in plan.block_sizes]
    for block in blocks_before(plan, start):
        front.put(block, latents[block])
    back.compute(BEFORE)
    shown |= {block: front.take(block) for block in blocks_before(plan, start)}
    for i, p in enumerate(plan.passes[start:], start):
        back.compute(i)
        for block in p.emits:
            front.put(block, latents[block])
        shown |= {block: front.take(block) for block in due.get(i, ())}
    back.compute(len(plan.passes))
    shown |= {block: front.take(block) for block in due[len(plan.passes)]}
    assert sorted(shown) == list(range(len(plan.block_sizes)))
    for block, frames in shown.items():
        whole.put(block, latents[block])
        assert torch.equal(frames, whole.take(block)), block
    assert not there.coming and not back_again.coming and not list(back_again.expected) and not list(there.expected)


def test_what_is_under_way_does_not_grow_with_the_video(vae):
    most = []
    for num_latents in (40, 100):
        plan, grid = make_plan(METHODS["rolling"](num_steps=3), num_latents), GRIDS[0]
        there, back_again = Link(), Link()
        stages = [SimpleNamespace(grid=grid, decoding=pair) for pair in ((there, back_again), (back_again, there))]
        back, front = Back(vae, stages[0], plan, 0, SIZE), Front(vae, stages[1], plan, 0, SIZE)
        due = decoding_order(plan, grid)
        for i, p in enumerate(plan.passes):
            back.compute(i)
            for block in p.emits:
                front.put(block, torch.randn(1, SIZE[0], plan.block_sizes[block], *SIZE[1:]))
            for block in due.get(i, ()):
                front.take(block)
        most.append((there.most, back_again.most))
    ahead = max(i - done for i, done in enumerate(feeding_order(plan)))
    assert most[0] == most[1] and max(most[0]) <= 3 * ahead
