"""Degrees of parallelism, checked, and which process is where. Plain Python.

Stages are ranges of layers (DualParal), bands are ranges of rows of patches of every latent (sequence parallelism,
Ulysses: outside attention a process has its rows, within it its heads), lanes are the forwards that guidance needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a process does: one stage of the layers, one band, for one lane of guidance, or for all (`lane` None)."""

    stage: int
    band: int
    lane: int | None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Stages of layers by bands of rows by lanes of guidance; with one lane a process runs the passes of all of them.

    Rank 0, on the first machine, is the head: the last stage of lane 0, first band, which holds latents, noise and
    solver state, decodes, and writes files. The bands of a stage are neighbours, since they exchange most. The VAE's
    decoder may be cut, too: then another process computes its back, and lets `decode_lag` of its passes go first.
    """

    num_stages: int
    num_bands: int = 1
    num_lanes: int = 1
    cuts_decoder: bool = False
    decode_lag: int = 0

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.num_stages * self.num_bands * self.num_lanes

    @property
    def back(self) -> int:
        """The process that computes the decoder's back: the head, unless it is cut, and then the head's twin for the
        other lane, or the first stage."""
        if not self.cuts_decoder:
            return 0
        return self.rank(1, self.num_stages - 1) if self.num_lanes > 1 else self.rank(0, 0)

    def place(self, rank: int) -> Place:
        """Where a process is."""
        rest, band = divmod(rank, self.num_bands)
        lane, stage = divmod(rest, self.num_stages)
        if lane == 0:  # the head first, then the stages before it
            stage = (stage - 1) % self.num_stages
        return Place(stage=stage, band=band, lane=None if self.num_lanes == 1 else lane)

    def rank(self, lane: int, stage: int, band: int = 0) -> int:
        """The process there; `lane` is 0 where there is one for all."""
        turned = (stage + 1) % self.num_stages if lane == 0 else stage
        return (lane * self.num_stages + turned) * self.num_bands + band

    def peers(self) -> Iterator[range]:
        """Ranks of the bands of each stage and lane, which exchange tokens for heads; in an order all agree on."""
        for first in range(0, self.world_size, self.num_bands):
            yield range(first, first + self.num_bands)

    def edges(self) -> Iterator[tuple[int, int]]:
        """Pairs (from, to) of processes that send, in an order that all agree on.

        The head to the first stage of each lane, each stage to the next, and the last of each to the head, band by
        band. A process sends nothing to itself.
        """
        for lane in range(self.num_lanes):
            for band in range(self.num_bands):
                chain = [0, *(self.rank(lane, stage, band) for stage in range(self.num_stages)), 0]
                pairs = list(zip(chain, chain[1:], strict=False))
                yield from (pair for pair in pairs if pair[0] != pair[1])


DECODE_LAGS = 4
"""How many lags are tried, from 0 on: which is best follows from how long passes and the decoder take."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model and a size of picture allow: `num_rows` are rows of patches, `num_lanes` what guidance needs."""

    num_layers: int
    num_heads: int
    num_rows: int
    num_lanes: int

    @property
    def bands(self) -> list[int]:
        """Numbers of bands that can be: they divide the heads, and each has a row."""
        return [k for k in range(1, min(self.num_heads, self.num_rows) + 1) if self.num_heads % k == 0]


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """What a user asks of a grid; None leaves it open."""

    stages: int | None = None
    sequence: int | None = None
    lanes: int | None = None
    cuts_decoder: bool | None = None


def cut_rows(num_rows: int, num_bands: int) -> tuple[int, ...]:
    """Rows of each band: as equal as can be, earlier ones have more."""
    least, more = divmod(num_rows, num_bands)
    return tuple(least + (band < more) for band in range(num_bands))


