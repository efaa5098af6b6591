"""Distil a DiT into a student of few steps without guidance, on videos that the student itself makes.

Distribution matching (DMD, arXiv 2311.18828) over rollouts with the real sampler (Self-Forcing, arXiv 2506.08009;
Rolling Forcing, arXiv 2509.25161, section 3): no video is needed, only prompts. The teacher, with guidance, says where
what the student made should go; a critic, trained on what the student makes, says where it is; the student moves by
the difference. A share of the rollouts is block by block (a lag of as many ticks as steps), the rest rolls.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from longvid.flow import add_noise, denoise, guide, velocity_target
from longvid.levels import LevelSampler, block_causal_mask, draw_levels, per_latent
from longvid.method import Kind, Method
from longvid.models.cache import Context
from longvid.models.dit import DiT, Features, TextFeatures
from longvid.noise import block_noise
from longvid.passes import Pass
from longvid.plan import Plan, make_plan
from longvid.sampler import sample
from longvid.schedule import Noise
from longvid.types import Latents, Levels, Text, Timesteps
from pipelines.optimise import Engine, LoopConfig, alone, optimise
from pipelines.optimizers import WHOLE, Part, set_speed

LEAST, MOST = 0.02, 0.98
"""Levels between which teacher and critic are asked (Rolling Forcing's 20 and 980 of 1,000)."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """`loop.batch_size` rollouts a step, which the critic sees at `critic_draws` levels, the student's loss at one.

    Both move in every step, the student at `student_speed` times the learning rate, since the critic must keep up with
    it (two time scales, arXiv 1706.08500; DMD2, arXiv 2405.14867, and Rolling Forcing let the critic take 5 steps for
    one of the student, each on new rollouts, which are most of the work).
    `method` is how the student will be used, with a lag of at least 1. Rollouts are of one of `lengths` latents, and
    what teacher and critic see of one is its first block and its last ones, `clip` latents in all: as many as the
    teacher was trained on. `guidance_scale` is the teacher's; `levels` and `shift` say at which levels it is asked.
    """

    loop: LoopConfig
    method: Method
    latent_size: tuple[int, int, int]
    guidance_scale: float = 3.0
    student_speed: float = 0.2
    critic_draws: int = 2
    block_by_block_share: float = 0.5
    lengths: tuple[int, ...] = (10, 13, 16, 19)
    clip: int = 10
    levels: LevelSampler = LevelSampler.STAIRCASE
    shift: float = 4.0
    compile: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    fps: int = 24

    def __post_init__(self):
        method = self.method
        if not method.lag or method.window or method.noise is not Noise.IID:
            raise ValueError(f"method {method.name} cannot be distilled: blocks must enter one after the other, each "
                             "with noise of its own; try rolling-fast")  # fmt: skip
        if method.num_lanes > 1:
            raise ValueError(f"method {method.name} has guidance {method.guidance_scale}, and a student needs none; "
                             "try rolling-fast")  # fmt: skip
        if self.critic_draws < 1:
            raise ValueError(f"critic_draws={self.critic_draws} must be at least 1; try 2")
        if not self.student_speed > 0:
            raise ValueError(f"student_speed={self.student_speed} must be positive; try 0.2")
        if min(self.lengths) < self.clip:
            raise ValueError(f"lengths={self.lengths} must be at least clip={self.clip} latents")

    def sizes(self, plan: Plan) -> tuple[int, ...]:
        """Sizes of the blocks of the clip of a rollout: the first, and the last that fit."""
        sizes = list(plan.block_sizes)
        while sum(sizes) > self.clip:
            del sizes[1]
        return tuple(sizes)


class Witness:
    """Stands in for the student at the sampler, and keeps what it says of x0, with its gradient, once for each block.

    That is in every `num_steps`-th tick, `exit` of them: a block is in the queue for `num_steps` ticks, so windows of
    these ticks lie one behind the other and cover the video without overlap. Features carry no gradient.
    """

    def __init__(self, student: DiT, text: Text, num_steps: int, exit: int):
        self.student, self.num_steps, self.exit = student, num_steps, exit
        self.text, self.features, self.clean, self.current = text, {}, {}, None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The student's."""
        return self.student.parameters()

    def during(self, p: Pass) -> AbstractContextManager:
        """The sampler tells which pass comes next."""
        self.current = p
        return nullcontext()

    def __call__(
        self, x: Latents, timesteps: Timesteps, text: Text, context: Context, *, fps: int, keep: bool
    ) -> tuple[Latents, Features]:
        """A forward of the student."""
        p, is_seen = self.current, self.current.tick % self.num_steps == self.exit
        with torch.set_grad_enabled(is_seen):
            velocity, features = self.student(x, timesteps, self._read(), context, fps=fps, keep=keep)
            if is_seen:
                self._note(p, denoise(x, velocity.float(), (timesteps / 1000).expand(len(x), x.shape[2])))
        return velocity.detach(), {i: type(kv)(*(y.detach() for y in kv)) for i, kv in features.items()}

    def _note(self, p: Pass, clean: Latents) -> None:
        offset = 0
        for cover in p.covers:
            size = cover.stop - cover.start
            if cover.block in p.updates:
                self.clean[cover.block] = clean[:, :, offset : offset + size]
            offset += size

    def _read(self) -> TextFeatures:
        """Text features, computed once with a gradient and once without."""
        with_gradient = torch.is_grad_enabled()
        if with_gradient not in self.features:
            self.features[with_gradient] = self.student.text_features(self.text)
        return self.features[with_gradient]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Clips as the student sees them clean (b, c, f, h, w), which latents count (f,), and the sizes of their blocks."""

    clips: Latents
    counts: Tensor
    sizes: tuple[int, ...]

    def repeated(self, times: int) -> "Rollout":
        """The same clips so many times."""
        return replace(self, clips=self.clips.repeat(times, 1, 1, 1, 1))


def as_rolled_out(method: Method) -> Method:
    """The method with as many steps for a first block as for all others, so that a window has one of each."""
    return replace(method, first_steps=method.num_steps) if method.first_steps else method


def roll_out(config: Distillation, student: DiT, text: Text, rng: np.random.Generator, seeds: Sequence[int]) -> Rollout:
    """Videos of the texts (b, tokens, d), by the real sampler; `rng` draws length, kind, and where the gradient is."""
    is_block_by_block = rng.uniform() < config.block_by_block_share
    num_steps = config.method.num_steps
    method = as_rolled_out(config.method)
    plan = make_plan(replace(method, lag=num_steps) if is_block_by_block else method, int(rng.choice(config.lengths)))
    witness = Witness(student, text, num_steps, int(rng.integers(num_steps)))
    channels, height, width = config.latent_size

    def noise(block: int, step: int | None) -> Latents:
        shape = (1, channels, plan.block_sizes[block], height, width)
        return torch.cat([block_noise(seed, block, shape, step) for seed in seeds])

    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        for _ in sample(plan, witness, lambda p: text, noise, fps=config.fps, during=witness.during):
            pass
    whole = torch.cat([witness.clean[block] for block in range(len(plan.block_sizes))], 2)
    sizes = config.sizes(plan)
    counts = torch.ones(sum(sizes), dtype=torch.bool, device=whole.device)
    if len(sizes) < len(plan.block_sizes):  # a gap: what follows it has no past that teacher and critic can see
        counts[sizes[0] : sizes[0] + sizes[1]] = False
    clips = torch.cat([whole[:, :, : sizes[0]], whole[:, :, whole.shape[2] - sum(sizes[1:]) :]], 2)
    return Rollout(clips=clips, counts=counts, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What teacher and critic are asked: noise (b, c, f, h, w), a level per latent (b, f), the mask of attention."""

    noise: Latents
    levels: Levels
    mask: Tensor | None


def ask(config: Distillation, rollout: Rollout, rows: Sequence[np.random.Generator]) -> Question:
    """Levels and noise of each clip, drawn by a generator of its own."""
    shape = rollout.clips.shape[1:]
    levels = [per_latent(draw_levels(config.levels, rng, len(rollout.sizes)), rollout.sizes, config.shift)
              for rng in rows]  # fmt: skip
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))) for rng in rows]
    mask = None
    if config.method.kind is Kind.CAUSAL:
        mask = block_causal_mask(rollout.sizes).to(rollout.clips.device)
    return Question(noise=torch.stack(noise).to(rollout.clips.device), mask=mask,
                    levels=torch.stack(levels).clamp(LEAST, MOST).to(rollout.clips.device))  # fmt: skip


