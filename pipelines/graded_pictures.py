"""First latents that a model makes itself, graded by the oracle, and a loss that makes right ones likelier.

What a video shows is settled in its first latent, and whether that is what was asked for can be read from its pixels.
Each prompt has several tries; a try that is better than its prompt's mean pulls the velocity towards itself, one that
is worse pushes it away, at all levels of noise: negative-aware fine-tuning on the forward process (DiffusionNFT, arXiv
2509.16117, section 3, with beta 1). No path of the sampler is gone through again, so any sampler will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool

import numpy as np
import torch
from torch import Tensor

from longvid.adherence import judge, scene_of
from longvid.captions import caption
from longvid.flow import add_noise, velocity_target
from longvid.frames import to_frames
from longvid.method import Method
from longvid.models.dit import DiT
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE
from longvid.oracle import read_film
from longvid.plan import make_plan
from longvid.sampler import sample
from longvid.types import Latents
from longvid.worlds import World, sample_world
from pipelines.draw_films import SIDE
from pipelines.resident_films import picture_levels, read
from pipelines.train_dit import COPIES, Batch, DiTTraining, Teacher, velocity_of

DECODED_AT_ONCE = 128
GRADED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class GradingSizes:
    """`prompts` times `tries` pictures are made at once, and a step sees `seen` of them; things spin `spins` times as
    often as they have each other motion, since these are hardest."""

    prompts: int = 128
    tries: int = 8
    seen: int = 192
    spins: float = 8.0

    def scaled(self, scale: float) -> "GradingSizes":
        """The same with so many times as many prompts, and as many seen."""
        return replace(self, **{name: max(1, round(scale * getattr(self, name))) for name in ("prompts", "seen")})


class GradedPictures:
    """Pictures of a model as it was (`before`, a copy without gradient), always in the same memory, and their loss.

    `before` and `no_text` make the teacher; its guidance is the method's.
    """

    def __init__(self, before: DiT, vae: VAE, encoder: TextEncoder, method: Method, config: DiTTraining,
                 sizes: GradingSizes):  # fmt: skip
        self.before, self.vae, self.encoder, self.method = before, vae, encoder, method
        self.config, self.sizes = config, sizes
        self.rng = np.random.default_rng((config.loop.seed, 1))
        self.no_text = encoder("").to(config.device).bfloat16()
        self.teacher = Teacher(dit=before, no_text=self.no_text, scale=method.guidance_scale)
        side, channels = SIDE // 8, before.config.in_channels
        count = sizes.prompts * sizes.tries
        self.latents = torch.zeros(count, channels, 1, side, side, device=config.device)
        self.states = self.no_text.repeat(sizes.prompts, 1, 1)
        self.advantages = torch.zeros(count, device=config.device)

    def draw(self, pool: Pool, weights: Sequence[Tensor]) -> float:
        """Give `before` these weights, make new pictures, have `pool` grade them; their mean grade in [0, 1]."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.before.parameters()), list(weights))
        worlds = [sample_world(self.rng, self.sizes.spins) for _ in range(self.sizes.prompts)]
        self.states.copy_(read(self.encoder, [caption(world, self.rng) for world in worlds]))
        self.latents.copy_(self._made())
        frames = self._frames()
        tries = self.sizes.tries
        asked = [(frame, worlds[i // tries]) for i, frame in enumerate(frames)]
        grades = torch.tensor(pool.starmap(grade, asked, GRADED_AT_ONCE)).view(-1, tries)
        apart = grades - grades.mean(1, keepdim=True)
        self.advantages.copy_((apart / apart.std().clamp(min=1e-3)).flatten())
        return grades.mean().item()

    def loss(self, dit: DiT) -> Tensor:
        """Mean squared distance to what `before` says, moved towards what is right and away from what is wrong.

        With guidance what is said with the text alone is moved, by so much less.
        """
        device, config, scale = self.latents.device, self.config, self.method.guidance_scale
        chosen = torch.randint(len(self.latents), (self.sizes.seen,), device=device)
        clean = self.latents[chosen].repeat_interleave(COPIES, 0)
        levels = picture_levels(self.sizes.seen, config.shift, device)
        batch = Batch(clean=clean, captions=[], levels=levels, counts=levels > 0, mask=None)
        noise, states = torch.randn_like(clean), self.states[chosen // self.sizes.tries]
        noisy = add_noise(clean, noise, levels)
        told = {"dtype": config.dtype, "fps": config.fps}
        said = velocity_of(self.before, batch, noisy, states, **told)
        guided = self.teacher(batch, noisy, states, **told) if self.method.num_lanes > 1 else said
        pull = self.advantages[chosen].repeat_interleave(COPIES).view(-1, 1, 1, 1, 1) / scale
        target = said + pull * (velocity_target(clean, noise) - guided)
        return (velocity_of(dit, batch, noisy, states, **told) - target).square().mean()

    @torch.no_grad()
    def _made(self) -> Latents:
        """A first latent for every try."""
        tries, lanes = self.sizes.tries, []
        with torch.autocast(self.latents.device.type, torch.bfloat16), torch.compiler.set_stance("force_eager"):
            for states in (self.states, self.no_text.expand_as(self.states))[: self.method.num_lanes]:
                lanes.append(self.before.text_features(states.repeat_interleave(tries, 0)))
            (_, made), = sample(make_plan(self.method, 1), self.before, lambda p: lanes[p.lane],
                                lambda block, step: torch.randn_like(self.latents), fps=self.config.fps)  # fmt: skip
        return made

    @torch.no_grad()
    def _frames(self) -> np.ndarray:
        """What the pictures look like: uint8 (pictures, height, width, 3)."""
        some = (self.vae.decode(latents)[0] for latents in self.latents.split(DECODED_AT_ONCE))
        return np.concatenate([to_frames(videos)[:, 0].cpu().numpy() for videos in some])


def grade(frame: np.ndarray, world: World) -> float:
    """How far a picture (height, width, 3) shows what is asked for: shapes, colours, their number and the background.

    1 is all; what moves, and how, a picture cannot show.
    """
    found = judge(scene_of(world), read_film(np.stack([frame, frame]), 2)[0])
    return found["shape"] * found["colour"] * found["count"] * found["background"]
