"""Whole clips: as diffusers makes them, the same for a seed, Gaussian where the data are, and whole at every length."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing as reference_module

from longvid import sampler as sampler_module
from longvid.checkpoints.diffusers_folder import load_dit, open_folder, save_folder, scheduler_config
from longvid.flow import solver_step
from longvid.method import Kind, LevelRule, Method
from longvid.models.attention import KV
from longvid.models.text import TextEncoder, make_small_text_encoder
from longvid.models.vae import VAE
from longvid.models.vae_config import VAEConfig
from longvid.plan import make_plan
from longvid.sampler import Queue, noise_of, sample
from longvid.schedule import Solver
from pipelines.methods import METHODS, rolling, rolling_forcing, self_forcing, skyreels_async, skyreels_sync
from tests.whole_clip import FPS, clean, roll, texts_of, tiny_dit, whole, words

STEPS = 8

# diffusers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random SkyReels-V2 folder, as longvid writes it."""
    path = tmp_path_factory.mktemp("clip") / "model"
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    dit = tiny_dit(in_channels=16, out_channels=16, text_dim=128, num_attention_heads=3)
    text = TextEncoder(*make_small_text_encoder())
    save_folder(path, dit=dit, vae=vae, text=text, scheduler=scheduler_config(8.0), longvid={})
    return path


