"""The feature cache: a value, as large as the plan says and no larger, and never the reason for another number."""

from dataclasses import replace

import pytest
import torch

from longvid.method import Kind, LevelRule, Method
from longvid.models.attention import KV
from longvid.models.cache import Cache
from longvid.passes import Cover, Pass, Slice, View
from longvid.plan import Plan, make_plan
from longvid.sampler import noise_of, sample
from longvid.schedule import Solver
from pipelines.methods import dualparal, rolling, rolling_forcing, self_forcing
from tests.whole_clip import CHANNELS, FPS, HEIGHT, WIDTH, clean, roll_without_features, texts_of, tiny_dit, words

LAYERS, TOKENS, HEADS, HEAD_DIM = 2, 3, 1, 4
BYTES_PER_LATENT = LAYERS * 2 * TOKENS * HEADS * HEAD_DIM * 4

CAUSAL = Method(
    name="causal", kind=Kind.CAUSAL, block_size=2, first_block_size=2, num_steps=3, lag=1, solver=Solver.UNIPC,
    level_rule=LevelRule.UNIFORM, flow_shift=3.0, guidance_scale=3.0, sink=1, history=3, left=4, retire=True,
)  # fmt: skip
TWO_SIDED = replace(
    CAUSAL, name="two-sided", kind=Kind.TWO_SIDED, sink=0, history=0, left=2, right=1, retire=False, guidance_scale=1.0
)
JOINT = replace(CAUSAL, name="joint", kind=Kind.JOINT, solver=Solver.RENOISE, left=0, max_keys=9, context_level=0.1)


def features_of(p: Pass, fill: float = 0.0) -> dict[int, KV]:
    """Made-up features of what a pass covers: `fill`, plus the index of each latent in the pass."""
    each = fill + torch.arange(p.num_latents, dtype=torch.float32).view(1, -1, 1, 1, 1)
    keys = each.expand(1, -1, TOKENS, HEADS, HEAD_DIM)
    return {layer: KV((keys + 100 * layer).clone(), (-keys).clone()) for layer in range(LAYERS)}


def numbers(features: dict[int, list[KV]], layer: int = 0, part: str = "keys") -> list[float]:
    """One number of each latent."""
    return [number for kv in features[layer] for number in getattr(kv, part)[0, :, 0, 0, 0].tolist()]


def one_pass(*covers: Cover, lane: int = 0, before: tuple = (), after: tuple = (), writes: tuple = ()) -> Pass:
    num_latents = sum(cover.stop - cover.start for cover in covers)
    return Pass(0, lane, covers, (View(0, num_latents, before=before, after=after),), writes)


# The cached run is the run that keeps nothing -------------------------------------------------------------------------


def largest_difference(method: Method, num_latents: int, ready: tuple[int, ...] = ()) -> tuple[float, int]:
    """Between the sampler and its slow twin, relative to the latents' size; and the copies that the twin needed."""
    plan, dit, given = make_plan(method, num_latents, ready), tiny_dit(), clean(*ready)
    noise, text = noise_of(plan, 3, CHANNELS, HEIGHT, WIDTH), texts_of(dit, words(0), words(1))
    ours = dict(sample(plan, dit, text, noise, ready=given, fps=FPS))
    theirs, copies = roll_without_features(plan, dit, noise, text, given)
    assert ours.keys() == theirs.keys()
    difference = max((ours[block] - theirs[block]).abs().max() for block in ours)
    return (difference / torch.cat(list(theirs.values()), 2).std()).item(), copies


@pytest.mark.parametrize("method, num_latents, ready, copies", [
    (CAUSAL, 8, (), 8),
    (replace(CAUSAL, lag=3), 7, (), 8),
    (replace(CAUSAL, lag=2, retire=False, solver=Solver.EULER), 7, (1,), 8),
    (replace(CAUSAL, lag=0, guidance_scale=1.0), 8, (), 8),
    (replace(CAUSAL, context_level=0.1, guidance_scale=1.0), 9, (1, 2), 16),
    (replace(CAUSAL, blocks_per_pass=2), 8, (), 8),
    (replace(CAUSAL, blocks_per_pass=3, lag=0, left=3, history=0, retire=False), 9, (1,), 12),
    (TWO_SIDED, 8, (), 3),
    (replace(TWO_SIDED, left=1, right=2, guidance_scale=2.0), 7, (1,), 3),
    (JOINT, 9, (), 14),
])  # fmt: skip
def test_a_run_with_cache_is_the_run_that_recomputes_everything(method, num_latents, ready, copies):
    difference, largest = largest_difference(method, num_latents, ready)
    assert difference <= 1e-4
    assert largest == copies


# A value --------------------------------------------------------------------------------------------------------------


def test_writing_and_freeing_leave_the_old_cache_as_it_was():
    write = one_pass(Cover(0, 1, 0, 2, 500.0), writes=(Slice(0, 1, 0, 2),))
    again = one_pass(Cover(0, 2, 0, 2, 400.0), writes=(Slice(0, 2, 0, 2),))
    read = [one_pass(Cover(1, 0, 0, 2, 999.0), before=(Slice(0, step, 0, 2),)) for step in (1, 2)]
    empty = Cache()
    first = empty.after(write, features_of(write))
    second = first.after(again, features_of(again, fill=10))
    gone = second.after(read[1]._replace(frees=(0,)), features_of(read[1]))
    assert not empty.entries and not gone.entries and gone.num_bytes() == 0
    assert numbers(first.contexts(read[0])[0].before) == [0, 1]
    assert numbers(second.contexts(read[1])[0].before) == [10, 11]
    with pytest.raises(KeyError):
        gone.contexts(read[1])


