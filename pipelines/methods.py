"""Presets: functions that return complete methods. Adding a method is adding a function.

Each takes what a user may change of it; sizes and context are in latents. Facts and their sources are in the
docstrings, and `tests/pipelines/test_methods.py` holds every preset to its published rule.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace

from longvid.method import Kind, LevelRule, Method
from longvid.schedule import Noise, Solver


def rolling(
    *, num_steps: int = 16, first_steps: int = 0, lag: int = 1, block_size: int = 3, blocks_per_pass: int = 1,
    retire: bool = True, guidance_scale: float = 3.0, flow_shift: float = 3.0,
) -> Method:  # fmt: skip
    """Ours: the rolling queue, causal, for models trained block-causally with staircases of levels.

    A block sees the video's first latent and the 6 before itself, noisy neighbours and clean history alike. The first
    block is the first latent alone, a single frame to the VAE, and it is clean before another begins: what to show is
    settled there, how it moves after. It takes `first_steps` if they are more, since one latent costs little. New noise
    at each step, as in Self-Forcing (arXiv 2506.08009) and Rolling Forcing (arXiv 2509.25161), lets what went wrong be
    put right. A clean block is read once more for its features, as there, unless the model does as well by those of its
    last step: without `retire` a pass in `num_steps + 1` is saved.
    """
    return Method(
        name="rolling", kind=Kind.CAUSAL, block_size=block_size, first_block_size=1, num_steps=num_steps,
        lag=lag, first_steps=max(first_steps, num_steps), solver=Solver.RENOISE, level_rule=LevelRule.UNIFORM,
        flow_shift=flow_shift, guidance_scale=guidance_scale, sink=1, history=6, left=6, max_keys=7 + block_size,
        blocks_per_pass=blocks_per_pass, retire=retire,
    )  # fmt: skip


def rolling_fast(
    *, num_steps: int = 4, first_steps: int = 0, lag: int = 1, block_size: int = 3, blocks_per_pass: int = 1,
    retire: bool = True, guidance_scale: float = 1.0, flow_shift: float = 5.0,
) -> Method:  # fmt: skip
    """`rolling` for models distilled to few steps: no guidance, and the levels of Self-Forcing and Rolling Forcing."""
    method = rolling(num_steps=num_steps, first_steps=first_steps, lag=lag, block_size=block_size,
                     blocks_per_pass=blocks_per_pass, retire=retire, guidance_scale=guidance_scale,
                     flow_shift=flow_shift)  # fmt: skip
    return replace(method, name="rolling-fast")


def dualparal(
    *, num_steps: int = 50, block_size: int = 8, guidance_scale: float = 5.0, flow_shift: float = 3.0
) -> Method:
    """DualParal (arXiv 2505.21070), section 3, with the settings of its README, for bidirectional Wan weights.

    Lag 1, tail first; 8 latents of the cleaner neighbour recomputed and as many of the noisier one read from its
    features (fewer if blocks are smaller); block 0 is longer by as many, so that every pass is as long; coordinated
    noise. Mended: the length is what was asked for, the last block may be short, and a neighbour is always as the tick
    before left it.
    """
    context = min(8, block_size)
    return Method(
        name="dualparal", kind=Kind.TWO_SIDED, block_size=block_size, first_block_size=block_size + context,
        num_steps=num_steps, lag=1, solver=Solver.UNIPC, level_rule=LevelRule.WAN, flow_shift=flow_shift,
        guidance_scale=guidance_scale, noise=Noise.COORDINATED, left=context, right=context,
    )  # fmt: skip


def skyreels_sync(*, num_steps: int = 30, guidance_scale: float = 6.0, flow_shift: float = 8.0) -> Method:
    """SkyReels-V2 diffusion forcing with `ar_step = 0`: windows of 97 frames, all latents of one at the same level.

    Windows share 17 frames (5 latents), which carry noise of level 0.02 (`addnoise_condition = 20`) afresh in each
    step. Bidirectional, as the released weights need; levels are those of diffusers (the release's are
    `LevelRule.SKYREELS`, up to 5 thousandths lower near the end).
    """
    return Method(
        name="skyreels-sync", kind=Kind.JOINT, block_size=25, first_block_size=25, num_steps=num_steps, lag=0,
        solver=Solver.UNIPC, level_rule=LevelRule.WAN, flow_shift=flow_shift, guidance_scale=guidance_scale,
        window=25, overlap=5, condition_level=0.02,
    )  # fmt: skip


def skyreels_async(
    *, num_steps: int = 30, lag: int = 5, block_size: int = 5, guidance_scale: float = 6.0, flow_shift: float = 8.0,
    has_image: bool = False,
) -> Method:  # fmt: skip
    """SkyReels-V2 diffusion forcing with `ar_step = 5`, `causal_block_size = 5`: a staircase inside each window.

    With an image blocks are 1, 4, 4, ... (the release, which cuts all blocks alike, loses the image).
    """
    size = min(block_size, 4) if has_image else block_size
    return Method(
        name="skyreels-async", kind=Kind.JOINT, block_size=size, first_block_size=size, num_steps=num_steps,
        lag=min(lag, num_steps), solver=Solver.UNIPC, level_rule=LevelRule.WAN, flow_shift=flow_shift,
        guidance_scale=guidance_scale, window=25, overlap=5, condition_level=0.02,
    )  # fmt: skip


def rolling_forcing(
    *, num_steps: int = 5, block_size: int = 3, guidance_scale: float = 1.0, flow_shift: float = 5.0
) -> Method:
    """Rolling Forcing (arXiv 2509.25161), section 3: one joint window over all levels, re-noised at each step.

    The window grows to `num_steps` blocks, stays, and shrinks. It sees the first 3 latents directly before the most
    recent clean ones, 21 latents in all. A finished block is read again at level 0, with the 18 latents before it.
    """
    return Method(
        name="rolling-forcing", kind=Kind.JOINT, block_size=block_size, first_block_size=block_size,
        num_steps=num_steps, lag=1, solver=Solver.RENOISE, level_rule=LevelRule.UNIFORM, flow_shift=flow_shift,
        guidance_scale=guidance_scale, sink=3, history=18, max_keys=21, retire=True, retire_sees_sink=False,
    )  # fmt: skip


def self_forcing(
    *, num_steps: int = 4, block_size: int = 3, guidance_scale: float = 1.0, flow_shift: float = 5.0
) -> Method:
    """Self-Forcing (arXiv 2506.08009), section 3: blocks one after the other, rolling features of 21 latents."""
    return Method(
        name="self-forcing", kind=Kind.CAUSAL, block_size=block_size, first_block_size=block_size, num_steps=num_steps,
        lag=num_steps, solver=Solver.RENOISE, level_rule=LevelRule.UNIFORM, flow_shift=flow_shift,
        guidance_scale=guidance_scale, history=20, max_keys=21, retire=True,
    )  # fmt: skip


METHODS: dict[str, Callable[..., Method]] = {
    "rolling": rolling,
    "rolling-fast": rolling_fast,
    "dualparal": dualparal,
    "skyreels-sync": skyreels_sync,
    "skyreels-async": skyreels_async,
    "rolling-forcing": rolling_forcing,
    "self-forcing": self_forcing,
}
"""Names on the command line."""


def make_method(name: str, *, has_image: bool = False, **changes: int | float | bool) -> Method:
    """The preset `name` with a user's changes. Raises ValueError for an unknown name or a change it does not take."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; the methods are {', '.join(METHODS)}")
    takes = inspect.signature(METHODS[name]).parameters
    for key in changes:
        if key not in takes:
            able = [other for other, preset in METHODS.items() if key in inspect.signature(preset).parameters]
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} cannot be changed in method {name}; methods that take it: {', '.join(able)}")
    if has_image and "has_image" in takes:
        return METHODS[name](has_image=True, **changes)
    return METHODS[name](**changes)
