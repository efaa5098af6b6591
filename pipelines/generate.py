"""Video from a prompt, streamed: `generate` yields frames as blocks leave the queue."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch

from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder, stored_bytes
from longvid.frames import to_frames, to_video
from longvid.media import read_image
from longvid.models.dit import DiT, TextFeatures
from longvid.models.packed import pack
from longvid.models.text import TextEncoder
from longvid.models.vae import VAE, VAEState
from longvid.models.vae_config import VAEConfig
from longvid.passes import Pass
from longvid.plan import Plan
from longvid.sampler import noise_of, sample
from longvid.types import Latents, Text
from parallel.agree import from_all
from parallel.decode import BEFORE, Back, Front, Whole
from parallel.execute import Stage, carry_out
from parallel.snapshot import part_of
from pipelines.configure import Run, configure
from pipelines.run_folder import Keeping
from pipelines.trace import Span, Trace, about
from pipelines.usage import Usage, peak_memory_mb

__all__ = ["Models", "Observer", "Run", "configure", "generate", "load_models"]


TEXTS_KEPT = 32
"""Prompts whose cross-attention features are kept at once."""


class Observer:
    """Sees what happens while a video is made; the default sees nothing. A trace, if given, notes what took when."""

    def __init__(self, trace: Trace | None = None):
        self.trace = trace

    def span(self, name: str, **about) -> AbstractContextManager:
        """Entered for what takes time."""
        return nullcontext() if self.trace is None else self.trace.span(name, **about)

    def passed(self, p: Pass) -> None:
        """One forward of the model is done."""

    def left(self, block: int, latents: Latents) -> None:
        """A clean block (1, c, f, h, w) has left the queue."""

    def ended(self, processes: list[Usage], spans: list[list[Span]]) -> None:
        """All is made; what each process has used and, with a trace, when, in order of rank."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """The networks of a run. Text is encoded already and its encoder gone: `text` gives that of a (video, lane).

    `latent_size` is channels, height and width, `bytes_read` of the weights' files. With a stage the DiT is its part;
    the VAE, and with it all frames, are on the head alone, `vae_back` where the grid has the decoder's back.
    """

    dit: DiT
    vae: VAE | None
    vae_back: VAE | None
    text: Callable[[int, int], TextFeatures]
    latent_size: tuple[int, int, int]
    bytes_read: int
    stage: Stage | None = None


def load_models(run: Run, stage: Stage | None = None, texts: tuple[Text, ...] = ()) -> Models:
    """Read the folder's networks and encode the prompt, unless `texts` are what `encode_prompts` gave already.

    Raises ValueError for damaged or wrong weights, and for a prompt that the text encoder would cut.
    """
    folder = open_folder(run.model)
    states = texts or encode_prompts(run)
    dit = dit_of(run, stage.layers if stage else None)
    vae = vae_of(run) if stage is None or stage.is_head else None
    vae_back = vae_of(run, back_alone=True) if stage and stage.decoding and not stage.is_head else None
    features = lru_cache(TEXTS_KEPT)(torch.no_grad()(lambda which: dit.text_features(states[which].to(run.device))))
    text = lambda video, lane: features(-1 if lane else video)  # noqa: E731
    factor = VAEConfig.from_dict(folder.vae).spatial_factor
    size = (dit.config.in_channels, run.height // factor, run.width // factor)
    read = stored_bytes(folder, "transformer", dit)
    read += sum(stored_bytes(folder, "vae", part) for part in (vae, vae_back) if part)
    return Models(dit=dit, vae=vae, vae_back=vae_back, text=text, latent_size=size, bytes_read=read,
                  stage=stage)  # fmt: skip


def dit_of(run: Run, layers: range | None = None) -> DiT:
    """The folder's DiT, or those layers of it, ready to run: packed on a CPU, compiled if that is asked for."""
    dit = pack(load_dit(open_folder(run.model), getattr(torch, run.dtype), run.device, layers).eval())
    if run.compile:
        from longvid.models.compiled import compile_token_wise  # loads a compiler

        compile_token_wise(dit)
    return dit


def vae_of(run: Run, *, back_alone: bool = False) -> VAE:
    """The folder's VAE: what it encodes in float32, since latents depend on it, what it decodes in the run's dtype."""
    vae = load_vae(open_folder(run.model), torch.float32, run.device, back_alone=back_alone)
    return vae.decoding_in(getattr(torch, run.vae_dtype)).eval()


def encode_prompts(run: Run, several: tuple[str, ...] = ()) -> list[Text]:
    """Text states of the prompt, or of `several`, and last, where guidance needs it, of the negative prompt.

    Raises ValueError for a prompt that the text encoder would cut. The encoder is gone afterwards.
    """
    encoder = TextEncoder.load(run.model, getattr(torch, run.dtype), run.device)
    named = {f"prompt number {number}": prompt for number, prompt in enumerate(several, 1)} or {"prompt": run.prompt}
    if run.method.num_lanes > 1:
        named["negative prompt"] = run.negative_prompt
    for name, prompt in named.items():
        if surplus := encoder.surplus(prompt):
            limit = encoder.max_length
            raise ValueError(
                f"the {name} has {limit + surplus} tokens, {surplus} more than the text encoder's {limit}; "
                f"shorten it to about {max(1, len(prompt) * (limit - 1) // (limit + surplus))} characters"
            )
    return [encoder(prompt) for prompt in named.values()]


