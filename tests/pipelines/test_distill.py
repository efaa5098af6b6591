"""Distillation: rollouts are what the sampler makes, gradients are DMD's, and a student's folder is a model folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from longvid.models.dit import DiT
from longvid.noise import block_noise
from longvid.plan import make_plan
from longvid.sampler import sample
from pipelines.distill import (
    Distillation,
    Question,
    Rollout,
    Witness,
    as_rolled_out,
    ask,
    critic_loss,
    distill,
    roll_out,
    student_loss,
)
from pipelines.methods import make_method
from pipelines.optimise import LoopConfig
from pipelines.train_dit import TINY_DIT

SMALL = replace(TINY_DIT, num_attention_heads=2, attention_head_dim=12, in_channels=2, out_channels=2, ffn_dim=16,
                num_layers=2, text_dim=8)  # fmt: skip
SIZE = (2, 4, 4)
TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
SEEDS = (7, 8)


def small_dit(seed=0) -> DiT:
    torch.manual_seed(seed)
    return DiT(SMALL)


def distillation(tmp_path, method="rolling-fast", **changes) -> Distillation:
    loop = {"num_steps": 6, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0, "log_every": 1, "save_every": 3}
    loop = LoopConfig(out=tmp_path, **{**loop, **changes.pop("loop", {})})
    values = {"latent_size": SIZE, "dtype": "float32", **changes}
    return Distillation(loop=loop, method=make_method(method), **values)


def noise_of_seeds(plan):
    shape = lambda block: (1, SIZE[0], plan.block_sizes[block], *SIZE[1:])  # noqa: E731
    return lambda block, step: torch.cat([block_noise(seed, block, shape(block), step) for seed in SEEDS])


@pytest.mark.parametrize("method, lag", [("rolling-fast", 1), ("rolling-fast", 4), ("rolling-forcing", 1)])
def test_windows_with_a_gradient_cover_each_block_once(method, lag):
    method = as_rolled_out(replace(make_method(method), lag=lag))
    plan, dit = make_plan(method, 14), small_dit()
    for exit in range(method.num_steps):
        witness = Witness(dit, TEXT, method.num_steps, exit)
        seen = []
        note = witness._note
        witness._note = lambda p, clean, seen=seen, note=note: (seen.extend(p.updates), note(p, clean))
        list(sample(plan, witness, lambda p: TEXT, noise_of_seeds(plan), during=witness.during))
        assert sorted(seen) == list(range(len(plan.block_sizes)))
        for block, size in enumerate(plan.block_sizes):
            assert witness.clean[block].shape == (2, SIZE[0], size, *SIZE[1:]) and witness.clean[block].requires_grad


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_block_seen_at_its_last_step_is_the_one_that_the_sampler_makes(tmp_path, share):
    """Every fourth tick is seen. Block by block all blocks end in such a tick, or none does; rolling, the first two do
    (the second begins when the first is clean), or one of the others, or none."""
    config = distillation(tmp_path, block_by_block_share=share, lengths=(10,))
    dit, found = small_dit(), set()
    plan = make_plan(as_rolled_out(replace(config.method, lag=4 if share else 1)), 10)
    features = dit.text_features(TEXT)
    blocks = [x for _, x in sample(plan, dit, lambda p: features, noise_of_seeds(plan))]
    for seed in range(12):
        clips = roll_out(config, dit, TEXT, np.random.default_rng(seed), SEEDS).clips
        pairs = zip(clips.split(plan.block_sizes, 2), blocks, strict=True)
        found.add(tuple(torch.allclose(seen, made, atol=1e-5) for seen, made in pairs))
    rolling = {(True, True, False, False), (False, False, True, False), (False, False, False, True), (False,) * 4}
    assert found == ({(True,) * 4, (False,) * 4} if share else rolling)


def test_a_long_rollout_is_seen_as_its_beginning_and_its_end(tmp_path):
    config = distillation(tmp_path, lengths=(16,))
    rollout = roll_out(config, small_dit(), TEXT, np.random.default_rng(0), SEEDS)
    assert rollout.clips.shape == (2, SIZE[0], 10, *SIZE[1:]) and rollout.sizes == (1, 3, 3, 3)
    assert rollout.counts.tolist() == [True] + 3 * [False] + 6 * [True], "after the gap nobody saw what was before"


def test_the_student_moves_by_the_difference_of_critic_and_teacher(tmp_path):
    """Held to networks whose answers are known: DMD's equation 7, written out."""

    class Known(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.at = at

        def text_features(self, text):
            return text

        def forward(self, noisy, timesteps, text, *, mask, keep, fps):
            clean = self.at + text.mean()
            return (noisy - clean) / (timesteps / 1000)[:, None, :, None, None], {}

    config = distillation(tmp_path, guidance_scale=3.0)
    clips = torch.randn(2, *SIZE[:1], 10, *SIZE[1:], generator=torch.Generator().manual_seed(1)).requires_grad_()
    counts = torch.arange(10) % 2 == 0
    rollout = Rollout(clips=clips, counts=counts, sizes=(1, 3, 3, 3))
    question = Question(noise=torch.randn(clips.shape), levels=torch.rand(2, 10).clamp(0.1, 0.9), mask=None)
    one, none = torch.ones(2, 1, 1), torch.zeros(2, 1, 1)
    student_loss(config, Known(0.5), Known(0.25), rollout, question, one, none).backward()
    real, fake = 0.5 + 3.0 * 1, 0.25 + 1
    scale = (clips.detach() - real).abs().mean((1, 3, 4), keepdim=True)
    expected = (fake - real) / scale / clips[:, :, counts].numel() * counts[:, None, None]
    assert torch.allclose(clips.grad, expected.expand_as(clips), atol=1e-6)


def test_a_critic_that_agrees_with_the_teacher_leaves_the_student_where_it_is(tmp_path):
    config, dit = distillation(tmp_path, guidance_scale=1.0), small_dit()
    rollout = roll_out(config, dit, TEXT, np.random.default_rng(0), SEEDS)
    question = ask(config, rollout, [np.random.default_rng(i) for i in range(2)])
    student_loss(config, small_dit(1), small_dit(1), rollout, question, TEXT, TEXT).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in dit.parameters())
    student_loss(config, small_dit(1), small_dit(2), rollout_again(config, dit), question, TEXT, TEXT).backward()
    missing = [name for name, p in dit.named_parameters() if p.grad is None]
    assert not missing and any(p.grad.abs().max() > 0 for p in dit.parameters())


