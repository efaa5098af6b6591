"""Weights are those that the papers give for x0, said of the velocity."""

import pytest
import torch

from longvid.flow import add_noise, denoise, velocity_target
from longvid.weighting import LossWeighting, first_latent_weight, level_weight, min_snr_weight


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_the_velocity_is_min_snr_of_x0(gamma):
    generator = torch.Generator().manual_seed(0)
    clean, noise, guess = torch.randn(3, 1, 2, 9, 4, 4, generator=generator, dtype=torch.float64)
    level = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)[None]
    noisy = add_noise(clean, noise, level)
    x0_error = (denoise(noisy, guess, level) - clean).square().mean((1, 3, 4))
    error = (guess - velocity_target(clean, noise)).square().mean((1, 3, 4))
    ratio = min_snr_weight(level, gamma) * error / (((1 - level) / level).square().clamp(max=gamma) * x0_error)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_one_on_average_and_largest_where_snr_is_gamma(gamma):
    level = (torch.arange(100_000, dtype=torch.float64)[None] + 0.5) / 100_000
    weight = min_snr_weight(level, gamma)
    assert weight.mean().item() == pytest.approx(1, abs=1e-6)
    assert level[0, weight.argmax()].item() == pytest.approx(1 / (1 + gamma**0.5), abs=1e-4)
    ends = min_snr_weight(torch.tensor([[0.0, 1.0]]), gamma)
    assert (ends == 0).all()


def test_no_weighting_weights_all_alike():
    level = torch.rand(2, 3)
    assert (level_weight(LossWeighting.NONE, level) == 1).all()
    assert torch.equal(level_weight(LossWeighting.MIN_SNR, level), min_snr_weight(level))


def test_the_first_latents_error_is_brought_to_the_scale_of_the_others():
    latents = torch.randn(200, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    latents[:, 0, 0] = 3 + 2 * latents[:, 0, 0]
    weight = first_latent_weight(latents)
    torch.testing.assert_close(weight, torch.tensor([2 / 14, 1.0]), atol=0.02, rtol=0)
    target = velocity_target(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)))
    power = target.square().mean((0, 3, 4))
    torch.testing.assert_close(weight * power[:, 0], power[:, 1:].mean(1), atol=0.05, rtol=0)
