"""Train the embedded model's DiT: flow matching with a level per block, block-causal or joint.

What is learned is the velocity of a film's noise, or what the model itself, as it was at the start, says of it with
guidance, so that one forward does for two.

A batch is of one of three kinds. Pictures are first latents alone, each at four levels of noise: that is where a model
learns to follow its text, and a step sees 256 of them. Openings are a first block and the next, which must begin to
move as the text says. Long clips are a sink, often a gap, and a run; they take their levels from rows of the rolling
matrix or at random per block. Most see context as causal inference does, some attend jointly, so that one model serves
both kinds of method. The prompt is dropped for a share of the clips, for guidance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from longvid.assignment import nearest_noise
from longvid.flow import add_noise, guide, velocity_target
from longvid.levels import LevelSampler, block_causal_mask, draw_levels, per_latent, soil
from longvid.models.dit import SKYREELS, DiT, DiTConfig
from longvid.multitask import Multitask
from longvid.types import Latents, Levels, Text
from longvid.weighting import first_latent_weight
from pipelines.film_latents import BLOCK, CLIP, LONG, OPENINGS, PICTURES, SINK, FilmLatents
from pipelines.memory import checkpoint_layers
from pipelines.objective import Objective, WithUncertainty, combined_loss, edges_at, measured_edges
from pipelines.optimise import Check, Engine, LoopConfig, alone, optimise
from pipelines.optimizers import WHOLE, Part

TINY_DIT = DiTConfig(
    class_name=SKYREELS, num_attention_heads=3, attention_head_dim=64, in_channels=8, out_channels=8, text_dim=128,
    freq_dim=256, ffn_dim=576, num_layers=8,
)  # fmt: skip
"""Shape of the embedded DiT."""

COPIES = 4
"""Levels of noise at which a picture is seen in one step, its text being read once."""

CLIP_BLOCKS = (SINK, *(BLOCK,) * (CLIP // BLOCK))
"""Latents of each block of a long clip."""

CLEAN = 0.06
"""Shifted level up to which a latent counts as context: its velocity is not asked for."""


MEASURED_FILMS, MEASURED_BATCHES = 256, 4
"""Long films whose first latents are compared with the rest, and batches on which levels' affinity is measured."""


@dataclass(frozen=True, kw_only=True)
class DiTTraining:
    """Shares are of batches, except `start_share` and `drop_text`, which are of clips.

    `loop.batch_size` counts long clips; batches of pictures and of openings hold `films_per_clip` times as many films,
    for about as much work. The share of pictures falls from the first of `picture_share` to the last as training goes
    on; of the rest `opening_share` are openings. `start_share` of the long clips have no clean block. `levels` says
    how levels are drawn; where by staircases, all but `staircase_share` of the long batches have them at random per
    block, and where by `sync`, no block is clean before the others, so there is no diffusion forcing. With `compile`
    layers are compiled, once for each shape of batch: a minute at the start (a C++ compiler is needed), then faster.
    With `checkpointing` layers keep their inputs only and are computed again for the backward pass. `dtype` is that of
    products: weights are float32. `fps` is for models that are told of it. With `teacher_guidance` the model learns to
    say in one forward what it says at the start with that guidance (arXiv 2210.03142, section 3.1, at one scale); 0: it
    learns from films alone.
    """

    loop: LoopConfig
    objective: Objective = Objective()
    levels: LevelSampler = LevelSampler.STAIRCASE
    films_per_clip: int = 4
    shift: float = 4.0
    picture_share: tuple[float, float] = (1.0, 0.2)
    opening_share: float = 0.5
    staircase_share: float = 0.7
    joint_share: float = 0.15
    start_share: float = 0.3
    drop_text: float = 0.1
    worst_context: float = 0.1
    compile: bool = False
    checkpointing: bool = False
    dtype: str = "bfloat16"
    device: str = "cpu"
    fps: int = 24
    teacher_guidance: float = 0.0

    def __post_init__(self):
        if not 0 <= self.teacher_guidance < float("inf"):
            raise ValueError(f"teacher_guidance={self.teacher_guidance} must be positive; try 3")
        for name, share in (("picture_share", max(self.picture_share)), ("picture_share", min(self.picture_share)),
                            ("opening_share", self.opening_share)):  # fmt: skip
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be between 0 and 1; try 0.2")

    def changes(self) -> dict[str, str | int | float | bool | tuple[float, float]]:
        """What a resumed run must have alike beside the loop: choices that are not at their defaults."""
        names = ("levels", "dtype", "picture_share", "opening_share", "teacher_guidance")
        defaults = {f.name: f.default for f in fields(self)}
        values = {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}
        values |= {"levels": self.levels.value} if "levels" in values else {}
        return self.objective.changes() | values


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clean latents (b, c, f, h, w), a level per latent (b, f), which latents count (b, f) and the mask (None: joint).

    There is a caption for every b / len(captions) clips.
    """

    clean: Tensor
    captions: list[str]
    levels: Tensor
    counts: Tensor
    mask: Tensor | None

    def part(self, part: Part) -> "Batch":
        """Some of its clips."""
        rows = {name: part.of(getattr(self, name)) for name in ("clean", "captions", "levels", "counts")}
        return replace(self, **rows)

    def to(self, device: str) -> "Batch":
        """Its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("clean", "levels", "counts")}
        return replace(self, **moved, mask=None if self.mask is None else self.mask.to(device))