def velocity_of(
    config: Distillation, dit: DiT, noisy: Latents, question: Question, text: Text, scale: float = 1.0,
    negative: Text | None = None,
) -> Latents:  # fmt: skip
    """Velocity of clips (b, c, f, h, w) at the question's levels, guided if there is a negative text."""
    with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        lanes = [dit(noisy, 1000 * question.levels, dit.text_features(states), mask=question.mask, keep=False,
                     fps=config.fps)[0].float() for states in (text, negative) if states is not None]  # fmt: skip
    return lanes[0] if negative is None else guide(lanes[1], lanes[0], scale)


def critic_loss(config: Distillation, critic: DiT, rollout: Rollout, question: Question, text: Text) -> Tensor:
    """Flow matching on what the student has made: mean squared error of the velocity over the latents that count."""
    clips = rollout.clips.detach()
    velocity = velocity_of(config, critic, add_noise(clips, question.noise, question.levels), question, text)
    error = (velocity - velocity_target(clips, question.noise)).square().mean((1, 3, 4))
    return error[:, rollout.counts].mean()


def student_loss(
    config: Distillation, teacher: DiT, critic: DiT, rollout: Rollout, question: Question, text: Text, negative: Text
) -> Tensor:
    """Half the squared distance to where teacher and critic, by their difference, would have the clips go.

    Its gradient is (x0 of the critic - x0 of the teacher) / |x - x0 of the teacher|, the last a mean over each latent
    (DMD, equations 7 and 8).
    """
    clips, levels = rollout.clips, question.levels
    with torch.no_grad():
        noisy = add_noise(clips, question.noise, levels)
        real = denoise(noisy, velocity_of(config, teacher, noisy, question, text, config.guidance_scale, negative),
                       levels)  # fmt: skip
        fake = denoise(noisy, velocity_of(config, critic, noisy, question, text), levels)
        scale = (clips - real).abs().mean((1, 3, 4), keepdim=True).clamp(min=1e-3)
        target = clips - (fake - real) / scale
    return 0.5 * (clips - target).square().mean((1, 3, 4))[:, rollout.counts].mean()


