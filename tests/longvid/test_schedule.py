"""Schedules: equal to the references', and refusing what is none."""

import subprocess
import sys
from itertools import pairwise

import pytest
from diffusers import UniPCMultistepScheduler

from longvid.schedule import Noise, Schedule, Solver, shift_level, skyreels_schedule, uniform_schedule, wan_schedule

SCHEDULES = (wan_schedule, skyreels_schedule, uniform_schedule)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0, 12.0])
def test_wan_schedule_is_diffusers(shift):
    reference = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, num_train_timesteps=1000
    )
    for num_steps in (1, 2, 3, 4, 5, 8, 10, 15, 20, 30, 37, 40, 50, 100):
        reference.set_timesteps(num_steps)
        ours = wan_schedule(num_steps, shift)
        assert list(ours.levels) == reference.sigmas.tolist()
        assert list(ours.timesteps) == [*reference.timesteps.tolist(), 0]


def test_skyreels_schedule_is_the_release():
    ours = skyreels_schedule(30, 8.0)
    assert ours.timesteps[:5] == (999, 995, 991, 986, 980)
    assert ours.timesteps[-6:] == (615, 551, 470, 363, 216, 0)
    assert wan_schedule(30, 8.0).timesteps[-6:] == (616, 553, 473, 367, 221, 0)


def test_uniform_schedule_is_rolling_and_self_forcing():
    assert uniform_schedule(5, 5.0).timesteps == pytest.approx((1000, 952.381, 882.353, 769.231, 555.556, 0), abs=1e-3)
    assert uniform_schedule(4, 5.0).timesteps == pytest.approx((1000, 937.5, 833.333, 625, 0), abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 4, 50])
@pytest.mark.parametrize("shift", [0.3, 1.0, 8])
def test_levels_fall_from_noise_to_clean(schedule, num_steps, shift):
    s = schedule(num_steps, shift)
    assert s.num_steps == num_steps == len(s.timesteps) - 1
    assert 0.99 < s.levels[0] <= 1 and s.levels[-1] == s.timesteps[-1] == 0
    assert all(a > b for a, b in pairwise(s.levels))
    assert all(0 <= 1000 * level - timestep < 1.001 for level, timestep in zip(s.levels, s.timesteps, strict=True))


def test_shift_keeps_the_ends_and_is_undone_by_its_reciprocal():
    for level in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert shift_level(level, 1.0) == level
        assert shift_level(shift_level(level, 8.0), 1 / 8) == pytest.approx(level, abs=1e-15)
    assert shift_level(0.0, 5.0) == 0 and shift_level(1.0, 5.0) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "num_steps, shift, said",
    [
        (0, 5.0, "num_steps=0"),
        (-3, 5.0, "num_steps=-3"),
        (4, 0.0, "shift=0"),
        (4, -1.0, "shift=-1"),
        (4, float("inf"), "shift=inf"),
        (4, float("nan"), "shift=nan"),
    ],
)
def test_errors_say_what_was_given(schedule, num_steps, shift, said):
    with pytest.raises(ValueError, match=said) as error:
        schedule(num_steps, shift)
    assert "\n" not in str(error.value) and "try" in str(error.value)


@pytest.mark.parametrize(
    "levels, timesteps",
    [
        ((0.0,), (0.0,)),
        ((1.0, 0.5, 0.0), (1000.0, 0.0)),
        ((1.0, 0.5), (1000.0, 500.0)),
        ((0.5, 1.0, 0.0), (500.0, 1000.0, 0.0)),
        ((0.5, 0.5, 0.0), (500.0, 500.0, 0.0)),
        ((1.5, 0.5, 0.0), (1500.0, 500.0, 0.0)),
        ((float("nan"), 0.0), (1000.0, 0.0)),
    ],
)
def test_what_is_no_schedule_is_refused(levels, timesteps):
    with pytest.raises(ValueError):
        Schedule(levels=levels, timesteps=timesteps)


def test_names():
    assert Solver("unipc") is Solver.UNIPC and Noise("coordinated") is Noise.COORDINATED
    assert [s for s in Solver if s.needs_noise] == [Solver.RENOISE]


def test_the_plan_can_import_it_without_tensors():
    code = "import sys, longvid.schedule; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
