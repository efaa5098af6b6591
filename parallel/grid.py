"""Degrees of parallelism, checked, and which process is where. Plain Python."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a process does: one stage of the layers, for one lane of guidance, or for all (`lane` None)."""

    stage: int
    lane: int | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Stages of layers by lanes of guidance; with one lane a process runs the passes of all of them.

    Rank 0, on the first machine, is the head: the last stage of lane 0, which holds latents, noise and solver state,
    decodes, and writes files.
    """

    num_stages: int
    num_lanes: int = 1

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_stages * self.num_lanes

    def place(self, rank: int) -> Place:
        """Where a process is."""
        lane, stage = divmod(rank, self.num_stages)
        if lane == 0:  # the head first, then the stages before it
            stage = (stage - 1) % self.num_stages
        return Place(stage=stage, lane=None if self.num_lanes == 1 else lane)

    def rank(self, lane: int, stage: int) -> int:
        """The process there; `lane` is 0 where there is one for all."""
        return lane * self.num_stages + ((stage + 1) % self.num_stages if lane == 0 else stage)

    def edges(self) -> Iterator[tuple[int, int]]:
        """Pairs (from, to) of processes that send, in an order that all agree on.

        The head to the first stage of each lane, each stage to the next, and the last of other lanes to the head. A
        process sends nothing to itself.
        """
        for lane in range(self.num_lanes):
            chain = [0, *(self.rank(lane, stage) for stage in range(self.num_stages)), 0]
            pairs = list(zip(chain, chain[1:], strict=False))
            yield from (pair for pair in pairs if pair[0] != pair[1])


def make_grid(world_size: int, *, has_guidance: bool, num_layers: int, cfg_parallel: bool = False) -> Grid:
    """The layout of so many processes.

    Raises ValueError if lanes are to be spread where there is one, if they do not divide the processes, or if a stage
    would have no layer.
    """
    if cfg_parallel and not has_guidance:
        raise ValueError("cfg_parallel spreads the lanes of guidance, and a guidance scale of 1 has one; leave it out")
    if cfg_parallel and world_size % 2:
        raise ValueError(f"cfg_parallel needs an even number of processes, not {world_size}; try {world_size + 1}")
    num_lanes = 2 if cfg_parallel else 1
    num_stages = world_size // num_lanes
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"nproc={world_size} makes {num_stages} stages, and each keeps at least one of the model's {num_layers} "
            f"layers; use 1 to {num_layers * num_lanes} processes"
        )
    return Grid(num_stages=num_stages, num_lanes=num_lanes)
