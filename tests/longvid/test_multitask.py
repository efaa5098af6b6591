"""What is combined fulfils the equation that defines it."""

import math

import numpy as np
import pytest
import torch

from longvid.multitask import gram_matrix, interval_losses, nash_weights, pcgrad_weights, uncertainty_loss


def gradients(num_tasks, num_parameters, seed=0):
    return np.random.default_rng(seed).normal(size=(num_tasks, num_parameters))


def test_interval_losses_are_means_over_the_latents_that_count():
    level = torch.tensor([[0.1, 0.3, 0.35, 0.9], [0.31, 0.2, 0.95, 0.8]])
    error = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]], requires_grad=True)
    counts = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]).bool()
    losses, present = interval_losses(error, counts, level, (0.25, 0.5, 0.6))
    assert losses.tolist() == [33 / 2, 3, 0, 36] and present.tolist() == [True, True, False, True]
    losses.sum().backward()
    assert error.grad.tolist() == [[0.5, 0.5, 0.5, 0.5], [0, 0.5, 0.5, 0]]


def test_uncertainty_learns_the_logarithm_of_each_loss_and_leaves_absent_tasks():
    losses, present = torch.tensor([0.1, 1.0, 7.0]), torch.tensor([True, True, False])
    log_variances = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([log_variances], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        uncertainty_loss(losses, log_variances, present).backward()
        optimizer.step()
    assert log_variances.tolist() == pytest.approx([math.log(0.1), 0, 0], abs=1e-3)
    assert uncertainty_loss(losses, torch.zeros(3), present).item() == pytest.approx(0.55)


def pcgrad_by_vectors(g, rng):
    """Algorithm 1 as the paper writes it, on the gradients themselves."""
    freed = g.copy()
    for i in range(len(g)):
        for j in rng.permutation(len(g)):
            if j != i and freed[i] @ g[j] < 0:
                freed[i] -= freed[i] @ g[j] / (g[j] @ g[j]) * g[j]
    return freed.sum(0)


@pytest.mark.parametrize("num_tasks, num_parameters", [(2, 2), (5, 3), (6, 40)])
def test_pcgrad_from_inner_products_is_pcgrad_on_vectors(num_tasks, num_parameters):
    g = gradients(num_tasks, num_parameters)
    weights = pcgrad_weights(g @ g.T, np.random.default_rng(7))
    np.testing.assert_allclose(weights @ g, pcgrad_by_vectors(g, np.random.default_rng(7)), atol=1e-10)


def test_pcgrad_of_two_conflicting_tasks_hinders_neither_and_of_others_is_the_sum():
    g = np.array([[1.0, 0.0], [-1.0, 1.0]])
    combined = pcgrad_weights(g @ g.T, np.random.default_rng(0)) @ g
    np.testing.assert_allclose(combined, [0.5, 1.5])
    assert (g @ combined >= 0).all()
    agree = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(pcgrad_weights(agree @ agree.T, np.random.default_rng(0)), 1)


@pytest.mark.parametrize("scales", [1.0, 1000.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 10])
def test_nash_weights_solve_their_equation(num_tasks, scales):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        g = gradients(num_tasks, num_tasks + 3, seed) * np.exp(rng.uniform(-1, 1, (num_tasks, 1)) * math.log(scales))
        gram = g @ g.T
        weights = nash_weights(gram)
        assert (weights > 0).all()
        np.testing.assert_allclose(weights * (gram @ weights), 1, rtol=1e-6)
        assert np.linalg.norm(weights @ g) == pytest.approx(num_tasks**0.5, rel=1e-6)


def test_nash_is_blind_to_a_tasks_scale_and_to_tasks_without_gradient():
    g = gradients(4, 9)
    plain = nash_weights(g @ g.T)
    scaled = g * np.array([[1.0], [100.0], [0.01], [1.0]])
    np.testing.assert_allclose(nash_weights(scaled @ scaled.T) @ scaled, plain @ g, rtol=1e-6)
    g[2] = 0
    weights = nash_weights(g @ g.T)
    assert weights[2] == 0
    np.testing.assert_allclose(np.delete(weights, 2), nash_weights(np.delete(g, 2, 0) @ np.delete(g, 2, 0).T))
    assert (nash_weights(np.zeros((2, 2))) == 0).all()
    assert np.isnan(nash_weights(np.diag([1.0, np.nan]))).any(), "it is not passed over"


def test_nash_where_gradients_cancel_moves_nothing():
    g = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert np.abs(nash_weights(g @ g.T) @ g).max() < 1e-6


def test_gram_matrix_is_of_inner_products():
    g = gradients(3, 50)
    np.testing.assert_allclose(gram_matrix(torch.from_numpy(g).float()), g @ g.T, atol=1e-4)