def rollout_again(config, dit) -> Rollout:
    return roll_out(config, dit, TEXT, np.random.default_rng(0), SEEDS)


def test_the_critic_learns_from_what_the_student_made_and_does_not_move_it(tmp_path):
    config, student, critic = distillation(tmp_path), small_dit(), small_dit(1)
    rollout = rollout_again(config, student)
    question = ask(config, rollout, [np.random.default_rng(i) for i in range(2)])
    critic_loss(config, critic, rollout, question, TEXT).backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in critic.parameters())


def prompts(rng, count):
    return [f"a {word} ball" for word in rng.choice(["red", "blue"], count)]


def texts(*said):
    return torch.stack([TEXT[len(one) % 2] for one in said])


def losses_of(config, **more) -> tuple[list[dict], DiT]:
    *records, last = distill(config, small_dit(), texts, prompts, **more)
    return records, last["distill"]


def test_a_resumed_run_goes_on_as_the_uncut_and_the_student_is_the_slower(tmp_path):
    whole, student = losses_of(distillation(tmp_path / "whole"))
    cut = distillation(tmp_path / "cut")
    records = distill(cut, small_dit(), texts, prompts)
    first = [next(records) for _ in range(4)]
    records.close()
    rest, resumed = losses_of(cut, resume=True)
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(first) == strip(whole[:4]) and strip(rest) == strip(whole[3:])
    pairs = zip(student.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    state = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["model"]
    start = small_dit().state_dict()
    moved = {name: sum(float((state[f"{name}.{key}"] - value).abs().sum()) for key, value in start.items())
             for name in ("student", "critic")}  # fmt: skip
    assert 0.1 < moved["student"] / moved["critic"] < 0.4, "a fifth of the learning rate"


def test_student_and_critic_begin_as_the_model_that_is_given(tmp_path):
    config = distillation(tmp_path, loop={"num_steps": 1, "learning_rate": 1e-9, "adamw_learning_rate": 1e-9})
    _, student = losses_of(config, student=small_dit(1))
    state = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    for name, value in small_dit(1).state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=1e-6, rtol=0)
        torch.testing.assert_close(state[f"critic.{name}"], value, atol=1e-6, rtol=0)


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    whole, _ = losses_of(distillation(tmp_path / "whole"))
    parts, _ = losses_of(distillation(tmp_path / "parts", loop={"accumulation": 2}))
    for name in ("loss", "student", "critic"):
        assert [r[name] for r in parts] == pytest.approx([r[name] for r in whole], rel=1e-3)


def test_a_distilled_folder_makes_videos_in_four_steps(longvid, model, here):
    words = ("distill", "--out", "fast", "--steps", 4, "--batch-size", 2, "--log-every", 1, "--student", model)
    ran = longvid("train", *words)
    assert ran.code == 0, ran.err
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [r["step"] for r in records[:-1]] == [1, 2, 3, 4] and records[-1] == {"written": "fast/model"}
    dry = longvid("generate", "--dry-run", model="fast/model")
    method = json.loads(dry.out)["method"]
    assert (method["name"], method["num_steps"], method["guidance_scale"]) == ("rolling-fast", 4, 1.0)
    assert longvid("generate", "--output", "a.mp4", "--seed", 1, model="fast/model").code == 0
    again = longvid("train", *words)
    assert again.code == 2 and "add --resume" in again.err


@pytest.mark.parametrize("words, said", [
    (("--method", "dualparal"), "method dualparal cannot be distilled"),
    (("--method", "rolling"), "has guidance 3.0, and a student needs none; try rolling-fast"),
    (("--method", "fifo"), "method 'fifo' is unknown"),
    (("--critic-draws", "0"), "critic_draws=0 must be at least 1; try 2"),
    (("--student-speed", "0"), "student_speed=0.0 must be positive; try 0.2"),
    (("--prompts-file", "none.txt"), "prompts file none.txt is not a file"),
    (("--levels", "iid"), "levels is an option of the part dit, not of distill"),
    (("--batch-size", "3", "--gradient-accumulation-steps", "2"), "batch_size=3 cannot be split"),
    (("--student", "tiny"), "has a transformer of another shape than"),
    (("--student", "nowhere"), "nowhere"),
])  # fmt: skip
def test_what_cannot_be_distilled_is_said_and_nothing_starts(longvid, here, words, said):
    ran = longvid("train", "distill", "--out", "fast", *words)
    assert ran.code == 2 and said in ran.err, ran.err
    assert not (here / "fast").exists()