def test_a_pass_that_neither_writes_nor_frees_leaves_an_equal_cache_of_the_same_tensors():
    write = one_pass(Cover(0, 1, 0, 2, 500.0), writes=(Slice(0, 1, 0, 2),))
    cache = Cache().after(write, features_of(write))
    other = cache.after(one_pass(Cover(1, 0, 0, 2, 999.0)), features_of(write, fill=5))
    assert other.entries == cache.entries
    assert other.entries[0, 0].features[0].keys is cache.entries[0, 0].features[0].keys


def test_another_step_or_latents_that_are_not_kept_are_refused():
    p = one_pass(Cover(0, 1, 0, 4, 500.0), writes=(Slice(0, 1, 1, 3),))
    cache = Cache().after(p, features_of(p))
    assert numbers(cache.contexts(one_pass(before=(Slice(0, 1, 2, 3),)))[0].before) == [2]
    with pytest.raises(AssertionError, match="block 0 is kept at step 1, not 2"):
        cache.contexts(one_pass(before=(Slice(0, 2, 1, 3),)))
    for start, stop in ((0, 2), (2, 4), (0, 4)):
        with pytest.raises(AssertionError, match="latents 1 to 3 are kept"):
            cache.contexts(one_pass(before=(Slice(0, 1, start, stop),)))


def test_lanes_are_apart():
    cache = Cache()
    for lane in (0, 1):
        p = one_pass(Cover(0, 1, 0, 2, 500.0), lane=lane, writes=(Slice(0, 1, 0, 2),))
        cache = cache.after(p, features_of(p, fill=10 * lane))
    reads = [one_pass(lane=lane, before=(Slice(0, 1, 0, 2),)) for lane in (0, 1)]
    assert [numbers(cache.contexts(p)[0].before) for p in reads] == [[0, 1], [10, 11]]
    freed = cache.after(reads[0]._replace(frees=(0,)), {})
    assert list(freed.entries) == [(0, 1)]


def test_slices_are_cut_by_their_place_in_the_pass_and_joined_in_the_plans_order():
    """A prefix of another block comes first; the context is read as listed, not as written."""
    p = one_pass(Cover(4, 1, 2, 3, 500.0), Cover(5, 1, 0, 3, 500.0), writes=(Slice(5, 1, 0, 2), Slice(4, 1, 2, 3)))
    cache = Cache().after(p, features_of(p))
    q = one_pass(Cover(0, 0, 0, 1, 999.0), writes=(Slice(0, 0, 0, 1),))
    cache = cache.after(q, features_of(q, fill=50))
    (context,) = cache.contexts(
        one_pass(before=(Slice(5, 1, 1, 2), Slice(0, 0, 0, 1), Slice(5, 1, 0, 1)), after=(Slice(4, 1, 2, 3),))
    )
    assert numbers(context.before) == [2, 50, 1] and numbers(context.before, layer=1) == [102, 150, 101]
    assert numbers(context.before, part="values") == [-2, -50, -1]
    assert numbers(context.after) == [0]
    (empty,) = cache.contexts(one_pass())
    assert empty.before == {} and empty.after == {}


def test_a_slice_of_a_pass_does_not_hold_the_rest_alive():
    p = one_pass(Cover(0, 1, 2, 4, 500.0), Cover(1, 1, 0, 4, 500.0), writes=(Slice(1, 1, 0, 1),))
    cache = Cache().after(p, features_of(p))
    assert cache.num_bytes() == held_bytes(cache) == BYTES_PER_LATENT


# Its size -------------------------------------------------------------------------------------------------------------


def held_bytes(cache: Cache) -> int:
    """Bytes of the memory that the cached tensors are views of."""
    tensors = [t for entry in cache.entries.values() for kv in entry.features.values() for t in kv]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def walk(plan: Plan) -> list[int]:
    """Bytes kept after each pass; what a pass reads is what the plan says."""
    cache, sizes = Cache(), []
    for p in plan.passes:
        contexts = cache.contexts(p)
        seen = [sum(len(numbers(part)) for part in context[:2] if part) for context in contexts]
        assert seen == [view.num_context for view in p.views]
        cache = cache.after(p, features_of(p))
        sizes.append(cache.num_bytes())
        assert sizes[-1] == held_bytes(cache)
    assert not cache.entries
    return sizes


@pytest.mark.parametrize("method, latents", [
    (rolling(num_steps=4), 1 + 6 + 3 + 3),  # sink (whole blocks), history of the next tick's head, two neighbours
    (rolling(num_steps=4, lag=3), 1 + 6 + 3),
    (rolling(num_steps=4, lag=3, retire=False), 1 + 6),
    (rolling(num_steps=4, lag=4, guidance_scale=1.0), 1 + 6),
    (dualparal(num_steps=5), 8),  # the first latents of the noisier neighbour
    (rolling_forcing(), 3 + 18),
    (self_forcing(), 18),
    (replace(CAUSAL, left=3, history=5, sink=3, retire=False), 4 + 6 + 2),  # whole blocks, though read in part
], ids=lambda value: f"{value.name}-{value.lag}" if isinstance(value, Method) else str(value))  # fmt: skip
def test_a_longer_video_takes_no_more_memory(method, latents):
    first, size = method.first_block_size, method.block_size
    short, long = (walk(make_plan(method, first + size * (blocks - 1))) for blocks in (60, 120))
    assert max(short) == max(long) == method.num_lanes * latents * BYTES_PER_LATENT
    half = len(short) // 2
    assert short[:half] == long[:half] and short[-half:] == long[-half:]
