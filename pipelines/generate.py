"""Video from a prompt, streamed: `generate` yields frames as blocks leave the queue."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange

from longvid.checkpoints.diffusers_folder import Folder, load_dit, load_vae, open_folder
from longvid.media import read_image
from longvid.models.dit import DiT, TextFeatures
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE, VAEState
from longvid.passes import Pass
from longvid.plan import Plan
from longvid.sampler import noise_of, sample
from longvid.types import Latents, Video
from pipelines.configure import Run, configure

__all__ = ["Models", "Observer", "Run", "configure", "generate", "load_models"]


class Observer:
    """Sees what happens while a video is made; the default sees nothing."""

    def passed(self, p: Pass) -> None:
        """One forward of the model is done."""

    def left(self, block: int, latents: Latents) -> None:
        """A clean block (1, c, f, h, w) has left the queue."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of a run. Text is encoded already and its encoder gone."""

    dit: DiT
    vae: VAE
    text: tuple[TextFeatures, ...]


def load_models(run: Run) -> Models:
    """Read the folder's networks and encode the prompt, one lane per forward that guidance needs.

    Raises ValueError for damaged or wrong weights, and for a prompt that the text encoder would cut.
    """
    folder = open_folder(run.model)
    dtype = getattr(torch, run.dtype)
    states = encode_prompts(folder, run, dtype)
    dit = load_dit(folder, dtype, run.device).eval()
    vae = load_vae(folder, torch.float32, run.device).eval()
    with torch.no_grad():
        text = tuple(dit.text_features(state.to(run.device)) for state in states)
    return Models(dit=dit, vae=vae, text=text)


def encode_prompts(folder: Folder, run: Run, dtype: torch.dtype) -> list[torch.Tensor]:
    """Text states of the prompt and, where guidance needs it, of the negative prompt."""
    encoder = TextEncoder.load(folder.path, dtype, run.device)
    prompts = [run.prompt, run.negative_prompt][: run.method.num_lanes]
    for name, prompt in zip(("prompt", "negative prompt"), prompts, strict=False):
        if surplus := encoder.surplus(prompt):
            limit = encoder.max_length
            raise ValueError(
                f"the {name} has {limit + surplus} tokens, {surplus} more than the text encoder's {limit}; "
                f"shorten it to about {max(1, len(prompt) * (limit - 1) // (limit + surplus))} characters"
            )
    return [encoder(prompt) for prompt in prompts]


def generate(run: Run, observer: Observer | None = None) -> Iterator[np.ndarray]:
    """Load the models, and yield frames as blocks leave: uint8 (n, height, width, 3), `run.num_frames` in all.

    Raises ValueError for a wrong request at once, and FloatingPointError (block and step named) if latents stop being
    finite while frames are made.
    """
    models = load_models(run)
    ready: list[Latents] = []
    if run.image:
        ready.append(encode_frames(models.vae, read_image(run.image, run.height, run.width)[None]))
    return roll(run, run.plan(), models, ready, observer or Observer())


def roll(
    run: Run, plan: Plan, models: Models, ready: list[Latents], observer: Observer, *, shows_ready: bool = True
) -> Iterator[np.ndarray]:
    """Carry the plan out and decode each block as it leaves. Ready blocks are decoded first, for the VAE's state.

    They leave first, too, if they are a part of the video that is made (`shows_ready`).
    """
    state: VAEState | None = None
    for block, latents in enumerate(ready):
        frames, state = decode(models.vae, latents, state)
        if shows_ready:
            observer.left(block, latents)
            yield frames
    shape = latent_shape(models, run.height, run.width)
    text: Callable[[Pass], TextFeatures] = lambda p: models.text[p.lane]  # noqa: E731
    blocks = sample(
        plan, models.dit, text, noise_of(plan, run.seed, *shape), ready=ready, fps=run.fps, observe=observer.passed
    )
    for block, latents in blocks:
        observer.left(block, latents)
        frames, state = decode(models.vae, latents, state)
        yield frames


def latent_shape(models: Models, height: int, width: int) -> tuple[int, int, int]:
    """Channels, height and width of latents."""
    factor = models.vae.config.spatial_factor
    return models.vae.config.z_dim, height // factor, width // factor


@torch.no_grad()
def decode(vae: VAE, latents: Latents, state: VAEState | None) -> tuple[np.ndarray, VAEState]:
    """Frames uint8 (n, height, width, 3) of the next latents of a stream, and the stream's state."""
    video, state = vae.decode(latents, state)
    pixels = ((video[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "c t H W -> t H W c").cpu().numpy(), state


@torch.no_grad()
def encode_frames(vae: VAE, frames: np.ndarray) -> Latents:
    """Latents of 4n + 1 frames uint8 (t, height, width, 3), as a video that starts with them."""
    device = next(vae.parameters()).device
    video: Video = rearrange(torch.from_numpy(frames.copy()), "t H W c -> 1 c t H W").to(device).float() / 127.5 - 1
    return vae.encode(video)[0]
