"""Pictures that a model makes are graded by what they show, and what is graded higher becomes likelier."""

from copy import deepcopy
from itertools import starmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longvid.captions import caption
from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from longvid.flow import velocity_target
from longvid.models.text import TextEncoder
from longvid.worlds import draw, sample_world
from pipelines import graded_pictures
from pipelines.configure import BASE
from pipelines.graded_pictures import GradedPictures, GradingSizes, grade
from pipelines.graph_training import GraphTraining
from pipelines.methods import make_method
from pipelines.optimise import LoopConfig
from pipelines.resident_films import read
from pipelines.train_dit import DiTTraining, velocity_of

FAST = BASE.with_name("tiny-fast")
POOL = SimpleNamespace(starmap=lambda function, asked, chunk: list(starmap(function, asked)))


@pytest.fixture
def graded(tmp_path):
    """Of the student in the box, in its four steps without guidance."""

    def make(method="rolling-fast", num_steps=4, **sizes):
        torch.manual_seed(0)
        folder = open_folder(FAST)
        before = load_dit(folder, torch.float32).requires_grad_(False)
        loop = LoopConfig(out=tmp_path, num_steps=1, batch_size=1, learning_rate=1e-3)
        return GradedPictures(before, load_vae(folder, torch.float32), TextEncoder.load(FAST, torch.float32),
                              make_method(method, num_steps=num_steps), DiTTraining(loop=loop, fps=16),
                              GradingSizes(**sizes))  # fmt: skip

    return make


def test_true_pictures_have_the_grade_1_and_others_have_not():
    rng = np.random.default_rng(0)
    worlds = [sample_world(rng, 8.0) for _ in range(6)]
    frames = [draw(world, 1)[0] for world in worlds]
    grades = np.array([[grade(frame, world) for world in worlds] for frame in frames])
    assert (grades.diagonal() == 1).all() and (grades[~np.eye(6, dtype=bool)] < 1).all()


def test_pictures_are_the_samplers_and_advantages_are_against_the_prompts_mean(graded, monkeypatch):
    given = iter([0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 0.0, 0.0])
    shown = []
    monkeypatch.setattr(graded_pictures, "grade", lambda frame, world: shown.append((frame, world)) or next(given))
    found = graded(prompts=3, tries=4)
    weights = [2 * p for p in found.before.parameters()]
    assert found.draw(POOL, [p / 2 for p in weights]) == pytest.approx(6 / 12)
    advantages = found.advantages.view(3, 4)
    assert advantages.mean(1).abs().max() < 1e-6 and (advantages[1] == 0).all()
    assert advantages[0, 0] == pytest.approx(-3 * advantages[0, 1].item()) and advantages[2, 0] > 0
    assert advantages.std() == pytest.approx(1.0)
    worlds = [world for _, world in shown]
    assert worlds[0] is worlds[3] and worlds[3] is not worlds[4]
    rng = np.random.default_rng((found.config.loop.seed, 1))
    asked = [sample_world(rng, found.sizes.spins) for _ in range(3)]
    assert worlds[::4] == asked
    assert torch.equal(found.states, read(found.encoder, [caption(world, rng) for world in asked]))
    with torch.no_grad():
        video = found.vae.decode(found.latents[5:6])[0][0, :, 0].permute(1, 2, 0)
    assert np.abs(shown[5][0].astype(float) - ((video + 1) * 127.5).clamp(0, 255).numpy()).max() < 2


def test_the_loss_moves_what_was_said_towards_what_was_made(graded, monkeypatch):
    found = graded(prompts=2, tries=2, seen=8)
    found.latents.normal_()
    dit = deepcopy(found.before)
    torch.manual_seed(1)
    assert found.loss(dit) < 1e-8  # nothing is better than anything else
    asked = {}

    def noted(model, batch, noisy, text, **told):
        asked.update(batch=batch, noisy=noisy, said=velocity_of(model, batch, noisy, text, **told))
        return asked["said"]

    monkeypatch.setattr(graded_pictures, "velocity_of", noted)
    found.advantages.fill_(1.0)
    loss, levels = found.loss(dit), asked["batch"].levels[..., None, None, None]
    noise = (asked["noisy"] - (1 - levels) * asked["batch"].clean) / levels.clamp(min=1e-3)
    error = (asked["said"] - velocity_target(asked["batch"].clean, noise)).square().mean()
    assert loss.item() == pytest.approx(error.item(), rel=1e-2)  # what is right is learned as a film is


def test_with_guidance_the_text_is_moved_by_so_much_less(graded):
    losses = {}
    for name, scale in (("rolling-fast", 1.0), ("rolling", 3.0)):
        found = graded(name, prompts=2, tries=2, seen=64)
        found.latents.normal_()
        found.advantages.fill_(1.0)
        torch.manual_seed(1)
        losses[scale] = found.loss(deepcopy(found.before)).item()
    assert 0.03 * losses[1.0] < losses[3.0] < 0.4 * losses[1.0]


def test_what_is_graded_higher_becomes_likelier(graded, monkeypatch):
    monkeypatch.setattr(graded_pictures, "grade", lambda frame, world: float(frame.mean() / 255))
    found = graded(num_steps=2, prompts=4, tries=6, seen=12)
    dit = deepcopy(found.before).requires_grad_(True)
    training = GraphTraining(dit, lambda: found.loss(dit), learning_rate=5e-4, ema_decay=0.0)
    training.rate.fill_(5e-4)
    grades = []
    for _ in range(3):
        found.rng = np.random.default_rng(0)
        grades.append(found.draw(POOL, training.averages))
        for _ in range(8):
            training._compute()
    found.rng = np.random.default_rng(0)
    assert found.draw(POOL, training.averages) > grades[0] + 0.03
