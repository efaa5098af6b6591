"""A method: one complete way of making a long video, as a frozen value. Plain Python, no tensor."""

import math
from dataclasses import dataclass
from enum import StrEnum

from longvid.schedule import Noise, Schedule, Solver, skyreels_schedule, uniform_schedule, wan_schedule


class Kind(StrEnum):
    """What a pass covers and sees."""

    CAUSAL = "causal"
    TWO_SIDED = "two-sided"
    JOINT = "joint"


class LevelRule(StrEnum):
    """Which published list of levels a method walks down."""

    WAN = "wan"
    SKYREELS = "skyreels"
    UNIFORM = "uniform"


NAMED = {"kind": Kind, "solver": Solver, "level_rule": LevelRule, "noise": Noise}
"""Fields of a method whose values have names."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A complete way of making a long video. Sizes and context are in latents.

    `sink`, `history`, `left` and `right` bound the context: the video's first latents, clean latents directly before,
    latents of cleaner neighbours still in the queue, latents of the noisier neighbour. `max_keys` bounds what one
    attention sees in all (0: no bound): the context shrinks until it fits beside the pass. With `first_steps` a video's
    first block is made in so many steps of its own before another begins, like an image that a video starts from; with
    0 it is a block as the others. Where passes are causal, `blocks_per_pass` neighbours go through the model together:
    they see what they would see one after the other, in larger matrices. `window` > 0 cuts the video into windows that
    each run a matrix of their own and share `overlap` clean latents with the one before; `condition_level` is the noise
    put on them.
    """

    name: str
    kind: Kind
    block_size: int
    first_block_size: int
    num_steps: int
    lag: int
    solver: Solver
    level_rule: LevelRule
    flow_shift: float
    guidance_scale: float
    noise: Noise = Noise.IID
    first_steps: int = 0
    sink: int = 0
    history: int = 0
    left: int = 0
    right: int = 0
    max_keys: int = 0
    blocks_per_pass: int = 1
    retire: bool = False
    retire_sees_sink: bool = True
    context_level: float = 0.0
    window: int = 0
    overlap: int = 0
    condition_level: float = 0.0

    def __post_init__(self):
        self._check_numbers()
        self._check_fit()
        self.schedule()

    def _check_numbers(self) -> None:
        for name, names in NAMED.items():
            value = getattr(self, name)
            if not isinstance(value, names):
                raise ValueError(f"{name}={value!r} must be a {names.__name__}: {', '.join(names)}")
        least = {"block_size": 1, "first_block_size": 1, "num_steps": 1, "blocks_per_pass": 1}
        for name in (*least, "lag", "first_steps", "sink", "history", "left", "right", "max_keys", "window", "overlap"):
            low = least.get(name, 0)
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {low}; try {max(low, 1)}")
        for name in ("guidance_scale", "context_level", "condition_level"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number; try 1.0")
        for name in ("context_level", "condition_level"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1; try 0.02")

    def _check_fit(self) -> None:
        """Raise ValueError where two numbers, each good by itself, do not go together."""
        if self.lag > self.num_steps:
            raise ValueError(f"lag={self.lag} must be at most num_steps={self.num_steps}; try {self.num_steps}")
        if self.window and self.first_steps:
            raise ValueError(f"first_steps={self.first_steps} is for videos in one matrix, this has windows; try 0")
        if self.blocks_per_pass > 1 and self.kind is not Kind.CAUSAL:
            raise ValueError(
                f"blocks_per_pass={self.blocks_per_pass} is for causal passes, not {self.kind} ones; try 1"
            )
        if self.window and self.kind is not Kind.JOINT:
            raise ValueError(f"window={self.window} is for joint passes, these are {self.kind}; try 0")
        if self.window and self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap} must be below window={self.window}; try {self.window // 5}")
        if self.max_keys and self.block_size >= self.max_keys:
            raise ValueError(f"block_size={self.block_size} leaves no context within max_keys={self.max_keys}; "
                             f"try block_size {max(1, self.max_keys // 7)}")  # fmt: skip
        if self.kind is Kind.TWO_SIDED and max(self.left, self.right) > self.block_size:
            context = max(self.left, self.right)
            raise ValueError(f"left and right context ({context} latents) must fit block_size={self.block_size}; "
                             f"try block_size {context}")  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict) -> "Method":
        """What `dataclasses.asdict` made of one, as JSON holds it. Raises as a method that is given so."""
        return cls(**{name: NAMED[name](value) if name in NAMED and value is not None else value
                      for name, value in values.items()})  # fmt: skip

    @property
    def num_lanes(self) -> int:
        """Forwards that guidance needs: with a scale of 1 the unconditional one is not computed."""
        return 1 if self.guidance_scale == 1 else 2

    def schedule(self, num_steps: int = 0) -> Schedule:
        """Levels and timesteps of the steps, or of another number of them."""
        num_steps = num_steps or self.num_steps
        match self.level_rule:
            case LevelRule.WAN:
                return wan_schedule(num_steps, self.flow_shift)
            case LevelRule.SKYREELS:
                return skyreels_schedule(num_steps, self.flow_shift)
            case LevelRule.UNIFORM:
                return uniform_schedule(num_steps, self.flow_shift)
