"""Flow matching: its equations, guidance, and the solvers that take a block from one level to the next.

Convention (Wan, SkyReels-V2, Self-Forcing): `x = (1 - sigma) x0 + sigma eps`, and the model's velocity is
`v = dx / dsigma = eps - x0`. Everything here is a pure function of its arguments; it knows no model, no schedule's
name, no block number and no random generator.

A level is one number (a block shares it, as in the sampler) or a tensor of shape (b, f), one per latent (training).
Results have the dtype of `x` (float32 in use); coefficients are Python floats, so float64.
"""

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from longvid.schedule import Solver
from longvid.types import Latents, Levels


def add_noise(x0: Latents, noise: Latents, level: Levels | float) -> Latents:
    """x = (1 - sigma) x0 + sigma eps."""
    level = _per_latent(level)
    return (1 - level) * x0 + level * noise


def velocity_target(x0: Latents, noise: Latents) -> Latents:
    """v = eps - x0: what the model learns, at every level."""
    return noise - x0


def denoise(x: Latents, velocity: Latents, level: Levels | float) -> Latents:
    """x0 = x - sigma v: where the straight line through x ends."""
    return x - _per_latent(level) * velocity


def guide(v_uncond: Latents, v_cond: Latents, scale: float) -> Latents:
    """v = v_u + g (v_c - v_u). Source: classifier-free guidance (arXiv 2207.12598), with g = 1 + w."""
    return v_uncond + scale * (v_cond - v_uncond)


def euler_step(x: Latents, velocity: Latents, level: Levels | float, next_level: Levels | float) -> Latents:
    """x' = x + (sigma' - sigma) v. A latent whose level does not change does not move."""
    return x + _per_latent(next_level - level) * velocity


def renoise_step(
    x: Latents, velocity: Latents, level: Levels | float, next_level: Levels | float, noise: Latents
) -> Latents:
    """x' = (1 - sigma') x0 + sigma' eps, with x0 = x - sigma v and eps drawn anew.

    The sampler of consistency-distilled models (Self-Forcing, arXiv 2506.08009; Rolling Forcing, arXiv 2509.25161).
    It keeps the marginals if x0 is where the probability flow of x ends. If x0 is the posterior mean, as in a model
    that is not distilled, each step loses variance, and more steps lose more.
    """
    return add_noise(denoise(x, velocity, level), noise, next_level)


@dataclass(frozen=True, kw_only=True)
class UniPCState:
    """What UniPC keeps of a block between two steps: the last x0 and the one before, and the sample it left from.

    `earlier_x0` is None after the first step. All are (b, c, f, h, w) in the dtype of the sample.
    """

    x0: Tensor
    earlier_x0: Tensor | None
    sample: Tensor


def unipc_step(
    x: Latents, velocity: Latents, state: UniPCState | None, levels: tuple[float, ...], index: int
) -> tuple[Latents, UniPCState | None]:
    """One step of UniPC-2, from `levels[index]` to `levels[index + 1]`: correct the sample, then predict the next.

    Source: UniPC (arXiv 2302.04867), algorithms 1 and 2 in x0 prediction with B(h) = expm1(h) ("bh2"), order 2. With
    lambda = log((1 - sigma) / sigma), h = lambda' - lambda, B = 1 - exp(-h), m the x0 at sigma and D the divided
    difference of m with the x0 before it:

        x' = sigma'/sigma x + (1 - sigma') B (m + a D)                          predictor, a = 1/2
        x' = sigma'/sigma x + (1 - sigma') B (m + r1 D + r2 (m' - m))           corrector, m' the x0 at (x', sigma')

    `state` is None at a block's first step, which has no corrector; the first step and the last are of order 1, so
    that the last lands on x0 itself. After the last step there is no state: None.
    """
    x0 = denoise(x, velocity, levels[index])
    if index == len(levels) - 2:
        return x0, None
    if state is not None:
        x = _correct(x0, state, levels, index)
    keep, towards, past = _predictor(levels, index, order=1 if state is None else 2)
    x_next = keep * x + towards * x0
    if state is not None:
        x_next = x_next + past * (state.x0 - x0)
    return x_next, UniPCState(x0=x0, earlier_x0=None if state is None else state.x0, sample=x)