def draw_batch(
    rng: np.random.Generator, config: DiTTraining, films: Mapping[str, FilmLatents], progress: float
) -> Batch:
    """A batch of a kind drawn by the shares at `progress` in [0, 1]; `films` by name of the set."""
    first, last = config.picture_share
    if rng.uniform() < first + progress * (last - first):
        return picture_batch(rng, config, films[PICTURES.name])
    if rng.uniform() < config.opening_share:
        return opening_batch(rng, config, films[OPENINGS.name])
    return long_batch(rng, config, films[LONG.name])


def picture_batch(rng: np.random.Generator, config: DiTTraining, films: FilmLatents) -> Batch:
    """First latents, each `COPIES` times with levels that are spread evenly, so that each step sees all levels."""
    clean, captions = films.sample(rng, config.films_per_clip * config.loop.batch_size)
    spread = (np.arange(COPIES) + rng.uniform(size=(len(clean), COPIES))) / COPIES
    levels = torch.stack([per_latent(row, (1,) * COPIES, config.shift) for row in spread]).view(-1, 1)
    clean = clean.repeat_interleave(COPIES, 0)
    return Batch(clean=clean, captions=captions, levels=levels, counts=levels > CLEAN, mask=None)


def opening_batch(rng: np.random.Generator, config: DiTTraining, films: FilmLatents) -> Batch:
    """A first block of one latent and the next."""
    clean, captions = films.sample(rng, config.films_per_clip * config.loop.batch_size)
    sizes = CLIP_BLOCKS[:2]
    rows = [per_latent(opening_levels(rng, config.levels), sizes, config.shift) for _ in range(len(clean))]
    levels = torch.stack(rows)
    mask = block_causal_mask(sizes)
    return Batch(clean=clean, captions=captions, levels=levels, counts=levels > CLEAN, mask=mask)


def long_batch(rng: np.random.Generator, config: DiTTraining, films: FilmLatents) -> Batch:
    """Sink, often a gap, and run, in blocks as at inference: the first latent, and then three each.

    After a gap the first block of the run is context alone: at inference none sees the sink and a gap and no past.
    """
    clean, captions, has_gap = films.sample_runs(rng, config.loop.batch_size)
    sizes = CLIP_BLOCKS
    is_mixed = config.levels is LevelSampler.STAIRCASE and rng.uniform() >= config.staircase_share
    sampler = LevelSampler.IID if is_mixed else config.levels
    rows = [per_latent(clip_levels(rng, sampler, config), sizes, config.shift) for _ in range(len(clean))]
    levels = torch.stack(rows)
    counts = levels > CLEAN
    counts[has_gap, : SINK + BLOCK] = False
    is_joint = rng.uniform() < config.joint_share
    mask = None if is_joint else block_causal_mask(sizes)
    return Batch(clean=clean, captions=captions, levels=levels, counts=counts, mask=mask)


def opening_levels(rng: np.random.Generator, sampler: LevelSampler) -> np.ndarray:
    """Levels of a first block and the next, (2,), before the shift: mostly with the first one clean or nearly so."""
    kind = rng.uniform()
    if sampler is LevelSampler.SYNC or 0.55 <= kind < 0.8:
        return draw_levels(sampler, rng, 2)
    if kind < 0.55:
        return np.array([rng.uniform(0, 0.05) if rng.uniform() < 0.6 else 0.0, rng.uniform()])
    level = rng.uniform()
    return np.array([level, min(1.0, level + 1 / 16)])


