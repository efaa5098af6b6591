"""The matrix is SkyReels-V2's; and a plan carried out without tensors makes each block once, from what is there."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest

from longvid.method import Kind, LevelRule, Method
from longvid.plan import Plan, cut_into_blocks, make_plan, num_latents_of, rolling_steps
from longvid.schedule import Solver
from pipelines.methods import METHODS, make_method

READY = ((), (1,), (3,), (5, 3), (1, 4, 4), (2, 7, 1, 6), (25, 20))


# The matrix -----------------------------------------------------------------------------------------------------------


def skyreels_matrix(num_blocks, num_steps, ar_step, num_ready):
    """SkyReels-V2's recurrence, to the letter: states (0 waits, k is about to take step k, N + 1 is done) and masks."""
    state = [num_steps + 1] * num_ready + [0] * (num_blocks - num_ready)
    states, masks = [], []
    while any(k < num_steps for k in state):
        row = []
        for b in range(num_blocks):
            row.append(state[b] + 1 if b == 0 or state[b - 1] >= num_steps else row[b - 1] - ar_step)
        row = [min(max(k, 0), num_steps + 1) for k in row]
        states.append(row)
        masks.append([new != old and new != num_steps + 1 for new, old in zip(row, state, strict=True)])
        state = row
    return states, masks


def as_skyreels(rows, num_steps):
    """Our rows in its words: a block takes a step in a row if the next row has it a step further."""
    masks = [[a != b for a, b in zip(*pair, strict=True)] for pair in pairwise(rows)]
    states = [
        [step + (moves or step == num_steps) for step, moves in zip(row, mask, strict=True)]
        for row, mask in zip(rows, masks, strict=False)
    ]
    return states, masks


def random_matrices(count):
    rng = Random(0)
    for _ in range(count):
        num_steps, num_blocks = rng.randint(1, 20), rng.randint(1, 14)
        yield num_blocks, num_steps, rng.randint(0, num_steps), rng.randint(0, num_blocks - 1)


@pytest.mark.parametrize(
    "num_blocks, lag, num_ready, num_rows",
    [(25, 0, 0, 30), (5, 5, 0, 50), (5, 5, 1, 45), (4, 5, 1, 40), (5, 30, 0, 150), (25, 5, 0, 150), (13, 6, 0, 102)],
)
def test_rows_of_skyreels(num_blocks, lag, num_ready, num_rows):
    """25 latents, 30 steps: synchronous, blocks of 5 at ar_step 5, with a prefix of 5, the last window of 20, block
    autoregression, single latents at ar_step 5; and 65 latents in one matrix at ar_step 6."""
    rows = rolling_steps(num_blocks, 30, lag, num_ready)
    assert len(rows) == num_rows + 1
    assert as_skyreels(rows, 30) == skyreels_matrix(num_blocks, 30, lag, num_ready)


def test_matrix_is_skyreels():
    for num_blocks, num_steps, lag, num_ready in random_matrices(300):
        rows = rolling_steps(num_blocks, num_steps, lag, num_ready)
        assert as_skyreels(rows, num_steps) == skyreels_matrix(num_blocks, num_steps, lag, num_ready)


def test_matrix_starts_all_noise_and_ends_all_clean_and_nobody_overtakes():
    for num_blocks, num_steps, lag, num_ready in random_matrices(300):
        rows = rolling_steps(num_blocks, num_steps, lag, num_ready)
        assert rows[0] == (num_steps,) * num_ready + (0,) * (num_blocks - num_ready)
        assert rows[-1] == (num_steps,) * num_blocks
        assert all(left >= right for row in rows for left, right in pairwise(row))
        taken = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(rows)]
        assert all(any(row) and set(row) <= {0, 1} for row in taken)
        busy = [[left - right for left, right in pairwise(row) if left < num_steps and right > 0] for row in rows]
        assert all(gap == lag for row in busy for gap in row)


