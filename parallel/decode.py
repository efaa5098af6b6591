"""The VAE's decoder cut in two: its front on the process that the grid names, its back on the head.

Which block is decoded between which passes follows from the plan (`parallel.cost.decoding_order`), so both ends know
what comes next, and neither waits for the other there. The pixels are those of `longvid.models.vae.VAE.decode`, to the
bit. Blocks that are there before the first pass (an image, the end of a video, what had left before a run was cut) are
decoded before it, one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from longvid.models.vae import VAE, VAEState
from longvid.plan import Plan
from longvid.types import Latents, Video
from parallel.cost import decoding_order, feeding_order
from parallel.execute import Stage
from parallel.link import Message

BEFORE = -1
"""In place of a pass: before the first."""


def blocks_before(plan: Plan, start: int) -> list[int]:
    """The blocks that are there before the pass `start`: those ready from the beginning, and those that have left."""
    return [*range(plan.num_ready), *(block for p in plan.passes[:start] for block in p.emits)]


class _Part:
    """What both have: their links, the states of each video, and the blocks due by pass, for a run from `start` on."""

    def __init__(self, vae: VAE, stage: Stage, plan: Plan, start: int, size: tuple[int, int, int]):
        self.vae, self.plan, self.size = vae, plan, size
        self.source, self.target = stage.decoding
        self.due = {BEFORE: blocks_before(plan, start), **decoding_order(plan, stage.grid, start)}
        self.states: dict[int, VAEState] = {}
        self.source.expect(self._messages())

    def _blocks(self) -> Iterator[int]:
        """All blocks, in the order in which they are decoded."""
        return (block for i in sorted(self.due) for block in self.due[i])

    def _video(self, block: int) -> int:
        return self.plan.address(block)[0]

    def _latents_of(self, block: int) -> tuple[int, ...]:
        return 1, self.size[0], self.plan.block_sizes[block], *self.size[1:]

    def _messages(self) -> Iterator[Message]:
        """What comes from the other part."""
        raise NotImplementedError


class Front(_Part):
    """The front: latents come, features go. `during` is entered for what it computes of a block."""

    def __init__(
        self,
        vae: VAE,
        stage: Stage,
        plan: Plan,
        start: int,
        size: tuple[int, int, int],
        during: Callable[[int], AbstractContextManager] = lambda block: nullcontext(),
    ):
        super().__init__(vae, stage, plan, start, size)
        self.during, self.order = during, [*feeding_order(plan), len(plan.passes) - 1]

    def compute(self, i: int) -> None:
        """What is due before the pass `i`; after the last that is what is left."""
        index, arrived = (i, i) if i == BEFORE else (i + 1, self.order[i])
        for block in self.due.get(i, ()):
            latents, video = self.source.receive(), self._video(block)
            with self.during(block):
                for piece in self.vae.decode_front(latents, self.states.get(video)):
                    features, self.states[video] = piece
                    self.target.send(features, index, arrived)

    def _messages(self) -> Iterator[Message]:
        return ((self._latents_of(block), torch.float32) for block in self._blocks())


class Back(_Part):
    """The back, on the head: latents are put, pixels taken as soon as `parallel.execute.carry_out` says."""

    def __init__(self, vae: VAE, stage: Stage, plan: Plan, start: int, size: tuple[int, int, int]):
        super().__init__(vae, stage, plan, start, size)
        self.due_at = {block: i for i, blocks in self.due.items() for block in blocks}
        self.left_at = dict.fromkeys(self.due[BEFORE], BEFORE)
        self.left_at |= {block: i for i, p in enumerate(plan.passes[start:], start) for block in p.emits}

    def put(self, block: int, latents: Latents) -> None:
        """Send a block that has left."""
        self.target.send(latents.float(), self.due_at[block], self.left_at[block])

    def take(self, block: int) -> Video:
        """Its pixels, float32 in [-1, 1]."""
        video = self._video(block)
        features = (self.source.receive() for _ in self._features_of(block, is_start=video not in self.states))
        pixels, self.states[video] = self.vae.decode_back(features, self.states.get(video))
        return pixels

    def _features_of(self, block: int, *, is_start: bool) -> list[Message]:
        shapes, dtype = self.vae.features_of(self._latents_of(block), is_start=is_start)
        return [(shape, dtype) for shape in shapes]

    def _messages(self) -> Iterator[Message]:
        met: set[int] = set()
        for block in self._blocks():
            yield from self._features_of(block, is_start=self._video(block) not in met)
            met.add(self._video(block))


class Whole:
    """The decoder on one process, with the same verbs."""

    def __init__(self, vae: VAE, plan: Plan):
        self.vae, self.plan = vae, plan
        self.latents: dict[int, Latents] = {}
        self.states: dict[int, VAEState] = {}

    def put(self, block: int, latents: Latents) -> None:
        """Hold a block that has left."""
        self.latents[block] = latents

    def take(self, block: int) -> Video:
        """Its pixels, float32 in [-1, 1]."""
        video = self.plan.address(block)[0]
        pixels, self.states[video] = self.vae.decode(self.latents.pop(block), self.states.get(video))
        return pixels
