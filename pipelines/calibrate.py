"""Costs of passes by measurement: this machine times the model of a run, with random inputs, in a few seconds."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from longvid.checkpoints.diffusers_folder import open_folder
from longvid.models.attention import KV
from longvid.models.cache import Cache, Entry
from longvid.models.dit import DiT
from longvid.models.vae_config import VAEConfig
from longvid.passes import Pass
from longvid.plan import Plan
from longvid.sampler import Point, Queue, noise_of, sample, timesteps_of
from longvid.types import Latents
from parallel.cost import Costs, ModelShape
from pipelines.configure import Run
from pipelines.generate import decode, dit_of, vae_of


@dataclass(frozen=True, kw_only=True)
class Care:
    """How long a calibration takes: the mean is of `repeats` calls at least, and of up to `REPEATS` within `short_s`
    seconds; what most of a run is made of is timed over `long_s`. At most `kinds` of passes are timed, the most common
    first, and what the head does between passes by the first `rehearsed` of them."""

    repeats: int
    short_s: float
    long_s: float
    kinds: int
    rehearsed: int


REPEATS = 5
BRIEF = Care(repeats=1, short_s=0.04, long_s=0.0, kinds=2, rehearsed=30)
"""To choose a layout."""
LONG = Care(repeats=1, short_s=0.1, long_s=0.6, kinds=7, rehearsed=120)
"""To predict how long a run takes that follows."""
THOROUGH = Care(repeats=REPEATS, short_s=0.1, long_s=0.0, kinds=7, rehearsed=120)
"""To predict how long a run would take."""
TEXT_TOKENS = 160
LEAST_LAYERS, CACHED = 3, 64 * 2**20
"""Layers timed in a row: at least so many, and of small models as many as have weights of that many bytes: a CPU's
caches would hold those of fewer, and a pass through all layers finds none there."""


def shape_of(run: Run) -> ModelShape:
    """Sizes of a run's model."""
    folder = open_folder(run.model)
    config, vae = folder.transformer, VAEConfig.from_dict(folder.vae)
    height, width = run.height // vae.spatial_factor, run.width // vae.spatial_factor
    patch = config.get("patch_size", [1, 2, 2])
    return ModelShape(
        num_layers=config["num_layers"], dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"], num_rows=height // patch[1],
        tokens_per_latent=(height // patch[1]) * (width // patch[2]),
        latent_bytes=4 * config["in_channels"] * height * width, bytes_per_element=2 if run.dtype == "bfloat16" else 4,
        front_bytes=vae.temporal_factor * vae.front_channels * run.height * run.width // (vae.patch_size or 1) ** 2
        * (2 if run.vae_dtype == "bfloat16" else 4), frame_bytes=vae.temporal_factor * 3 * run.height * run.width,
    )  # fmt: skip


@torch.no_grad()
def measured_costs(
    run: Run,
    plan: Plan,
    *,
    latency: float,
    bandwidth: float,
    message: float = 0.0,
    care: Care = THOROUGH,
) -> Costs:
    """Costs of the run's model on this machine, with the threads that torch has now; links as given.

    Some layers in a row are timed on passes of the plan, their context joined and their features kept as in a run, and
    the three coefficients fitted to that; the ends are what the end layers take besides. Times are means, since a run
    is their sum. What the head does between passes is timed by carrying out a part of the plan.
    """
    num_layers = open_folder(run.model).transformer["num_layers"]
    few, more = range(1), range(min(max(LEAST_LAYERS, CACHED // shape_of(run).layer_bytes), num_layers))
    parts = {layers: dit_of(run, layers) for layers in (few, more, range(num_layers - 1, num_layers))}
    shown = _shown(plan)[: care.kinds]
    layer, first, last = [], [], []
    for i, p in enumerate(shown):
        calls = [_forward(part, run, p) for part in parts.values()]
        short, long, end = _times(run, calls, care, 0.0 if i else 1.5 * care.long_s)
        layer.append(max((long - short) / (len(more) - 1), 1e-9) if len(more) > 1 else short)
        first.append(max(0.0, short - layer[-1]) / p.num_latents)
        last.append(max(0.0, end - layer[-1]) / p.num_latents)
    decode, front = _decode_times(run, plan, care)
    fixed, per_latent, per_pair = _fit([(p.num_latents, p.num_pairs) for p in shown], layer)
    return Costs(fixed=fixed, per_latent=per_latent, per_pair=per_pair, first=statistics.median(first),
                 last=statistics.median(last), turn=_turn_time(run, plan, parts[few], care), decode=decode, front=front,
                 latency=latency, bandwidth=bandwidth, message=message)  # fmt: skip


def _shown(plan: Plan) -> list[Pass]:
    """Passes to time: of the three most common sizes, and of the least and greatest latents and pairs of them."""
    kinds: dict[tuple[int, int], list[Pass]] = {}
    for p in plan.passes:
        kinds.setdefault((p.num_latents, p.num_pairs), []).append(p)
    common = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:3]
    extremes = [choose(kinds, key=key) for choose in (min, max) for key in (lambda k: k, lambda k: k[::-1])]
    return [kinds[kind][0] for kind in dict.fromkeys([*common, *extremes])]


def _fit(cases: list[tuple[int, int]], times: list[float]) -> tuple[float, ...]:
    """Coefficients of `fixed + per_latent n + per_pair m`, none negative, least in relative error.

    The first case is the most common one, and counts as much as all others.
    """
    weights = np.ones(len(cases))
    weights[0] = max(1, len(cases) - 1)
    rows = weights[:, None] * np.array([[1, *case] for case in cases], float) / np.array(times)[:, None]
    used = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(rows[:, used], weights, rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(3)
    coefficients[used] = np.maximum(found, 0)
    return tuple(map(float, coefficients))


def _forward(part: DiT, run: Run, p: Pass) -> Callable[[], object]:
    """A pass through some layers over random latents (or hidden states) and a cache of random features."""
    config, (channels, height, width) = part.config, _latent_size(run)
    _, patch_height, patch_width = config.patch_size
    new = lambda *sizes: torch.randn(sizes, device=run.device).to(part.proj_dtype)  # noqa: E731
    x = new(1, channels, p.num_latents, height, width)
    if not part.is_first:
        x = new(1, p.num_latents, height // patch_height, width // patch_width, config.dim)
    heads = (height // patch_height * (width // patch_width), config.num_attention_heads, config.attention_head_dim)
    entries = {}
    for piece in p.reads:
        kv = KV(*(new(1, piece.stop - piece.start, *heads) for _ in range(2)))
        entries[piece.block, p.lane] = Entry(piece.step, piece.start, dict.fromkeys(part.layers, kv))
    cache, text = Cache(entries), part.text_features(new(1, TEXT_TOKENS, config.text_dim))
    timesteps = timesteps_of(p, torch.device(run.device))

    def forward() -> Cache:
        _, features = part(x, timesteps, text, cache.contexts(p), keep=bool(p.writes))
        return cache.after(p, features)

    return forward


def _turn_time(run: Run, plan: Plan, part: DiT, care: Care) -> float:
    """Seconds for a pass of all but its model: a part of the plan carried out, less the time of its first layer, which
    stands for the model and leaves the CPU's caches as that does.

    On a GPU it is the time of launching it.
    """
    device = torch.device(run.device)
    text = part.text_features(torch.randn(1, TEXT_TOKENS, part.config.text_dim, device=device).to(part.proj_dtype))
    plan, ends, spent = replace(plan, passes=plan.passes[: care.rehearsed]), [], []

    def layer(x: Latents, *inputs, **options) -> tuple:
        spent.extend(time.perf_counter() - end for end in ends[-1:])
        _, features = part(x, *inputs, **options)
        ends.append(time.perf_counter())
        return x, features

    noise = noise_of(plan, 0, *_latent_size(run))
    start = Point(done=0, cache=Cache(), queue=Queue(plan, noise, device, _ready(run, plan)))
    deque(sample(plan, layer, lambda p: text, noise, start=start), maxlen=0)
    return float(np.mean(spent[len(spent) // 3 :])) if spent else 0.0


def _ready(run: Run, plan: Plan) -> list[Latents]:
    """Random latents of the blocks that are there from the start."""
    channels, height, width = _latent_size(run)
    sizes = plan.block_sizes[: plan.num_ready]
    return [torch.randn(1, channels, size, height, width, device=run.device) for size in sizes]


def _latent_size(run: Run) -> tuple[int, int, int]:
    folder = open_folder(run.model)
    factor = VAEConfig.from_dict(folder.vae).spatial_factor
    return folder.transformer["in_channels"], run.height // factor, run.width // factor


def _decode_times(run: Run, plan: Plan, care: Care) -> tuple[float, float]:
    """Seconds for a latent of the VAE's stream, in a whole block; and those that its front takes of them."""
    vae = vae_of(run)
    factor = vae.config.spatial_factor
    size = plan.method.block_size
    z = torch.randn(1, vae.config.z_dim, size, run.height // factor, run.width // factor, device=run.device)
    _, state = vae.decode(z)
    *_, (_, front_state) = vae.decode_front(z)
    calls = (lambda: decode(vae, z, state), lambda: list(vae.decode_front(z, front_state)))
    whole, front = (seconds / size for seconds in _times(run, calls, care, care.long_s))
    return whole, min(front, whole)


def _times(run: Run, calls: Sequence[Callable[[], object]], care: Care, least_s: float) -> list[float]:
    """Mean seconds of calls, in turn, after a first round; over `least_s` seconds at least.

    One after the other a part of the model would find its weights where no run has them.
    """
    rounds = []
    while (
        len(rounds) <= care.repeats
        or (len(rounds) <= REPEATS and np.sum(rounds) < care.short_s * len(calls))
        or np.sum(rounds) < least_s
    ):
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            if run.device.startswith("cuda"):
                torch.cuda.synchronize(run.device)
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return np.mean(rounds[1:], 0).tolist()