def row_ranges(num_rows: int, num_bands: int) -> list[range]:
    """The rows of each band."""
    stops = list(accumulate(cut_rows(num_rows, num_bands)))
    return [range(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def possible_grids(num_processes: int, limits: Limits, asked: Degrees, *, may_cut_rows: bool = False) -> list[Grid]:
    """The grids that so many processes can form, with what was asked; rows are cut only if asked for, or allowed.

    Those that cut the decoder come after those that are the same without. Raises ValueError if there is none.
    """
    _check_asked(limits, asked)
    lanes = [asked.lanes] if asked.lanes else list(range(1, limits.num_lanes + 1))
    bands = [asked.sequence] if asked.sequence else limits.bands if may_cut_rows else [1]
    stages = [asked.stages] if asked.stages else range(1, limits.num_layers + 1)
    found = [
        Grid(num_stages=s, num_bands=k, num_lanes=n)
        for k in bands for n in lanes for s in stages if s * k * n == num_processes
    ]  # fmt: skip
    if not found:
        raise ValueError(_why_none(num_processes, limits, asked, lanes, bands))
    able = [cut for grid in found for lag in range(DECODE_LAGS)
            if (cut := replace(grid, cuts_decoder=True, decode_lag=lag)).back]  # fmt: skip
    if asked.cuts_decoder and not able:
        raise ValueError("parallel_vae cuts the decoder between the head and another stage or lane, and there is none; "
                         "use --nproc 2 or more, or leave it out")  # fmt: skip
    return {True: able, False: found, None: found + able}[asked.cuts_decoder]


def _check_asked(limits: Limits, asked: Degrees) -> None:
    """Raise ValueError for a degree that no number of processes makes possible."""
    bands, stages = asked.sequence, asked.stages
    if asked.lanes == 2 and limits.num_lanes == 1:
        raise ValueError("cfg_parallel spreads the lanes of guidance, and a guidance scale of 1 has one; leave it out")
    if bands is not None and (bands < 1 or limits.num_heads % bands):
        able = [k for k in range(1, limits.num_heads + 1) if limits.num_heads % k == 0]
        raise ValueError(f"sequence_parallel={bands} must divide the model's {limits.num_heads} heads; use "
                         f"{_one_of(able)}")  # fmt: skip
    if bands is not None and bands > limits.num_rows:
        raise ValueError(f"sequence_parallel={bands} gives a row of patches to each process, and latents of this size "
                         f"have {limits.num_rows}; use {_one_of(limits.bands)}, or a greater --height")  # fmt: skip
    if stages is not None and not 1 <= stages <= limits.num_layers:
        raise ValueError(f"stages={stages}: each keeps at least one of the model's {limits.num_layers} layers; use 1 "
                         f"to {limits.num_layers}")  # fmt: skip


def _why_none(num_processes: int, limits: Limits, asked: Degrees, lanes: Sequence[int], bands: Sequence[int]) -> str:
    unit = bands[0] * (asked.lanes or 1)
    up = max(-(-num_processes // unit), 1) * unit
    if asked.stages:
        product = asked.stages * unit
        return (f"stages x sequence x lanes = {asked.stages} x {bands[0]} x {asked.lanes or 1} is {product}, not "
                f"nproc={num_processes}; give --nproc {product}, or leave one of them open")  # fmt: skip
    if num_processes >= 1 and num_processes % unit and asked.lanes == 2 and bands[0] == 1:
        return f"cfg_parallel needs an even number of processes, not {num_processes}; try {up}"
    if num_processes >= 1 and num_processes % unit:
        return f"nproc={num_processes} must be a multiple of sequence x lanes, {unit}; try {up}"
    most = limits.num_layers * max(lanes) * max(bands)
    return (f"nproc={num_processes} makes {num_processes // unit} stages, and each keeps at least one of the model's "
            f"{limits.num_layers} layers; use 1 to {most} processes")  # fmt: skip


def _one_of(numbers: Sequence[int]) -> str:
    """`1, 2 or 4`."""
    *front, last = map(str, numbers)
    return f"{', '.join(front)} or {last}" if front else last
