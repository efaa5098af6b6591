"""The VAE's decoder cut in two: its front on the head, its back on the process that the grid names.

The head computes the front of a block as it leaves. Before which pass its back is computed elsewhere follows from the
plan (`parallel.cost.decoding_order`), so both ends know what comes next, and neither waits for the other there. The
frames are those of `longvid.models.vae.VAE.decode`, to the bit. Blocks that are there before the first pass (an image,
the end of a video, what had left before a run was cut) are decoded before it, one by one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from longvid.frames import to_frames
from longvid.models.vae import VAE, VAEState
from longvid.plan import Plan
from longvid.types import Latents
from parallel.cost import decoding_order
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
        self.left_at = dict.fromkeys(self.due[BEFORE], BEFORE)
        self.left_at |= {block: i for i, p in enumerate(plan.passes[start:], start) for block in p.emits}
        self.states: dict[int, VAEState] = {}
        self.source.expect(self._messages())

    def _features_of(self, block: int, *, is_start: bool) -> list[Message]:
        """What the front hands on of a block, piece by piece."""
        shapes, dtype = self.vae.features_of((1, self.size[0], self.plan.block_sizes[block], *self.size[1:]),
                                             is_start=is_start)  # fmt: skip
        return [(shape, dtype) for shape in shapes]

    def _all_features(self) -> Iterator[list[Message]]:
        """The same of every block, in the order in which they are decoded."""
        met: set[int] = set()
        for block in (block for i in sorted(self.due) for block in self.due[i]):
            video = self.plan.address(block)[0]
            yield self._features_of(block, is_start=video not in met)
            met.add(video)

    def _messages(self) -> Iterator[Message]:
        """What comes from the other part."""
        raise NotImplementedError


class Front(_Part):
    """The front, on the head: a block is put as it leaves, its frames taken when `parallel.execute.carry_out` says."""

    def __init__(self, vae: VAE, stage: Stage, plan: Plan, start: int, size: tuple[int, int, int]):
        super().__init__(vae, stage, plan, start, size)
        self.due_at = {block: i for i, blocks in self.due.items() for block in blocks}

    def put(self, block: int, latents: Latents) -> None:
        """Compute the front of a block that has left, and hand on what comes of it."""
        video = self.plan.address(block)[0]
        for features, state in self.vae.decode_front(latents, self.states.get(video)):
            self.target.send(features, self.due_at[block], self.left_at[block])
            self.states[video] = state

    def take(self, block: int) -> Tensor:
        """Its frames, uint8 (n, height, width, 3)."""
        return self.source.receive()

    def _messages(self) -> Iterator[Message]:
        for features in self._all_features():
            num_frames, (_, _, height, width, _) = sum(shape[1] for shape, _ in features), features[0][0]
            patch = self.vae.config.patch_size or 1
            yield (num_frames, height * patch, width * patch, 3), torch.uint8


class Back(_Part):
    """The back: features come, frames go. `during` is entered for what it computes of a block."""

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
        self.during = during

    def compute(self, i: int) -> None:
        """What is due before the pass `i`; after the last that is what is left.

        What comes of a block tells that frames due at passes before it left have arrived.
        """
        index = i if i == BEFORE else i + 1
        for block in self.due.get(i, ()):
            video = self.plan.address(block)[0]
            come = self._features_of(block, is_start=video not in self.states)
            features = [self.source.receive() for _ in come]
            with self.during(block):
                pixels, self.states[video] = self.vae.decode_back(features, self.states.get(video))
                frames = to_frames(pixels)[0]
            self.target.send(frames, index, self.left_at[block])

    def _messages(self) -> Iterator[Message]:
        return (piece for features in self._all_features() for piece in features)


class Whole:
    """The decoder on one process, with the verbs of `Front`."""

    def __init__(self, vae: VAE, plan: Plan):
        self.vae, self.plan = vae, plan
        self.frames: dict[int, Tensor] = {}
        self.states: dict[int, VAEState] = {}

    def put(self, block: int, latents: Latents) -> None:
        """Decode a block that has left."""
        video = self.plan.address(block)[0]
        pixels, self.states[video] = self.vae.decode(latents, self.states.get(video))
        self.frames[block] = to_frames(pixels)[0]

    def take(self, block: int) -> Tensor:
        """Its frames, uint8 (n, height, width, 3)."""
        return self.frames.pop(block)
