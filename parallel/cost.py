"""Cost model and simulator of a plan on a grid: what `parallel.execute` will do, when, without doing it. Plain Python.

Times are in seconds, or in any one unit; sizes in bytes.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from longvid.passes import Pass
from longvid.plan import Plan
from parallel.grid import Grid
from parallel.split import split_layers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What sizes depend on: tokens of a latent, rows of them and channels, and the width and depth of the model.

    `front_bytes` are what the front of the VAE's decoder makes of a latent, `frame_bytes` the frames that come of it.
    """

    num_layers: int
    dim: int
    ffn_dim: int
    num_rows: int
    tokens_per_latent: int
    latent_bytes: int
    bytes_per_element: int
    front_bytes: int = 0
    frame_bytes: int = 0

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of a latent: what goes from stage to stage."""
        return self.tokens_per_latent * self.dim * self.bytes_per_element

    def exchanged_bytes(self, num_bands: int) -> float:
        """What a process sends to the other bands for a latent and a layer: queries, keys and values, and back."""
        return 4 * self.hidden_bytes * (num_bands - 1) / num_bands**2

    @property
    def layer_bytes(self) -> int:
        """Weights of a layer: eight projections, the feed-forward and norms."""
        return (8 * self.dim**2 + 2 * self.dim * self.ffn_dim) * self.bytes_per_element


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of a pass through a layer, `fixed + per_latent n + per_pair m` for n latents that see m in all, and of the
    rest.

    `first` and `last` are per latent: embedding; unembedding, in a roofline with the solver. `turn` is what a pass
    takes of the head besides: guidance, solver, noise, and the latents taken up for the next. `decode` is per latent
    that leaves, and `front` what the decoder's front takes of it. A message takes `latency` and its bytes over
    `bandwidth` (bytes per unit of time), beside which work goes on, and `message` of the process at either end, which
    does nothing else then. Bands share what grows with the latents, but for `last`, and a layer has two exchanges
    besides.
    """

    fixed: float = 0.0
    per_latent: float = 1.0
    per_pair: float = 0.0
    first: float = 0.0
    last: float = 0.0
    turn: float = 0.0
    decode: float = 0.0
    front: float = 0.0
    message: float = 0.0
    latency: float = 0.0
    bandwidth: float = float("inf")

    def __post_init__(self):
        for name in self.__dataclass_fields__:
            if not getattr(self, name) >= 0 or (name == "bandwidth" and not self.bandwidth > 0):
                raise ValueError(f"{name}={getattr(self, name)} must not be negative, and bandwidth more than 0; try 1")

    def layer(self, p: Pass, num_bands: int = 1) -> float:
        """A layer's time for a pass, without exchanges."""
        return self.fixed + (self.per_latent * p.num_latents + self.per_pair * p.num_pairs) / num_bands

    def exchange(self, p: Pass, num_bands: int, shape: ModelShape) -> float:
        """A layer's exchanges for a pass: to heads and back."""
        if num_bands == 1:
            return 0.0
        return 2 * self.latency + p.num_latents * shape.exchanged_bytes(num_bands) / self.bandwidth

    def hop(self, num_bytes: float) -> float:
        """A message's time."""
        return self.latency + num_bytes / self.bandwidth

    def at_speed(self, passes: float, decode: float) -> "Costs":
        """The same of a machine that takes so many times as long for passes, and for decoding."""
        slower = {name: passes * getattr(self, name) for name in ("fixed", "per_latent", "per_pair", "first", "last")}
        return replace(self, **slower, decode=decode * self.decode, front=decode * self.front)


def mean_costs(costs: Sequence[Costs]) -> Costs:
    """The mean of what several processes have measured."""
    return Costs(**{name: sum(getattr(c, name) for c in costs) / len(costs) for name in Costs.__dataclass_fields__})


def feeding_order(plan: Plan) -> list[int]:
    """For each pass the index of the pass after which its latents may be taken, -1 for the start.

    That is the last pass before it that updates a block which it covers, and never earlier than for the pass before
    it, so that latents leave in the order of passes.
    """
    after, updated, latest = [], {}, -1
    for i, p in enumerate(plan.passes):
        latest = max([latest, *(updated.get(cover.block, -1) for cover in p.covers)])
        after.append(latest)
        updated.update(dict.fromkeys(p.updates, i))
    return after


