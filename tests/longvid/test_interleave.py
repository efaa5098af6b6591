"""Several videos of one plan: each is the one that its plan makes alone, and no more is in hand than was asked for."""

from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from longvid.interleave import interleave
from longvid.plan import make_plan
from longvid.sampler import noise_of, sample
from pipelines.methods import METHODS, rolling
from tests.whole_clip import CHANNELS, FPS, HEIGHT, WIDTH, clean, roll, tiny_dit, words


@pytest.mark.parametrize("width", [1, 6])
@pytest.mark.parametrize("ready", [(), (1,)], ids=["text", "image"])
@pytest.mark.parametrize("name", METHODS)
def test_each_video_is_that_of_its_plan_alone_to_the_bit(name, ready, width):
    plan, dit = make_plan(METHODS[name](num_steps=3), 13, ready), tiny_dit()
    given = clean(*ready) if ready else []
    prompts = [words(seed) for seed in (0, 5, 7)]
    both = interleave(plan, len(prompts), width)
    lanes = [[dit.text_features(prompt), dit.text_features(words(1))] for prompt in prompts]
    noise = noise_of(both, 4, CHANNELS, HEIGHT, WIDTH)
    found = [{} for _ in prompts]
    many = [x for x in given for _ in prompts]
    for block, x in sample(both, dit, lambda p: lanes[both.video(p)][p.lane], noise, ready=many, fps=FPS):
        video, number = both.address(block)
        found[video][number] = x
    for prompt, video in zip(prompts, found, strict=True):
        alone = roll(plan, dit, 4, given, (prompt, words(1)))
        assert list(video) == list(alone) and all(torch.equal(video[block], alone[block]) for block in alone)


def in_hand(plan):
    """Passes of each round: while the ticks of each video go up."""
    ticks = [(plan.video(p), p.tick) for p in plan.passes]
    rounds, seen = [0], set()
    for place, of in groupby(ticks):
        if place[0] in seen:
            rounds.append(0)
            seen = set()
        seen.add(place[0])
        rounds[-1] += len(list(of))
    return rounds


@pytest.mark.parametrize("width", [1, 8, 20])
def test_a_round_has_as_many_passes_as_are_wanted(width):
    method = replace(rolling(num_steps=4), first_steps=0)
    plan = make_plan(method, 22)  # 8 blocks, at most 4 of them in the queue and a clean one, two lanes
    both = interleave(plan, 6, width)
    most = max(Counter(p.tick for p in plan.passes).values())
    rounds = in_hand(both)
    assert max(rounds) < width + most
    full = [count for count in rounds[4:-12] if count < width]
    assert len(full) <= len(rounds) // 4, "but for ramps"


def test_with_a_width_of_one_they_follow_each_other():
    plan = make_plan(rolling(num_steps=4), 13)
    order = [video for video, _ in groupby(interleave(plan, 3, 1).passes, key=lambda p: p.covers[0].block % 3)]
    assert order == [0, 1, 2]


def test_one_video_is_the_plan_itself():
    plan = make_plan(rolling(), 30, (1,))
    assert interleave(plan, 1, 8) == plan
    with pytest.raises(ValueError, match="num_videos=0 must be at least 1; try 2"):
        interleave(plan, 0, 8)


def test_frames_and_latents_are_of_all():
    plan = make_plan(rolling(), 30)
    both = interleave(plan, 3, 8)
    assert (both.num_latents, both.num_frames) == (3 * plan.num_latents, 3 * plan.num_frames)
