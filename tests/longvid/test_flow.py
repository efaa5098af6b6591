"""Equations and solvers: equal to diffusers', exact on a Gaussian, at their order."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from longvid.flow import add_noise, denoise, euler_step, guide, solver_step, velocity_target
from longvid.schedule import Solver, skyreels_schedule, uniform_schedule, wan_schedule

MU, S = 0.7, 0.4  # the Gaussian: x0 ~ N(MU, S^2)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(solver, schedule, velocity, x, noises=None):
    state = None
    for i in range(schedule.num_steps):
        noise = None if noises is None else noises[i]
        x, state = solver_step(solver, x, velocity(x, schedule.levels[i]), state, schedule.levels, i, noise)
    assert state is None
    return x


# Equations ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, torch.tensor([[0.0, 0.2, 1.0], [0.5, 0.5, 0.9]])])
def test_denoise_undoes_add_noise(level):
    x0, noise = normal(2, 4, 3, 5, 6), normal(2, 4, 3, 5, 6, seed=1)
    x = add_noise(x0, noise, level)
    assert x.shape == x0.shape and x.dtype == torch.float32
    torch.testing.assert_close(denoise(x, velocity_target(x0, noise), level), x0, atol=1e-6, rtol=0)


def test_add_noise_ends_are_exact_and_a_scalar_is_a_row_of_equals():
    x0, noise = normal(2, 4, 3, 5, 6), normal(2, 4, 3, 5, 6, seed=1)
    assert torch.equal(add_noise(x0, noise, 0.0), x0) and torch.equal(add_noise(x0, noise, 1.0), noise)
    row = torch.full((2, 3), 0.25)
    assert torch.equal(add_noise(x0, noise, row), add_noise(x0, noise, 0.25))
    assert torch.equal(denoise(x0, noise, row), denoise(x0, noise, 0.25))


def test_euler_moves_only_latents_whose_level_changes():
    x, v = normal(1, 4, 3, 2, 2), normal(1, 4, 3, 2, 2, seed=1)
    moved = euler_step(x, v, torch.tensor([[0.5, 0.8, 0.0]]), torch.tensor([[0.2, 0.8, 0.0]]))
    assert torch.equal(moved[:, :, 1:], x[:, :, 1:])
    torch.testing.assert_close(moved[:, :, 0], x[:, :, 0] - 0.3 * v[:, :, 0])


def test_guidance_is_linear_in_its_scale():
    u, c = normal(1, 4, 3, 2, 2), normal(1, 4, 3, 2, 2, seed=1)
    assert torch.equal(guide(u, c, 0.0), u) and torch.equal(guide(u, u, 6.0), u)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    torch.testing.assert_close(guide(u, c, 6.0) - u, 6.0 * (c - u))


# diffusers ------------------------------------------------------------------------------------------------------------


def smooth_velocity(x, level):
    """Made up: neither linear in x nor in the level, and bounded."""
    return torch.sin(1.3 * x + 2 * level) + 0.5 * torch.cos(3 * level - x) - 0.3 * x


def reference_sample(scheduler, x):
    for timestep, level in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        x = scheduler.step(smooth_velocity(x, level), timestep, x, return_dict=False)[0]
    return x


STEPS = [1, 2, 3, 4, 5, 10, 15, 20, 30, 50]
SHIFTS = [1.0, 3.0, 5.0, 8.0]


def reference_unipc(num_steps, shift):
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_unipc_is_diffusers(num_steps, shift):
    x = normal(1, 4, 3, 4, 4)
    ours = sample(Solver.UNIPC, wan_schedule(num_steps, shift), smooth_velocity, x)
    reference = reference_sample(reference_unipc(num_steps, shift), x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


def test_unipc_is_diffusers_to_the_last_digits_in_float64():
    """So what the float32 test leaves is rounding, and no coefficient differs."""
    for num_steps in STEPS:
        x = normal(1, 4, 3, 4, 4, dtype=torch.float64)
        scheduler = reference_unipc(num_steps, 5.0)
        scheduler.sigmas = scheduler.sigmas.double()
        ours = sample(Solver.UNIPC, wan_schedule(num_steps, 5.0), smooth_velocity, x)
        torch.testing.assert_close(ours, reference_sample(scheduler, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_is_diffusers(num_steps, shift):
    x = normal(1, 4, 3, 4, 4)
    for schedule in (wan_schedule(num_steps, shift), uniform_schedule(num_steps, shift)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=list(schedule.levels[:-1]))
        ours = sample(Solver.EULER, schedule, smooth_velocity, x)
        torch.testing.assert_close(ours, reference_sample(scheduler, x), atol=1e-5, rtol=0)


# The Gaussian ---------------------------------------------------------------------------------------------------------


def marginal(level):
    """Mean and variance of x at a level."""
    return (1 - level) * MU, (1 - level) ** 2 * S**2 + level**2


def gaussian_velocity(x, level):
    """E[eps - x0 | x]. Its flow keeps (x - mean) / std, so it takes noise z to MU + S z."""
    mean, variance = marginal(level)
    return (level - (1 - level) * S**2) / variance * (x - mean) - MU


def consistent_velocity(x, level):
    """The straight line from x to where its flow ends: a perfectly distilled model."""
    mean, variance = marginal(level)
    return (x - (MU + S * (x - mean) / math.sqrt(variance))) / level


def order(solver, schedule, counts):
    """The least-squares slope of log error over -log steps."""
    z = normal(1, 1, 1, 8, 8, dtype=torch.float64)
    exact = MU + S * z
    errors = [(sample(solver, schedule(n, 1.0), gaussian_velocity, z) - exact).abs().max().item() for n in counts]
    x = torch.tensor(counts, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    return -((x - x.mean()) * (y - y.mean())).sum().item() / ((x - x.mean()) ** 2).sum().item()


def test_solvers_converge_at_their_order():
    assert 0.95 < order(Solver.EULER, uniform_schedule, [64, 128, 256, 512]) < 1.05
    assert order(Solver.UNIPC, uniform_schedule, [64, 128, 256, 512]) > 1.95


@pytest.mark.parametrize("schedule", [wan_schedule, skyreels_schedule, uniform_schedule])
def test_unipc_is_nearer_than_euler(schedule):
    z = normal(1, 1, 1, 8, 8, dtype=torch.float64)
    errors = {
        solver: (sample(solver, schedule(20, 3.0), gaussian_velocity, z) - (MU + S * z)).abs().max().item()
        for solver in (Solver.EULER, Solver.UNIPC)
    }
    assert errors[Solver.UNIPC] < errors[Solver.EULER] / 2


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("schedule", [wan_schedule, uniform_schedule])
def test_one_step_is_the_models_x0_and_a_perfect_line_is_followed(solver, schedule):
    x0, noise = normal(1, 4, 3, 4, 4), normal(1, 4, 3, 4, 4, seed=1)
    one = schedule(1, 5.0)
    x = add_noise(x0, noise, one.levels[0])
    assert torch.equal(
        sample(solver, one, smooth_velocity, x), denoise(x, smooth_velocity(x, one.levels[0]), one.levels[0])
    )
    many = schedule(6, 5.0)
    x = add_noise(x0, noise, many.levels[0])
    out = sample(solver, many, lambda x, level: (x - x0) / level, x, noises=[noise] * 6)
    torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 4, 16, 64])
def test_renoising_a_distilled_model_keeps_the_marginal(num_steps):
    count = 40_000
    z, noises = normal(1, 1, 1, 1, count), [normal(1, 1, 1, 1, count, seed=i + 1) for i in range(num_steps)]
    out = sample(Solver.RENOISE, uniform_schedule(num_steps, 5.0), consistent_velocity, z, noises)
    # five standard errors: of a mean S / sqrt(n), of a variance S^2 sqrt(2 / n)
    assert abs(out.mean().item() - MU) < 5 * S / math.sqrt(count)
    assert abs(out.var().item() - S**2) < 5 * S**2 * math.sqrt(2 / count)


def test_renoising_a_model_that_is_not_distilled_loses_variance_as_computed():
    """x0 is then the posterior mean, which shrinks deviations by (1 - sigma) S^2 / variance at each step."""
    count, schedule = 40_000, uniform_schedule(16, 5.0)
    z, noises = normal(1, 1, 1, 1, count), [normal(1, 1, 1, 1, count, seed=i + 1) for i in range(16)]
    out = sample(Solver.RENOISE, schedule, gaussian_velocity, z, noises)
    expected = 1.0
    for level, next_level in zip(schedule.levels, schedule.levels[1:], strict=False):
        gain = (1 - level) * S**2 / marginal(level)[1]
        expected = (1 - next_level) ** 2 * gain**2 * expected + next_level**2
    assert expected < 0.9 * S**2
    assert abs(out.var().item() - expected) < 5 * expected * math.sqrt(2 / count)


# Steps as values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(Solver))
def test_a_step_is_a_pure_function_in_float32(solver):
    schedule = wan_schedule(5, 3.0)
    x, noise = normal(1, 4, 3, 4, 4), normal(1, 4, 3, 4, 4, seed=1)
    state = None
    for i in range(5):
        velocity, before = smooth_velocity(x, schedule.levels[i]).bfloat16(), x.clone()
        again = solver_step(solver, x, velocity, state, schedule.levels, i, noise)
        x_next, state_next = solver_step(solver, x, velocity, state, schedule.levels, i, noise)
        assert x_next.dtype == torch.float32 and torch.equal(x, before) and torch.equal(x_next, again[0])
        x, state = x_next, state_next