def decoding_order(plan: Plan, grid: Grid, start: int = 0) -> dict[int, list[int]]:
    """Where the decoder is cut: the blocks whose back is computed just before a pass, and whose frames are taken just
    after it.

    It is the first pass through the back's process whose latents are taken after the block has left, or as many passes
    through it later as the grid's `decode_lag` says: the process need not wait for what it needs then, and passes for
    which others wait go first. The head has what came of it by the end of that pass. Blocks that leave too late for
    any come at the end, which is counted as a pass, and those that had left before the pass `start` are not among them.
    """
    order, lane = feeding_order(plan), grid.place(grid.back).lane
    due: dict[int, list[int]] = {}
    waiting: deque[tuple[int, int]] = deque()
    through: deque[int] = deque(maxlen=grid.decode_lag + 1)
    for i, p in enumerate(plan.passes[start:], start):
        if lane in (None, p.lane):
            through.append(i)
            while len(through) > grid.decode_lag and waiting and waiting[0][0] <= order[through[0]]:
                due.setdefault(i, []).append(waiting.popleft()[1])
        waiting.extend((i, block) for block in p.emits)
    due[len(plan.passes)] = [block for _, block in waiting]
    return due


def best_split(plan: Plan, grid: Grid, costs: Costs, shape: ModelShape) -> list[range]:
    """Layers of each stage such that the busiest stage has least to do; decoding counts.

    Where the back of the decoder is with the head's twin, which has the same layers, the busier of the two counts.
    """
    k = grid.num_bands
    decoded = plan.num_latents - sum(plan.block_sizes[: plan.num_ready])
    head = costs.turn * len(plan.passes) + (costs.front if grid.back else costs.decode) * decoded
    elsewhere = (costs.decode - costs.front) * decoded if grid.back else 0.0
    first, last = (elsewhere, head) if grid.num_lanes == 1 else (0.0, max(head, elsewhere))
    layer = sum(costs.layer(p, k) + costs.exchange(p, k, shape) for p in plan.passes) / grid.num_lanes
    through = sum(p.num_latents for p in plan.passes) / grid.num_lanes
    return split_layers([layer] * shape.num_layers, grid.num_stages, first=costs.first * through / k + first,
                        last=costs.last * through + last)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What each process does when: `starts[rank, pass]` and `ends`, NaN where a pass does not go through it.

    `decodes` are (start, end, block) on the head; of a decoder that is cut, of its front there, and `backs` on the
    process of its back. `shown` is when the head has each block's frames, `sent` bytes by rank, `message_time` what
    messages take within passes.
    """

    plan: Plan
    grid: Grid
    starts: np.ndarray
    ends: np.ndarray
    decodes: tuple[tuple[float, float, int], ...]
    backs: tuple[tuple[float, float, int], ...]
    shown: tuple[float, ...]
    sent: tuple[int, ...]
    message_time: float

    @property
    def makespan(self) -> float:
        """From the start to the last decoded block."""
        return max(float(np.nanmax(self.ends)), *self.shown)

    @property
    def first_block(self) -> float:
        """When the first block is decoded."""
        return self.shown[0]

    @property
    def pass_time(self) -> float:
        """Time of all passes on all processes, without their messages."""
        return float(np.nansum(self.ends - self.starts)) - self.message_time

    @property
    def decode_time(self) -> float:
        """Time of all decoding, on all processes."""
        return sum(end - start for start, end, _ in self.decodes + self.backs)

    def decoding(self, rank: int) -> tuple[tuple[float, float, int], ...]:
        """When a process decodes what."""
        return (self.decodes if rank == 0 else ()) + (self.backs if rank == self.grid.back else ())

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the makespan in which each process neither computes a pass nor decodes, as in `pipelines.trace`."""
        busy = np.nansum(self.ends - self.starts, axis=1)
        for rank in {0, self.grid.back}:
            busy[rank] += sum(end - start for start, end, _ in self.decoding(rank))
        return tuple(float(1 - x / self.makespan) for x in busy)

    @property
    def mean_idle(self) -> float:
        """The same on average."""
        return float(np.mean(self.idle))