def reference_clip(folder, embeds, noises, fresh, **arguments) -> torch.Tensor:
    """What diffusers makes of the noise that each window begins with, and the fresh noise of each row's condition.

    Two of its doings are put right. It turns a causal mask on with the block size, and the weights are bidirectional.
    And it hands a solver a view of latents which it then overwrites: what the solver keeps as the sample before its
    first step has become the sample after it, and the first correction starts from there (1.5 % of the clip here).
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    height, width = (8 * size for size in noises[0].shape[-2:])
    noises, fresh, step = iter(noises), iter(fresh), UniPCMultistepScheduler.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "randn_tensor", lambda shape, **_: next(noises).reshape(shape).clone())
        patch.setattr(torch, "randn_like", lambda x: next(fresh).reshape(x.shape))
        patch.setattr(pipeline.transformer, "_set_ar_attention", lambda size: None)
        patch.setattr(UniPCMultistepScheduler, "step", lambda self, v, t, x, **k: step(self, v, t, x.clone(), **k))
        video = pipeline(
            prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], num_inference_steps=STEPS, fps=FPS,
            guidance_scale=6.0, height=height, width=width, output_type="latent", return_dict=False, **arguments,
        )[0]  # fmt: skip
    assert next(noises, None) is None and next(fresh, None) is None
    return video


# diffusers has Wan's list of levels, the release its own
SYNC = replace(skyreels_sync(num_steps=STEPS), level_rule=LevelRule.WAN)
ASYNC = replace(skyreels_async(num_steps=STEPS), level_rule=LevelRule.WAN)


@pytest.mark.parametrize("method, windows, arguments", [
    (SYNC, [25], {"num_frames": 97}),
    (replace(SYNC, block_size=6, first_block_size=6, window=6, overlap=2, condition_level=0.0), [6, 6],
     {"num_frames": 37, "base_num_frames": 21, "overlap_history": 5}),
    (ASYNC, [25], {"num_frames": 97, "ar_step": 5, "causal_block_size": 5}),
    (replace(ASYNC, lag=3, block_size=2, first_block_size=2, window=6, overlap=2), [6, 6, 4],
     {"num_frames": 45, "base_num_frames": 21, "overlap_history": 5, "ar_step": 3, "causal_block_size": 2,
      "addnoise_condition": 20}),
], ids=["sync", "sync-windows", "async", "async-windows-condition-20"])  # fmt: skip
def test_a_whole_clip_is_diffusers(folder, method, windows, arguments):
    plan = make_plan(method, sum(windows) - method.overlap * (len(windows) - 1))
    noise = noise_of(plan, 1, 16, 4, 6)
    begin = torch.cat([noise(block, None) for block in range(len(plan.block_sizes))], 2)
    starts = [i * (method.window - method.overlap) for i in range(len(windows))]
    noises = [begin[:, :, start : start + size] for start, size in zip(starts, windows, strict=True)]
    fresh = [
        torch.cat([noise(c.block, STEPS + p.tick)[:, :, c.start : c.stop] for c in p.covers if c.renoise], 2)
        for p in plan.passes if p.lane == 0 and p.covers[0].renoise
    ]  # fmt: skip

    text = TextEncoder.load(folder, torch.float32)
    embeds = [text("A red kite over the harbour."), text("blurred")]
    dit = load_dit(open_folder(folder), torch.float32)
    ours = whole(dict(sample(plan, dit, texts_of(dit, *embeds), noise, fps=FPS)))
    theirs = reference_clip(folder, embeds, noises, fresh, **arguments)
    assert ours.shape == theirs.shape and (ours - begin).norm() > 0.5 * begin.norm()
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
def test_a_bfloat16_model_keeps_latents_and_solver_in_float32(folder, monkeypatch):
    seen = set()

    def watched(solver, x, velocity, state, levels, index, noise):
        states = [state.x0, state.sample] if state else []
        seen.update(t.dtype for t in (x, velocity, *states))
        return solver_step(solver, x, velocity, state, levels, index, noise)

    monkeypatch.setattr(sampler_module, "solver_step", watched)
    text, plan = TextEncoder.load(folder, torch.float32), make_plan(rolling(num_steps=4), 9)
    clips = []
    for dtype in (torch.float32, torch.bfloat16):
        dit = load_dit(open_folder(folder), dtype)
        prompts = texts_of(dit, text("A red kite."), text(""))
        kept = dit(torch.zeros(1, 16, 1, 4, 6), torch.zeros(1, 1), prompts(plan.passes[0]))[1]
        assert dit.proj_dtype == kept[0].keys.dtype == kept[0].values.dtype == dtype
        clips.append(whole(dict(sample(plan, dit, prompts, noise_of(plan, 0, 16, 4, 6), fps=FPS))))
    assert seen == {torch.float32} == {clip.dtype for clip in clips}
    assert 0 < (clips[0] - clips[1]).norm() < 0.1 * clips[0].norm()


# Every method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_video_is_finite_whole_and_a_function_of_its_seed(name):
    method = METHODS[name](num_steps=3)
    plan, dit = make_plan(method, 28), tiny_dit()
    runs = [roll(plan, dit, seed) for seed in (0, 0, 1)]
    assert [x.shape[2] for x in runs[0].values()] == list(plan.block_sizes)
    first, again, other = map(whole, runs)
    assert first.dtype == torch.float32 and first.isfinite().all()
    assert torch.equal(first, again)
    assert all((runs[0][block] - runs[2][block]).abs().mean() > 0.1 for block in runs[0])
    assert (first - whole(roll(plan, dit, 0, prompts=(words(5), words(1))))).abs().mean() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_equal_texts_make_the_guidance_scale_a_matter_of_indifference(name):
    dit, clips = tiny_dit(), []
    for scale in (1.0, 0.0, 6.0):
        plan = make_plan(METHODS[name](num_steps=3, guidance_scale=scale), 26)
        assert plan.method.num_lanes == (1 if scale == 1 else 2)
        clips.append(whole(roll(plan, dit, prompts=(words(0), words(0)))))
    assert max((clip - clips[0]).abs().max() for clip in clips) <= 1e-5


SMALL = Method(
    name="small", kind=Kind.CAUSAL, block_size=2, first_block_size=3, num_steps=3, lag=1, solver=Solver.UNIPC,
    level_rule=LevelRule.UNIFORM, flow_shift=3.0, guidance_scale=2.0, sink=1, history=4, left=2, retire=True,
)  # fmt: skip
SMALL_JOINT = replace(SMALL, kind=Kind.JOINT, left=0)
SMALL_TWO_SIDED = replace(SMALL, kind=Kind.TWO_SIDED, sink=0, history=0, right=1, retire=False)
SMALL_WINDOWS = replace(SMALL, kind=Kind.JOINT, left=0, history=0, sink=0, retire=False, window=5, overlap=2)


@pytest.mark.parametrize("solver", Solver)
def test_a_first_block_with_steps_of_its_own_is_what_a_method_of_such_steps_makes_of_it(solver):
    dit, method = tiny_dit(), replace(SMALL, solver=solver, first_steps=5)
    alone = replace(method, num_steps=5, first_steps=0)
    first = roll(make_plan(alone, 3), dit)[0]
    video = roll(make_plan(method, 8), dit)
    assert torch.equal(video[0], first)
    started = roll(make_plan(method, 8, (3,)), dit, ready=[first])
    assert all(torch.allclose(video[block], started[block], atol=1e-5) for block in started)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
@pytest.mark.parametrize("ready", [(1,), (3, 2)], ids=["image", "extension"])
@pytest.mark.parametrize("method", [
    SMALL, SMALL_JOINT, SMALL_TWO_SIDED, SMALL_WINDOWS, replace(SMALL_WINDOWS, condition_level=0.02),
], ids=["causal", "joint", "two-sided", "windows", "windows-condition"])  # fmt: skip
def test_what_is_there_already_stays_and_counts(method, ready, lag):
    plan = make_plan(replace(method, lag=lag), sum(ready) + 7, ready)
    assert plan.block_sizes[-1] == 1
    dit, given, other = tiny_dit(), clean(*ready), clean(*ready, seed=8)
    before = [x.clone() for x in given]
    runs = [roll(plan, dit, ready=x) for x in (given, other)]
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    made = range(len(ready), len(plan.block_sizes))
    assert [list(run) for run in runs] == [list(made)] * 2
    assert [x.shape[2] for x in runs[0].values()] == list(plan.block_sizes[len(ready) :])
    assert whole(runs[0]).isfinite().all()
    influence = [(runs[0][block] - runs[1][block]).abs().mean().item() for block in made]
    assert min(influence if lag else influence[:1]) > 1e-5, influence


@pytest.mark.parametrize("method", [SMALL, SMALL_JOINT, SMALL_TWO_SIDED, SMALL_WINDOWS])
@pytest.mark.parametrize("num_latents", [1, 2, 3, 4, 6, 8])
def test_any_length_is_made(method, num_latents):
    plan = make_plan(method, num_latents)
    clip = whole(roll(plan, tiny_dit()))
    assert clip.shape[2] == num_latents and clip.isfinite().all()


# Data in closed form --------------------------------------------------------------------------------------------------

MU, S = 0.7, 0.4  # data ~ N(MU, S^2)


def gaussian_velocity(x, level):
    """E[eps - x0 | x]: its flow takes noise z to MU + S z."""
    variance = (1 - level) ** 2 * S**2 + level**2
    return (level - (1 - level) * S**2) / variance * (x - (1 - level) * MU) - MU


def consistent_velocity(x, level):
    """The straight line from x to where that flow ends: a perfectly distilled model."""
    std = ((1 - level) ** 2 * S**2 + level**2).sqrt()
    return (x - (MU + S * (x - (1 - level) * MU) / std)) / level.clamp(min=1e-3)


class Stub(torch.nn.Module):
    """In place of a DiT: a velocity as a function of latents and their levels; `spoil` changes it, knowing the pass.

    It is told timesteps and looks their levels up, since some schedules round them.
    """

    def __init__(self, plan, velocity, spoil=lambda p, v: v):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        timesteps = [round(timestep, 2) for timestep in plan.schedule.timesteps]
        self.levels = dict(zip(timesteps, plan.schedule.levels, strict=True))
        self.velocity, self.spoil = velocity, spoil

    def forward(self, x, timesteps, p, context, *, fps, keep):
        levels = [self.levels.get(round(t, 2), t / 1000) for t in timesteps[0].tolist()]
        velocity = self.velocity(x, torch.tensor(levels).view(1, 1, -1, 1, 1))
        features = torch.zeros(1, x.shape[2], 1, 1, 1)
        return self.spoil(p, velocity), {0: KV(features, features)}


def stub_clip(plan, noise, velocity=gaussian_velocity, **what):
    """A run of a stub, whose text is the pass itself."""
    return sample(plan, Stub(plan, velocity, **what), lambda p: p, noise)


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("name", METHODS)
def test_samples_are_distributed_as_the_data(name, solver):
    method = replace(METHODS[name](num_steps=32, flow_shift=1.0, guidance_scale=1.0), solver=solver)
    plan = make_plan(method, 30)
    noise = noise_of(plan, 0, 4, 16, 16)
    clip = whole(dict(stub_clip(plan, noise, consistent_velocity if solver is Solver.RENOISE else gaussian_velocity)))
    z = torch.cat([noise(block, None) for block in range(len(plan.block_sizes))], 2)
    assert abs(clip.mean() - MU) < 5 * S * clip.numel() ** -0.5
    assert abs(clip.var() / S**2 - 1) < (0.15 if solver is Solver.EULER else 0.05)
    if solver is not Solver.RENOISE:
        assert (clip - (MU + S * z)).abs().max() < (0.1 if solver is Solver.EULER else 0.01)


def test_few_steps_of_a_distilled_model_are_enough():
    for method in (rolling_forcing(), self_forcing()):
        plan = make_plan(method, 30)
        clip = whole(dict(stub_clip(plan, noise_of(plan, 0, 4, 16, 16), consistent_velocity)))
        assert abs(clip.mean() - MU) < 5 * S * clip.numel() ** -0.5
        assert abs(clip.var() - S**2) < 5 * S**2 * (2 / clip.numel()) ** 0.5


# A run as it goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Kind.CAUSAL, Kind.JOINT])
def test_latents_that_stop_being_finite_are_named(kind, value):
    """The first: in a joint pass it spreads at once, and an older block would leave before."""

    def spoil(p, velocity):
        for cover, part in zip(p.covers, velocity.split([c.stop - c.start for c in p.covers], 2), strict=True):
            if (cover.block, cover.step) == (2, 1):
                part.fill_(value)
        return velocity

    def spreading(x, level):
        return gaussian_velocity(x, level) + 0 * x.mean()

    plan = make_plan(replace(SMALL_JOINT if kind is Kind.JOINT else SMALL, num_steps=4), 14)
    clip, left = stub_clip(plan, noise_of(plan, 0, 4, 2, 2), spreading, spoil=spoil), []
    with pytest.raises(FloatingPointError, match="block 2 are not finite after step 1$"):
        left.extend(block for block, _ in clip)
    assert left == ([0, 1] if kind is Kind.CAUSAL else [0])


def test_blocks_leave_as_soon_as_they_are_clean():
    plan, passes = make_plan(replace(SMALL, lag=2), 11), []
    clip = sample(plan, Stub(plan, gaussian_velocity), lambda p: p, noise_of(plan, 0, 4, 2, 2), observe=passes.append)
    for block, _ in clip:
        assert passes[-1].emits == (block,) and passes == list(plan.passes[: len(passes)])
    assert passes == list(plan.passes)


@pytest.mark.parametrize("method", [SMALL, SMALL_JOINT, SMALL_TWO_SIDED, SMALL_WINDOWS])
def test_what_a_queue_holds_does_not_grow_with_the_video(method, monkeypatch):
    queues, held = [], {}

    class Watched(Queue):
        def __init__(self, *args):
            super().__init__(*args)
            queues.append(self)

    monkeypatch.setattr(sampler_module, "Queue", Watched)
    for num_latents in (61, 121):
        plan, most = make_plan(method, num_latents), [0, 0, 0]
        for _ in stub_clip(plan, noise_of(plan, 0, 1, 2, 2)):
            held_now = (len(store) for store in (queues[-1].latents, queues[-1].states, queues[-1].finite))
            most = list(map(max, most, held_now))
        held[num_latents] = most
        assert not queues[-1].latents and not queues[-1].states and not queues[-1].finite
    assert held[61] == held[121]