def solver_step(
    solver: Solver,
    x: Latents,
    velocity: Latents,
    state: UniPCState | None,
    levels: tuple[float, ...],
    index: int,
    noise: Latents | None = None,
) -> tuple[Latents, UniPCState | None]:
    """One block from `levels[index]` to `levels[index + 1]`: the next sample and the next state.

    `x` (b, c, f, h, w) is float32; `velocity` may be of the model's dtype. `state` is what the step before returned,
    None at first; only UniPC has one. `noise` is read where `solver.needs_noise`, except at the last step, which
    returns x0.
    """
    assert 0 <= index < len(levels) - 1, f"step {index} of {len(levels) - 1}"
    velocity = velocity.to(x.dtype)
    level, next_level = levels[index], levels[index + 1]
    match solver:
        case Solver.EULER:
            return euler_step(x, velocity, level, next_level), None
        case Solver.UNIPC:
            return unipc_step(x, velocity, state, levels, index)
        case Solver.RENOISE if next_level == 0:
            return denoise(x, velocity, level), None
        case Solver.RENOISE:
            assert noise is not None, "a re-noising step needs noise"
            return renoise_step(x, velocity, level, next_level, noise), None


def _per_latent(level: Levels | float) -> Tensor | float:
    return rearrange(level, "b f -> b 1 f 1 1") if isinstance(level, Tensor) else level


def _log_snr(level: float) -> float:
    """lambda = log((1 - sigma) / sigma); pure noise is -inf, clean +inf."""
    if level in (0, 1):
        return -math.inf if level else math.inf
    return math.log(1 - level) - math.log(level)


def _correct(x0: Latents, state: UniPCState, levels: tuple[float, ...], index: int) -> Latents:
    """UniC: the step to `levels[index]` taken again, now that x0 there is known."""
    keep, towards, past, ahead = _corrector(levels, index - 1, order=1 if state.earlier_x0 is None else 2)
    x = keep * state.sample + towards * state.x0 + ahead * (x0 - state.x0)
    if state.earlier_x0 is not None:
        x = x + past * (state.earlier_x0 - state.x0)
    return x


def _predictor(levels: tuple[float, ...], index: int, order: int) -> tuple[float, float, float]:
    """Weights of UniP's step from `index`: of x, of m, and of the earlier x0 minus m."""
    keep, towards, _ = _exponential(levels, index)
    past = 0.5 * towards * _slope(levels, index) if order == 2 else 0.0
    return keep, towards, past


def _corrector(levels: tuple[float, ...], index: int, order: int) -> tuple[float, float, float, float]:
    """Weights of UniC's step from `index`: of x, of m, of the earlier x0 minus m, and of m' - m.

    Order 2 solves r1 + r2 = b1, r r1 + r2 = b2 for the place r of the earlier x0, with
    b1 = 1/B - 1/h and b2 = 1/B - 2 b1 / h.
    """
    keep, towards, h = _exponential(levels, index)
    if order == 1:
        return keep, towards, 0.0, 0.5 * towards
    inverse = -1 / math.expm1(-h)
    b1 = inverse - 1 / h
    b2 = inverse - 2 * b1 / h
    slope = _slope(levels, index)
    r1 = (b1 - b2) * slope / (slope - 1)
    return keep, towards, towards * r1 * slope, towards * (b1 - r1)


def _exponential(levels: tuple[float, ...], index: int) -> tuple[float, float, float]:
    """Weights of x and of m in the exact step for a constant x0, and h, the step's length in log-SNR."""
    level, next_level = levels[index], levels[index + 1]
    h = _log_snr(next_level) - _log_snr(level)
    return next_level / level, -(1 - next_level) * math.expm1(-h), h


def _slope(levels: tuple[float, ...], index: int) -> float:
    """1 / r, where r = (lambda_before - lambda) / h: zero if the step before came from pure noise."""
    here = _log_snr(levels[index])
    return (_log_snr(levels[index + 1]) - here) / (_log_snr(levels[index - 1]) - here)