def distill(
    config: Distillation, teacher: DiT, text: Callable[..., Text],
    prompts: Callable[[np.random.Generator, int], Sequence[str]], *, student: DiT | None = None,
    resume: bool = False, engine: Engine = alone, options: Mapping[str, str | int] = MappingProxyType({}),
) -> Iterator[dict]:  # fmt: skip
    """Train a student and its critic, both at first copies of `student`, or of the teacher, yielding log records.

    The last one holds the student as `distill`. `text` gives states of prompts, `prompts` draws some.
    """
    teacher = teacher.to(config.device).requires_grad_(False)
    start = teacher if student is None else student
    both = nn.ModuleDict({"student": deepcopy(start), "critic": deepcopy(start)}).requires_grad_(True)
    if config.compile:
        for layer in (*teacher.blocks.values(), *both["critic"].blocks.values()):
            layer.compile(dynamic=False)
    set_speed(both["student"].parameters(), config.student_speed)

    def loss_at(step: int, part: Part = WHOLE) -> dict[str, Tensor]:
        rng, rows = np.random.default_rng((config.loop.seed, step)), config.loop.batch_size
        said = part.of(prompts(rng, rows))
        addresses = part.of(list(range(rows)))
        states, negative = text(*said).to(config.device), text("").to(config.device).expand(len(said), -1, -1)
        seeds = part.of(rng.integers(2**31, size=rows).tolist())
        rollout = roll_out(config, both["student"], states, rng, seeds)
        generators = [np.random.default_rng((config.loop.seed, step, row)) for row in addresses]
        question = ask(config, rollout, generators)
        moves = student_loss(config, teacher, both["critic"], rollout, question, states, negative) / part.count
        seen = rollout.repeated(config.critic_draws)
        question = ask(config, seen, generators * config.critic_draws)
        knows = critic_loss(config, both["critic"], seen, question, states.repeat(config.critic_draws, 1, 1))
        knows = knows / part.count
        return {"loss": moves + knows, "student": moves, "critic": knows}

    yield from optimise(both.to(config.device), loss_at, config.loop, resume=resume, options=options, engine=engine)
    yield {"distill": both["student"]}
