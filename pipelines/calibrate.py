"""Costs of passes by measurement: this machine times the model of a run, with random inputs, in a few seconds."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from longvid.checkpoints.diffusers_folder import load_dit, load_vae, open_folder
from longvid.models.attention import KV
from longvid.models.cache import Context
from longvid.models.dit import DiT
from longvid.models.vae import VAEConfig
from longvid.plan import Plan
from parallel.cost import Costs, ModelShape
from pipelines.configure import Run

REPEATS = 5
TEXT_TOKENS = 160


def shape_of(run: Run) -> ModelShape:
    """Sizes of a run's model."""
    folder = open_folder(run.model)
    config, vae = folder.transformer, VAEConfig.from_dict(folder.vae)
    height, width = run.height // vae.spatial_factor, run.width // vae.spatial_factor
    patch = config.get("patch_size", [1, 2, 2])
    return ModelShape(
        num_layers=config["num_layers"], dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"], tokens_per_latent=(height // patch[1]) * (width // patch[2]),
        latent_bytes=4 * config["in_channels"] * height * width, bytes_per_element=2 if run.dtype == "bfloat16" else 4,
    )  # fmt: skip


@torch.no_grad()
def measured_costs(run: Run, plan: Plan, *, latency: float, bandwidth: float, repeats: int = REPEATS) -> Costs:
    """Costs of the run's model on this machine, with the threads that torch has now; links as given.

    Layers are timed on the plan's shortest and longest pass and one twice as long, without and with the longest
    context, and the three coefficients fitted to that; the ends are what the end layers take besides. Times are
    medians of `repeats` calls.
    """
    num_layers = open_folder(run.model).transformer["num_layers"]
    few, more = range(1), range(min(3, num_layers))
    parts = {layers: _part(run, layers) for layers in (few, more, range(num_layers - 1, num_layers))}
    sizes = [p.num_latents for p in plan.passes]
    longest = max(p.num_context for p in plan.passes)
    cases = [(n, c) for n in sorted({min(sizes), max(sizes), 2 * max(sizes)}) for c in sorted({0, longest})]
    layer, first, last = {}, [], []
    for n, c in cases:
        short, long, end = (_time(run, _forward(part, run, n, c), repeats) for part in parts.values())
        layer[n, c] = max((long - short) / (len(more) - 1), 1e-9) if len(more) > 1 else short
        first.append(max(0.0, short - layer[n, c]) / n)
        last.append(max(0.0, end - layer[n, c]) / n)
    fixed, per_latent, per_pair = _fit(cases, [layer[case] for case in cases])
    return Costs(fixed=fixed, per_latent=per_latent, per_pair=per_pair, first=statistics.median(first),
                 last=statistics.median(last), decode=_decode_time(run, repeats), latency=latency,
                 bandwidth=bandwidth)  # fmt: skip


def _fit(cases: list[tuple[int, int]], times: list[float]) -> tuple[float, ...]:
    """Coefficients of `fixed + per_latent n + per_pair n (n + c)`, none negative, least in relative error."""
    rows = np.array([[1, n, n * (n + c)] for n, c in cases], float) / np.array(times)[:, None]
    used = [0, 1, 2]
    while True:
        found = np.linalg.lstsq(rows[:, used], np.ones(len(cases)), rcond=None)[0]
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(3)
    coefficients[used] = np.maximum(found, 0)
    return tuple(map(float, coefficients))


def _part(run: Run, layers: range) -> DiT:
    return load_dit(open_folder(run.model), getattr(torch, run.dtype), run.device, layers).eval()


def _forward(part: DiT, run: Run, num_latents: int, num_context: int) -> Callable[[], object]:
    """A forward of some layers over random latents (or hidden states) that see random features."""
    config, shape = part.config, shape_of(run)
    factor = VAEConfig.from_dict(open_folder(run.model).vae).spatial_factor
    height, width = run.height // factor, run.width // factor
    new = lambda *sizes: torch.randn(sizes, device=run.device).to(part.proj_dtype)  # noqa: E731
    x = new(1, config.in_channels, num_latents, height, width)
    if not part.is_first:
        x = new(1, num_latents, height // config.patch_size[1], width // config.patch_size[2], config.dim)
    heads = (config.num_attention_heads, config.attention_head_dim)
    kv = KV(*(new(1, num_context, shape.tokens_per_latent, *heads) for _ in range(2)))
    context = Context(dict.fromkeys(part.layers, kv) if num_context else {})
    text = part.text_features(new(1, TEXT_TOKENS, config.text_dim))
    timesteps = torch.full((1, num_latents), 500.0, device=run.device)
    return lambda: part(x, timesteps, text, context)


def _decode_time(run: Run, repeats: int) -> float:
    """Seconds for a latent of the VAE's stream."""
    vae = load_vae(open_folder(run.model), torch.float32, run.device).eval()
    factor = vae.config.spatial_factor
    z = torch.zeros(1, vae.config.z_dim, 2, run.height // factor, run.width // factor, device=run.device)
    _, state = vae.decode(z)
    return _time(run, lambda: vae.decode(z, state), repeats) / 2


def _time(run: Run, call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if run.device.startswith("cuda"):
            torch.cuda.synchronize(run.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