def clip_levels(rng: np.random.Generator, sampler: LevelSampler, config: DiTTraining) -> np.ndarray:
    """Levels of a long clip's blocks, (len(CLIP_BLOCKS),), before the shift: mostly some clean ones come first."""
    count = len(CLIP_BLOCKS)
    if sampler is LevelSampler.SYNC or rng.uniform() < config.start_share:
        levels = draw_levels(sampler, rng, count)
    else:
        num_clean = int(rng.integers(1, count))
        levels = np.concatenate([np.zeros(num_clean), draw_levels(sampler, rng, count - num_clean)])
    return soil(rng, levels, config.worst_context)


def latent_errors(
    dit: DiT, batch: Batch, text: Text, noise: Latents, first_weight: Tensor, *, dtype: str = "bfloat16", fps: int = 24,
    teacher: "Teacher | None" = None,
) -> tuple[Tensor, Tensor, Levels]:  # fmt: skip
    """Weighted mean squared error of the velocity of each latent (b, f), which count, and their levels.

    The loss of flow matching (arXiv 2210.02747, section 4), or the distance to what `teacher` says.
    `first_weight` (c,) weights the channels of the first latent. A weight may depend on level, channel and latent,
    never on what is shown: a place that counted more where a thing stands taught the model to expect things there, and
    they came out too large and without a shape.
    """
    clean, noisy = batch.clean, add_noise(batch.clean, noise, batch.levels)
    target = teacher(batch, noisy, text, dtype=dtype, fps=fps) if teacher else velocity_target(clean, noise)
    velocity = velocity_of(dit, batch, noisy, text, dtype=dtype, fps=fps)
    channels = torch.ones(clean.shape[1:3], device=clean.device)
    channels[:, 0] = first_weight.to(clean.device)
    error = ((velocity - target).square() * channels[..., None, None]).mean(1)
    return error.mean((2, 3)), batch.counts, batch.levels


def velocity_of(dit: DiT, batch: Batch, noisy: Latents, text: Text, *, dtype: str, fps: int) -> Latents:
    """What a DiT says of a batch's clips (b, c, f, h, w) with noise; float32."""
    clips = len(noisy) // len(text)
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        read = {i: tuple(y.repeat_interleave(clips, 0) for y in kv) for i, kv in dit.text_features(text).items()}
        return dit(noisy, 1000 * batch.levels, read, mask=batch.mask, keep=False, fps=fps)[0].float()


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What is learned from: a DiT, the states of no text (1, tokens, d), and a scale of guidance."""

    dit: DiT
    no_text: Text
    scale: float

    def __call__(self, batch: Batch, noisy: Latents, text: Text, *, dtype: str, fps: int) -> Latents:
        """The guided velocity of a batch's clips (b, c, f, h, w) with noise; no gradient, as its weights need none."""
        without = self.no_text.to(noisy.device).expand(len(text), -1, -1)
        v_uncond, v_cond = (velocity_of(self.dit, batch, noisy, states, dtype=dtype, fps=fps)
                            for states in (without, text))  # fmt: skip
        return guide(v_uncond, v_cond, self.scale)