def test_with_steps_of_its_own_the_first_block_is_clean_before_another_begins():
    rows = rolling_steps(4, num_steps=3, lag=1, first_steps=2)
    assert rows == [
        (0, 0, 0, 0), (1, 0, 0, 0), (2, 0, 0, 0), (2, 1, 0, 0), (2, 2, 1, 0), (2, 3, 2, 1), (2, 3, 3, 2), (2, 3, 3, 3),
    ]  # fmt: skip
    assert rolling_steps(4, 3, 1, 1, first_steps=3) == rolling_steps(4, 3, 1, 1), "what is ready needs no time"
    for num_blocks, num_steps, lag, _ in random_matrices(100):
        for first_steps in (1, num_steps, 2 * num_steps):
            rows = rolling_steps(num_blocks, num_steps, lag, first_steps=first_steps)
            alone = [(step, *[0] * (num_blocks - 1)) for step in range(first_steps)]
            others = rolling_steps(num_blocks - 1, num_steps, lag) if num_blocks > 1 else [()]
            assert rows == [*alone, *((first_steps, *row) for row in others)]


# Plans, carried out on names ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """Executes a plan without tensors: the latents, the solver and the cache as `sampler` and `cache` keep them."""

    plan: Plan
    steps: list[int] = field(init=False)
    latents: set[int] = field(init=False)
    dropped: set[int] = field(default_factory=set)
    cache: dict = field(default_factory=dict)
    covered: Counter = field(default_factory=Counter)
    emitted: list[int] = field(default_factory=list)
    rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    peak_features: Counter = field(default_factory=Counter)
    peak_latents: int = 0

    def __post_init__(self):
        plan = self.plan
        self.steps = [plan.method.num_steps] * plan.num_ready + [0] * (len(plan.block_sizes) - plan.num_ready)
        self.latents = set(range(plan.num_ready))
        for i in range(0, len(plan.passes), plan.method.num_lanes):
            self.check_lanes(plan.passes[i : i + plan.method.num_lanes])
        for p in plan.passes:
            self.rows.setdefault(p.tick, tuple(self.steps))
            self.cover(p)
            self.read(p)
            self.write(p)
            self.update(p)
            self.let_go(p)
            self.measure(p)

    def check_lanes(self, lanes):
        """The lanes of one pass follow each other and differ in nothing; the solver steps after the last."""
        alike = {p._replace(lane=0, updates=(), emits=(), frees=(), drops=()) for p in lanes}
        assert len(alike) == 1 and [p.lane for p in lanes] == list(range(self.plan.method.num_lanes))
        assert not any(p.updates or p.emits for p in lanes[:-1])
        assert len({p.frees for p in lanes}) == 1

    def cover(self, p):
        assert p.covers
        for cover in p.covers:
            assert cover.block not in self.dropped and cover.step == self.steps[cover.block]
            assert 0 <= cover.start < cover.stop <= self.plan.block_sizes[cover.block]
            self.latents.add(cover.block)
        starts = [(self.plan.starts[c.block] + c.start, self.plan.starts[c.block] + c.stop) for c in p.covers]
        assert all(before[1] == after[0] for before, after in pairwise(starts)), "a pass covers one stretch of time"

    def read(self, p):
        for piece in p.reads:
            kept = self.cache[piece.block, p.lane]
            assert kept.step == piece.step and kept.start <= piece.start < piece.stop <= kept.stop

    def write(self, p):
        for piece in p.writes:
            cover = next(c for c in p.covers if c.block == piece.block)
            assert cover.step == piece.step and cover.start <= piece.start < piece.stop <= cover.stop
            self.cache[piece.block, p.lane] = piece

    def update(self, p):
        updated = [c for c in p.covers if c.block in p.updates]
        assert sorted(c.block for c in updated) == sorted(set(p.updates))
        for cover in updated:
            assert cover.block >= self.plan.num_ready and (cover.start, cover.stop) == (
                0,
                self.plan.block_sizes[cover.block],
            )
            self.covered[cover.block, cover.step] += 1
            self.steps[cover.block] += 1

    def let_go(self, p):
        clean = self.plan.num_ready + len(self.emitted)
        for block in p.emits:
            assert block in self.latents and self.steps[block] == self.plan.schedule_of(block).num_steps
            self.emitted.append(block)
            clean += 1
        rest = self.steps[clean : clean + 1]
        assert not rest or rest[0] < self.plan.schedule_of(clean).num_steps, "a clean block leaves at once"
        for block in p.frees:
            del self.cache[block, p.lane]
        for block in p.drops:
            self.latents.discard(block)
            assert block not in self.dropped
            self.dropped.add(block)

    def measure(self, p):
        held = Counter()
        for (_, lane), piece in self.cache.items():
            held[lane] += piece.stop - piece.start
        self.peak_features |= held
        self.peak_latents = max(self.peak_latents, sum(self.plan.block_sizes[b] for b in self.latents))