def generate(
    run: Run,
    observer: Observer | None = None,
    stage: Stage | None = None,
    keeping: Keeping | None = None,
    texts: tuple[Text, ...] = (),
) -> Iterator[np.ndarray]:
    """Load the models, and yield frames as blocks leave: uint8 (n, height, width, 3), `run.num_frames` in all.

    With a stage this process holds its part of the layers, and only the last stage yields frames. `keeping` leaves
    snapshots in a run's folder, and goes on from one: all frames are yielded again. Raises ValueError for a wrong
    request at once, and FloatingPointError (block and step named) if latents stop being finite while frames are made.
    """
    models = load_models(run, stage, texts)
    ready: list[Latents] = []
    if run.image and models.vae:
        ready.append(encode_frames(models.vae, read_image(run.image, run.height, run.width)[None]))
    return (frames for _, frames in roll(run, run.plan(), models, ready, observer or Observer(), keeping))


def roll(
    run: Run,
    plan: Plan,
    models: Models,
    ready: list[Latents],
    observer: Observer,
    keeping: Keeping | None,
    *,
    shows_ready: bool = True,
) -> Iterator[tuple[int, np.ndarray]]:
    """Carry the plan out and decode each block as it leaves: (video, frames). Ready blocks are decoded first, for the
    VAE's state.

    They leave first, too, if they are a part of the video that is made (`shows_ready`).
    """
    start, begin = time.perf_counter(), keeping.start if keeping else 0
    blocks = partial(_blocks, run, plan, models, ready, observer, keeping)
    if models.vae:
        yield from _head_frames(blocks, plan, models, ready, observer, keeping, shows_ready=shows_ready)
    elif models.vae_back:
        during = lambda block: observer.span("decode", block=block)  # noqa: E731
        back = Back(models.vae_back, models.stage, plan, begin, models.latent_size, during)
        back.compute(BEFORE)
        assert not list(blocks(back.compute))
    else:
        assert not list(blocks())
    spans = observer.trace.spans if observer.trace else []
    usage = _usage(run, models, time.perf_counter() - start)
    observer.ended(usage, [spans] if models.stage is None else from_all(spans))


def _head_frames(
    blocks: Callable[[], Iterator[tuple[int, Latents | None]]], plan: Plan, models: Models, ready: list[Latents],
    observer: Observer, keeping: Keeping | None, *, shows_ready: bool,
) -> Iterator[tuple[int, np.ndarray]]:  # fmt: skip
    """What `roll` yields on the process that has the VAE; where it is cut, another computes the decoder's back."""
    cut = models.stage is not None and models.stage.decoding is not None
    begin = keeping.start if keeping else 0
    decoder = Front(models.vae, models.stage, plan, begin, models.latent_size) if cut else Whole(models.vae, plan)
    shown = lambda block: (plan.address(block)[0], decoder.take(block).cpu().numpy())  # noqa: E731
    for block, latents in enumerate(ready):
        decoder.put(block, latents)
        frames = shown(block)
        if shows_ready:
            observer.left(block, latents)
            yield frames
    for block, latents in keeping.folder.kept(plan, begin) if keeping else ():
        observer.left(block, latents)
        decoder.put(block, latents)
        yield shown(block)
    for block, latents in blocks():
        if latents is not None:
            with observer.span("keep", block=block):
                observer.left(block, latents)
                if keeping:
                    keeping.folder.keep(block, latents)
            with observer.span("decode", block=block):
                decoder.put(block, latents)
        if latents is None or not cut:
            yield shown(block)


def _usage(run: Run, models: Models, seconds: float) -> list[Usage]:
    """What each process took, in order of rank; all processes must ask."""
    peak, stage = peak_memory_mb(run.device), models.stage
    this = Usage(
        idle_fraction=stage.waited_s / seconds if stage else 0.0, peak_memory_mb=peak,
        bytes_sent=stage.num_bytes if stage else 0, bytes_exchanged=stage.exchange.num_bytes if stage else 0,
        bytes_to=stage.bytes_to if stage else {}, exchange_s=stage.exchange.waited_s if stage else 0.0,
        weight_bytes_read=models.bytes_read,
    )  # fmt: skip
    return [this] if stage is None else from_all(this)


def _blocks(
    run: Run, plan: Plan, models: Models, ready: list[Latents], observer: Observer, keeping: Keeping | None,
    decode_back: Callable[[int], None] = lambda i: None,
) -> Iterator[tuple[int, Latents | None]]:  # fmt: skip
    size, stage = models.latent_size, models.stage
    noise = noise_of(plan, run.seed, *size)
    text: Callable[[Pass], TextFeatures] = lambda p: models.text(plan.video(p), p.lane)  # noqa: E731
    common = {"ready": ready, "fps": run.fps, "observe": observer.passed,
              "during": lambda p: observer.span("pass", **about(p))}  # fmt: skip
    if keeping:
        lanes = range(plan.method.num_lanes) if stage is None or stage.lane is None else [stage.lane]
        band = (stage.band, stage.grid.num_bands) if stage else (0, 1)
        part, queue = part_of(models.dit.layers, lanes, *band), (plan, noise) if models.vae else None
        common["start"] = keeping.point(part, next(models.dit.parameters()).device, queue)
        common["reached"] = keeping.reached(plan, part, observer.span)
    if models.stage is None:
        return sample(plan, models.dit, text, noise, **common)
    return carry_out(plan, models.dit, models.stage, text, noise, size, decode_back=decode_back, **common)


@torch.no_grad()
def decode(vae: VAE, latents: Latents, state: VAEState | None) -> tuple[np.ndarray, VAEState]:
    """Frames uint8 (n, height, width, 3) of the next latents of a stream, and the stream's state."""
    video, state = vae.decode(latents, state)
    return to_frames(video)[0].cpu().numpy(), state


@torch.no_grad()
def encode_frames(vae: VAE, frames: np.ndarray) -> Latents:
    """Latents of 4n + 1 frames uint8 (t, height, width, 3), as a video that starts with them."""
    device = next(vae.parameters()).device
    return vae.encode(to_video(torch.from_numpy(frames.copy())[None].to(device)))[0]