def train_dit(
    config: DiTTraining, films: Mapping[str, FilmLatents], text: Callable[..., Text], *, resume: bool = False,
    dit: DiT | None = None, engine: Engine = alone, checks: Sequence[Check] = (),
    options: Mapping[str, str | int] = MappingProxyType({}),
) -> Iterator[dict]:  # fmt: skip
    """Train a new DiT, or go on with `dit`, yielding log records; the last one holds the model as `dit`.

    With `config.teacher_guidance` the teacher is `dit` as it is given, also when a run is resumed.
    `text` gives states of captions; `options` is what else must be the same in a resumed run.
    """
    dit, objective, path = dit or new_dit(config), config.objective, config.loop.out / "intervals.json"
    teacher = None
    if config.teacher_guidance:
        frozen = deepcopy(dit).requires_grad_(False).to(config.device)
        prepare(frozen, replace(config, checkpointing=False))
        teacher = Teacher(dit=frozen, no_text=text(""), scale=config.teacher_guidance)
    prepare(dit, config)
    first_weight = torch.ones(dit.config.in_channels)
    if objective.balance_first:
        first_weight = first_latent_weight(films[LONG.name].latents[:MEASURED_FILMS].float())
    has_uncertainty = objective.multitask is Multitask.UNCERTAINTY
    model = WithUncertainty(dit, objective.num_intervals) if has_uncertainty else dit

    def loss_at(step: int, part: Part = WHOLE) -> dict[str, Tensor]:
        rng = np.random.default_rng((config.loop.seed, step))
        batch, noise = draw_step(rng, config, films, step / config.loop.num_steps)
        errors = errors_of(dit, config, batch.part(part), part.of(noise), text, first_weight, teacher)
        edges = edges_at(step, config.loop.num_steps, objective, CLEAN, path, measure)
        return combined_loss(objective, model, errors, edges, rng, batch.counts.sum())

    def measure() -> tuple[float, ...]:
        return measured_edges(
            dit, lambda level: losses_at_level(dit, config, films, text, level), objective.num_intervals, CLEAN
        )

    yield from optimise(
        model.to(config.device), loss_at, config.loop, resume=resume, options={**config.changes(), **options},
        engine=engine, checks=checks,
    )  # fmt: skip
    yield {"dit": dit}


def draw_step(
    rng: np.random.Generator, config: DiTTraining, films: Mapping[str, FilmLatents], progress: float
) -> tuple[Batch, Tensor]:
    """A whole step's batch, some captions dropped, and its noise (b, c, f, h, w), assigned if that is asked for."""
    batch = draw_batch(rng, config, films, progress)
    captions = ["" if rng.uniform() < config.drop_text else caption for caption in batch.captions]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    noise = torch.randn(batch.clean.shape, generator=generator)
    if config.objective.immiscible:
        noise = nearest_noise(batch.clean, noise)
    return replace(batch, captions=captions), noise


def errors_of(
    dit: DiT, config: DiTTraining, batch: Batch, noise: Latents, text: Callable[..., Text], first_weight: Tensor,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor, Levels]:  # fmt: skip
    """`latent_errors` on the device, at the dtype and rate of the configuration."""
    states = text(*batch.captions).to(config.device)
    return latent_errors(dit, batch.to(config.device), states, noise.to(config.device), first_weight,
                         dtype=config.dtype, fps=config.fps, teacher=teacher)  # fmt: skip


def losses_at_level(
    dit: DiT, config: DiTTraining, films: Mapping[str, FilmLatents], text: Callable[..., Text], level: float
) -> list[Tensor]:
    """Mean error of some batches of long clips, the same in each call, with all latents at one shifted level."""
    losses = []
    for i in range(MEASURED_BATCHES):
        batch = long_batch(np.random.default_rng((config.loop.seed, i)), config, films[LONG.name])
        batch = replace(batch, levels=torch.full_like(batch.levels, level))
        noise = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(i))
        error, *_ = latent_errors(dit, batch, text(*batch.captions), noise, torch.ones(dit.config.in_channels))
        losses.append(error.mean())
    return losses


def new_dit(config: DiTTraining) -> DiT:
    """A DiT at its start."""
    torch.manual_seed(config.loop.seed)
    dit = DiT(TINY_DIT)
    _start_at_zero(dit)
    return dit


def prepare(dit: DiT, config: DiTTraining) -> None:
    """Let the model's layers be compiled, or computed twice, if that is asked for."""
    if config.checkpointing:
        checkpoint_layers(dit)
    if config.compile:
        torch._dynamo.config.recompile_limit = 64
        if config.objective.needs_gradients:  # several backward passes, and donated buffers serve one
            torch._functorch.config.donated_buffer = False
        for layer in dit.blocks.values():
            layer.compile(dynamic=False)


def _start_at_zero(dit: DiT) -> None:
    """Gates and the output begin at zero, so that every layer begins as the identity (DiT, arXiv 2212.09748)."""
    with torch.no_grad():
        dit.condition_embedder.time_proj.weight.zero_()
        dit.condition_embedder.time_proj.bias.zero_()
        for layer in dit.blocks.values():
            layer.scale_shift_table.zero_()
        dit.proj_out.weight.zero_()
        dit.proj_out.bias.zero_()
