"""Noise schedules, and the names of solvers and noises. Plain Python: knows no tensor, so a plan can hold it.

A level sigma is the weight of the noise in `x = (1 - sigma) x0 + sigma eps`. A schedule is the list of levels that
every block walks down, one step at a time, and the timestep that the model is told at each.
"""

import math
import struct
from dataclasses import dataclass
from enum import StrEnum

NUM_TRAIN_TIMESTEPS = 1000
"""Timesteps are levels in thousandths, in every model of the Wan family."""


class Solver(StrEnum):
    """How a block goes from one level to the next."""

    EULER = "euler"
    UNIPC = "unipc"
    RENOISE = "renoise"

    @property
    def needs_noise(self) -> bool:
        """Whether a step, the last one excepted, mixes in fresh noise."""
        return self is Solver.RENOISE


class Noise(StrEnum):
    """Where the noise of a new block comes from."""

    IID = "iid"
    COORDINATED = "coordinated"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The levels of one block, from noise to clean.

    `levels` has `num_steps + 1` entries in [0, 1], strictly decreasing, the last 0: a block that has taken k steps is
    at `levels[k]`. `timesteps` has as many: what the model is told at that level, in thousandths, the last 0.

    Raises ValueError if the two do not say so.
    """

    levels: tuple[float, ...]
    timesteps: tuple[float, ...]

    def __post_init__(self):
        if len(self.levels) < 2 or len(self.timesteps) != len(self.levels):
            raise ValueError(
                f"{len(self.levels)} levels and {len(self.timesteps)} timesteps: both must count num_steps + 1, "
                "at least 2; try levels=(1.0, 0.0), timesteps=(1000.0, 0.0)"
            )
        if self.levels[-1] != 0 or self.timesteps[-1] != 0:
            raise ValueError(
                f"a schedule ends with level {self.levels[-1]} and timestep {self.timesteps[-1]}: both must be 0, clean"
            )
        falls = all(a > b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not falls or self.levels[0] > 1:
            raise ValueError(
                f"levels {self.levels} must fall from at most 1, each below the one before; try fewer steps or shift=5"
            )

    @property
    def num_steps(self) -> int:
        """Steps from noise to clean."""
        return len(self.levels) - 1


def shift_level(level: float, shift: float) -> float:
    """sigma' = s sigma / (1 + (s - 1) sigma): s > 1 spends more steps at high noise. Keeps 0 and 1.

    Source: Stable Diffusion 3 (arXiv 2403.03206), section 5.3.2, eq. 23.
    """
    return shift * level / (1 + (shift - 1) * level)


def wan_schedule(num_steps: int, shift: float) -> Schedule:
    """The schedule of Wan and SkyReels-V2 in diffusers (UniPC with flow sigmas), number for number.

    Base levels go from 1 to 1/1000 in `num_steps + 1` equal parts, without the last; the first is kept 1e-6 below 1,
    where log(1 - sigma) is finite. Levels are float32 numbers, as in the reference: near 1 the rounding moves the
    first log-SNR by 0.013, which UniPC's second step shows. Timesteps are whole.

    Raises ValueError if num_steps < 1 or shift is not positive and finite.
    """
    _check(num_steps, shift)
    step = (1 / NUM_TRAIN_TIMESTEPS - 1) / num_steps
    levels = [shift_level(k * step + 1, shift) for k in range(num_steps)]
    levels[0] -= 1e-6
    return _rounded(levels)


def skyreels_schedule(num_steps: int, shift: float) -> Schedule:
    """The schedule of the original SkyReels-V2 and Wan2.1 releases: base levels from 0.999 to 0, without the last.

    Differs from `wan_schedule` by up to a few timesteps near the end. Levels are float32 numbers, timesteps whole.

    Raises ValueError if num_steps < 1 or shift is not positive and finite.
    """
    _check(num_steps, shift)
    first = _float32(0.999)
    return _rounded([shift_level(k * (-first / num_steps) + first, shift) for k in range(num_steps)])


def uniform_schedule(num_steps: int, shift: float) -> Schedule:
    """Shifted levels of 1 - k / num_steps; timesteps are 1000 sigma, not rounded.

    The schedule of few-step distilled models: Self-Forcing (arXiv 2506.08009) and Rolling Forcing (arXiv 2509.25161),
    whose 5 steps at shift 5 are told 1000, 952.381, 882.353, 769.231, 555.556.

    Raises ValueError if num_steps < 1 or shift is not positive and finite.
    """
    _check(num_steps, shift)
    levels = tuple(shift_level(1 - k / num_steps, shift) for k in range(num_steps + 1))
    return Schedule(levels=levels, timesteps=tuple(NUM_TRAIN_TIMESTEPS * level for level in levels))


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1; try 30")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift={shift} must be a positive finite number; try 5.0")


def _rounded(levels: list[float]) -> Schedule:
    """Levels to float32, timesteps down to whole numbers, and the clean end appended."""
    timesteps = tuple(float(math.floor(NUM_TRAIN_TIMESTEPS * level)) for level in levels)
    return Schedule(levels=(*map(_float32, levels), 0.0), timesteps=(*timesteps, 0.0))


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]