def hold(plan: Plan) -> Run:
    """Carry a plan out and assert that all was made, once, in order, and that nothing is left over."""
    run = Run(plan)
    num_blocks, num_steps = len(plan.block_sizes), plan.method.num_steps
    made = range(plan.num_ready, num_blocks)
    counts = [num_steps] * num_blocks
    counts[0] = num_steps if plan.num_ready else plan.method.first_steps or num_steps
    assert counts == [plan.schedule_of(block).num_steps for block in range(num_blocks)]
    assert run.covered == Counter((block, step) for block in made for step in range(counts[block]))
    assert run.emitted == list(made) and run.steps == counts
    assert not run.cache and not run.latents and run.dropped == set(range(num_blocks))
    if not plan.method.window:
        rows = rolling_steps(num_blocks, num_steps, plan.method.lag, plan.num_ready, plan.method.first_steps)
        assert run.rows == dict(enumerate(rows[:-1])), "the plan walks down the matrix, tick by tick"
    return run


def random_method(rng: Random) -> Method:
    kind, num_steps, size = rng.choice(list(Kind)), rng.randint(1, 12), rng.randint(1, 8)
    reach = size if kind is Kind.TWO_SIDED else 12
    window = rng.randint(1, 30) if kind is Kind.JOINT and rng.random() < 0.5 else 0
    return Method(
        name="random", kind=kind, block_size=size, first_block_size=rng.randint(1, 12), num_steps=num_steps,
        lag=rng.choice([0, 1, num_steps, rng.randint(0, num_steps)]),
        first_steps=0 if window else rng.choice([0, num_steps, rng.randint(1, 24)]),
        solver=rng.choice(list(Solver)), level_rule=LevelRule.UNIFORM, flow_shift=3.0,
        guidance_scale=rng.choice([1.0, 4.0]),
        sink=rng.choice([0, 3, rng.randint(0, 9)]), history=rng.choice([0, rng.randint(1, 20)]),
        left=rng.choice([0, rng.randint(1, reach)]), right=rng.choice([0, rng.randint(1, reach)]),
        max_keys=rng.choice([0, rng.randint(size + 1, 30)]), retire=rng.random() < 0.6,
        retire_sees_sink=rng.random() < 0.5, context_level=rng.choice([0.0, 0.02]), window=window,
        overlap=rng.randrange(window) if window else 0, condition_level=rng.choice([0.0, 0.02]),
    )  # fmt: skip


def random_length(rng: Random) -> tuple[int, tuple[int, ...]]:
    ready = rng.choice(READY)
    return sum(ready) + rng.randint(1, 90 - sum(ready)), ready


@pytest.mark.parametrize("name", METHODS)
def test_presets_make_each_block_once_from_what_is_there(name):
    rng = Random(name)
    for num_steps in (1, 2, 4, 7, None):
        for guidance_scale in (1.0, 5.0):
            changes = {"num_steps": num_steps} if num_steps else {}
            method = make_method(name, guidance_scale=guidance_scale, **changes)
            num_latents, ready = random_length(rng)
            plan = make_plan(method, num_latents, ready)
            assert plan.num_latents == num_latents and plan.block_sizes[: len(ready)] == ready
            hold(plan)


def test_any_method_makes_each_block_once_from_what_is_there():
    rng = Random(1)
    for _ in range(150):
        method, (num_latents, ready) = random_method(rng), random_length(rng)
        plan = make_plan(method, num_latents, ready)
        assert plan.num_latents == num_latents and plan.num_frames == 4 * num_latents - 3
        assert num_latents_of(plan.num_frames) == num_latents
        assert all(size <= method.block_size for size in plan.block_sizes[max(1, len(ready)) :])
        hold(plan)


def test_every_length_works():
    for name in METHODS:
        method = make_method(name, num_steps=2, guidance_scale=1.0)
        for num_latents in range(1, 61):
            assert hold(make_plan(method, num_latents)).plan.num_latents == num_latents


@pytest.mark.parametrize("name", METHODS)
def test_memory_does_not_grow_with_length(name):
    method = make_method(name, num_steps=4, guidance_scale=1.0)
    short, long = (hold(make_plan(method, num_latents, (1,))) for num_latents in (241, 481))
    assert short.peak_features == long.peak_features and short.peak_latents == long.peak_latents < 80
    assert short.peak_features[0] <= method.sink + method.history + method.left + method.right + 2 * method.block_size