def simulate(plan: Plan, grid: Grid, layers: Sequence[range], costs: Costs, shape: ModelShape) -> Timeline:
    """When each pass goes through each process, by the rules of `parallel.execute.carry_out`.

    A process takes its passes in order, each when its input is there; messages overlap work. The head feeds a pass once
    `feeding_order` allows, takes the answers of all passes in order, and decodes what leaves before it goes on, or the
    front of it, and takes the frames as `decoding_order` says. The bands of a stage go in step, since they exchange in
    every layer; their messages are parts of a whole one.
    """
    num_stages, num_lanes, order, k = grid.num_stages, grid.num_lanes, feeding_order(plan), grid.num_bands
    depth = np.array([len(part) for part in layers], float)
    starts = np.full((grid.world_size, len(plan.passes)), np.nan)
    ends = starts.copy()
    ranks = [[[grid.rank(lane, stage, band) for band in range(k)] for stage in range(num_stages)]
             for lane in range(num_lanes)]  # fmt: skip
    free = np.zeros((num_lanes, num_stages))
    sent, decodes, backs, shown = np.zeros(grid.world_size), [], [], []
    due = decoding_order(plan, grid) if grid.back else {}
    place = grid.place(grid.back)
    left: dict[int, float] = {}
    message_time = 0.0

    def compute_back(block: int) -> None:
        size, own = plan.block_sizes[block], (place.lane or 0, place.stage)
        start = max(free[own], left[block] + costs.hop(size * shape.front_bytes))
        free[own] = start + (costs.decode - costs.front) * size + 2 * costs.message
        backs.append((start, free[own], block))
        sent[0] += size * shape.front_bytes
        sent[grid.back] += size * shape.frame_bytes

    def decode(block: int, start: float) -> float:
        time = costs.front if grid.back else costs.decode
        decodes.append((start, start + time * plan.block_sizes[block], block))
        if not grid.back:
            shown.append(decodes[-1][1])
            return shown[-1]
        left[block] = decodes[-1][1] + costs.message
        return left[block]

    def show(block: int, end: float, head: float) -> float:
        shown.append(max(head, end + costs.hop(plan.block_sizes[block] * shape.frame_bytes)) + costs.message)
        return shown[-1]

    complete, fed = np.zeros(len(plan.passes)), 0.0
    for i, p in enumerate(plan.passes):
        lane = p.lane if num_lanes > 1 else 0
        for block in due.get(i, ()):
            compute_back(block)
        n = p.num_latents
        latents, hidden = n * shape.latent_bytes / k, n * shape.hidden_bytes / k
        fed = max(fed, complete[order[i]] if order[i] >= 0 else 0.0)
        is_abroad = ranks[lane][0][0] != 0
        work = depth * (costs.layer(p, k) + costs.exchange(p, k, shape))
        work[0] += costs.first * n / k
        work[-1] += costs.last * n
        messages = np.full(num_stages, 2)  # one comes, one goes
        messages[0] -= not (is_abroad or k > 1)
        messages[-1] -= not (lane > 0 or k > 1)
        work += costs.message * messages
        message_time += k * costs.message * messages.sum()
        before = np.concatenate([[0.0], np.cumsum(work[:-1] + costs.hop(hidden))])
        ready = free[lane] - before
        ready[0] = max(ready[0], fed + (costs.hop(latents) if is_abroad or k > 1 else 0.0))
        begin = np.maximum.accumulate(ready) + before
        starts[ranks[lane], i], ends[ranks[lane], i] = begin[:, None], (begin + work)[:, None]
        free[lane] = begin + work
        sent[0] += latents * (k if is_abroad else k - 1)
        sent[ranks[lane][:-1]] += hidden
        sent[ranks[lane]] += depth[:, None] * n * shape.exchanged_bytes(k)
        sent[[rank for rank in ranks[lane][-1] if rank]] += latents
        answer = free[lane, -1] + (costs.hop(latents) if lane or k > 1 else 0.0)
        told = (k if is_abroad else k - 1) + (k if lane else k - 1)
        head = max(free[0, -1], answer) + costs.message * told + costs.turn
        complete[i] = head
        for block in p.emits:
            head = decode(block, head)
        for _, end, block in backs[len(backs) - len(due.get(i, ())) :]:
            head = show(block, end, head)
        free[0, -1] = head
    for block in due.get(len(plan.passes), ()):
        compute_back(block)
        head = show(block, backs[-1][1], head)
    return Timeline(plan=plan, grid=grid, starts=starts, ends=ends, decodes=tuple(decodes), backs=tuple(backs),
                    shown=tuple(shown), sent=tuple(map(int, sent)), message_time=float(message_time))  # fmt: skip


def peak_features(plan: Plan) -> int:
    """Most latents whose features are kept at once, in one layer, over all lanes (see `longvid.models.cache`)."""
    kept: dict[tuple[int, int], int] = {}
    peak = now = 0
    for p in plan.passes:
        for piece in p.writes:
            now += piece.stop - piece.start - kept.get((piece.block, p.lane), 0)
            kept[piece.block, p.lane] = piece.stop - piece.start
        for block in p.frees:
            now -= kept.pop((block, p.lane), 0)
        peak = max(peak, now)
    return peak


def memory(plan: Plan, grid: Grid, layers: Sequence[range], shape: ModelShape) -> list[dict[str, int]]:
    """Bytes of weights of the layers, of kept features and of activations, of each process, by rank.

    Activations are those of one pass through one layer: hidden states, queries, keys, values and the feed-forward's
    inside, and the context's features joined. Bands share features and activations, not weights. The ends, text encoder
    and VAE come on top.
    """
    tokens = shape.tokens_per_latent * shape.bytes_per_element / grid.num_bands
    widest = max(p.num_latents * (8 * shape.dim + 2 * shape.ffn_dim) + 4 * p.num_context * shape.dim
                 for p in plan.passes)  # fmt: skip
    features = int(2 * shape.dim * tokens * peak_features(plan) / grid.num_lanes)
    found = []
    for rank in range(grid.world_size):
        depth = len(layers[grid.place(rank).stage])
        found.append(
            {"weights": depth * shape.layer_bytes, "features": depth * features, "activations": int(widest * tokens)}
        )
    return found