def test_features_are_held_only_until_they_are_read_for_the_last_time_as_they_are():
    """Those of noisy blocks serve their neighbours within a tick; between ticks there are the sink's and clean ones."""
    plan = make_plan(replace(make_method("rolling", num_steps=4, guidance_scale=1.0), first_steps=0), 40)
    held, between = set(), {}
    for p, after in pairwise(plan.passes):
        held = (held | {piece.block for piece in p.writes}) - set(p.frees)
        if after.tick > p.tick:
            between[p.tick] = sorted(held)
    assert between == {tick: sorted({0, tick - 5, tick - 4} & set(range(tick - 3))) for tick in between}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_record_says(name):
    method = make_method(name)
    assert Method.from_dict(json.loads(json.dumps(asdict(method)))) == method


def test_ready_blocks_are_at_most_read():
    method = make_method("rolling", num_steps=2, guidance_scale=1.0)
    plan = make_plan(method, 40, (1, 3, 3, 3, 3, 3))
    retired = [p.covers[0].block for p in plan.passes if p.tick == 0 and p.covers[0].step == 2]
    assert retired == list(range(6)), "the first is the sink, the last nine are history, and each sees the one before"
    assert not [p for p in plan.passes if set(p.updates + p.emits) & set(range(6))]
    for name in ("dualparal", "skyreels-sync", "skyreels-async"):
        plan = make_plan(make_method(name, num_steps=2), 60, (5, 5, 5, 5))
        read = {cover.block for p in plan.passes for cover in p.covers if cover.block < 4}
        assert read <= {2, 3} and plan.passes[0].drops[:2] == (0, 1)


def test_a_block_leaves_with_its_last_step():
    """The head leaves in the pass of its last step: the first alone, the others one tick after the one before."""
    plan = make_plan(make_method("rolling", num_steps=4, guidance_scale=1.0), 28)
    left = {block: p.tick for p in plan.passes for block in p.emits}
    assert left == {0: 3} | {block: block + 6 for block in range(1, 10)}
    sync = make_plan(replace(plan.method, lag=0, first_steps=0), 28)
    ends = defaultdict(list)
    for p in sync.passes:
        ends[p.tick].extend(p.emits)
    assert ends[3] == list(range(10)) and not ends[0] + ends[1] + ends[2]


# Lengths --------------------------------------------------------------------------------------------------------------


def test_cut_into_blocks():
    assert cut_into_blocks(25, 5, 5) == (5,) * 5
    assert cut_into_blocks(10, 4, 3) == (4, 3, 3)
    assert cut_into_blocks(11, 1, 4) == (1, 4, 4, 2)
    assert cut_into_blocks(2, 16, 8) == (2,)
    assert cut_into_blocks(0, 3, 3) == ()


def test_no_block_crosses_the_end_of_a_window():
    method = replace(make_method("skyreels-async"), first_block_size=7, block_size=4)
    assert make_plan(method, 50).block_sizes == (7, 4, 4, 4, 4, 2, *[4] * 5, 4, 1)
    assert make_plan(method, 45, (1,)).block_sizes == (1, *[4] * 11)
    assert make_plan(method, 52, (9, 2)).block_sizes == (9, 2, *[4] * 10, 1)


def test_frames_are_one_and_four_for_each_latent_more():
    assert [num_latents_of(frames) for frames in (1, 5, 81, 97, 1457)] == [1, 2, 21, 25, 365]


@pytest.mark.parametrize(
    "num_frames, said",
    [
        (0, "num_frames=0 must be at least 1; try 81"),
        (-7, "num_frames=-7 must be at least 1; try 81"),
        (2, "num_frames=2 must be 4n + 1; try 1 or 5"),
        (80, "num_frames=80 must be 4n + 1; try 77 or 81"),
        (120, "num_frames=120 must be 4n + 1; try 117 or 121"),
    ],
)
def test_no_such_number_of_frames(num_frames, said):
    with pytest.raises(ValueError) as error:
        num_latents_of(num_frames)
    assert str(error.value) == said


def test_nothing_left_to_make():
    method = make_method("rolling")
    for num_latents, ready in ((0, ()), (-4, ()), (1, (1,)), (8, (5, 3)), (2, (3,))):
        with pytest.raises(ValueError, match=f"so {num_latents} must be more; try {sum(ready) + 1}$"):
            make_plan(method, num_latents, ready)
        make_plan(method, sum(ready) + 1, ready)
