"""What tests of whole clips share: a tiny random model whose numbers matter, runs of it, and the slow twin.

The twin of a run is one that keeps no features at all. For each pass it lays out copies of every earlier pass whose
features are read, directly or through others, and runs the model once over all of them: a dense mask lets each copy
see itself and the latents it reads, and each copy has the positions at which its reader finds it. A copy has a single
reader, so nothing is shared, and nothing is remembered but the latents of each block at each step.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import pytest
import torch

from longvid.flow import add_noise, guide, solver_step
from longvid.models import dit as dit_module
from longvid.models.attention import Rotation, rotation
from longvid.models.dit import SKYREELS, DiT, DiTConfig
from longvid.passes import Pass, Slice
from longvid.plan import Plan
from longvid.sampler import NoiseOf, noise_of, sample
from longvid.types import Latents, Text

CHANNELS, HEIGHT, WIDTH = 4, 4, 6
FPS = 16


def tiny_dit(seed: int = 0, **shape: int) -> DiT:
    """Random weights: velocities of size 1, and attention sharp enough that every key and its place count."""
    config = DiTConfig(
        class_name=SKYREELS, inject_sample_info=True, freq_dim=32,
        **{"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS, "out_channels": CHANNELS,
           "text_dim": 8, "ffn_dim": 40, "num_layers": 2, **shape},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = DiT(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        if "norm" in name and name.endswith("weight"):
            parameter.add_(2 if "attn" in name else 1)
    return model


def words(seed: int, dim: int = 8) -> Text:
    """Text states of a made-up prompt."""
    return torch.randn(1, 5, dim, generator=torch.Generator().manual_seed(1000 + seed))


def texts_of(dit: DiT, *prompts: Text) -> Callable[[Pass], dict]:
    """What the sampler asks for: each lane's text."""
    features = [dit.text_features(prompt) for prompt in prompts]
    return lambda p: features[p.lane]


def roll(
    plan: Plan, dit: DiT, seed: int = 0, ready: Sequence[Latents] = (), prompts: Sequence[Text] = (words(0), words(1))
) -> dict[int, Latents]:
    """The blocks that the sampler makes."""
    noise = noise_of(plan, seed, CHANNELS, HEIGHT, WIDTH)
    return dict(sample(plan, dit, texts_of(dit, *prompts), noise, ready=ready, fps=FPS))


def whole(blocks: dict[int, Latents]) -> Latents:
    """A run's blocks one behind the other."""
    assert list(blocks) == sorted(blocks)
    return torch.cat(list(blocks.values()), dim=2)


def clean(*sizes: int, seed: int = 7) -> list[Latents]:
    """Clean latents of blocks that are there from the start."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, CHANNELS, size, HEIGHT, WIDTH, generator=generator) for size in sizes]


class Copies:
    """Copies of the pass `index` and of all whose features it reads: their latents' places, and who sees what."""

    def __init__(self, plan: Plan, index: int):
        self.passes, self.indices, self.places, self.seen = plan.passes, [], [], []
        self._add(index, 0)
        self.starts = list(accumulate((self.passes[i].num_latents for i in self.indices), initial=0))

    def _add(self, index: int, place: int) -> int:
        """One copy whose first latent stands at `place`; its number."""
        p, number = self.passes[index], len(self.indices)
        self.indices.append(index)
        self.places.extend(range(place, place + p.num_latents))
        self.seen.append(reads := [])
        for view in p.views:
            rows = slice(view.start, view.stop)
            reads.append((rows, number, view.own, view.stop))
            at = place + view.own - sum(piece.stop - piece.start for piece in view.before)
            for piece in view.before + view.after:
                if at == place + view.own:
                    at = place + view.stop
                writer, offset = self._writer(index, piece)
                reads.append((rows, self._add(writer, at - offset), offset, offset + piece.stop - piece.start))
                at += piece.stop - piece.start
        return number

    def _writer(self, index: int, piece: Slice) -> tuple[int, int]:
        """The last pass before `index` that left the latents of `piece`, and where they stand in it."""
        lane = self.passes[index].lane
        for i in range(index - 1, -1, -1):
            p, offset = self.passes[i], 0
            if p.lane == lane and any(
                w[:2] == piece[:2] and w.start <= piece.start < piece.stop <= w.stop for w in p.writes
            ):
                for cover in p.covers:
                    if cover.block == piece.block:
                        return i, offset + piece.start - cover.start
                    offset += cover.stop - cover.start
        raise AssertionError(f"nobody leaves {piece}")

    def mask(self) -> torch.Tensor:
        """True where a latent may see another."""
        mask = torch.zeros(len(self.places), len(self.places), dtype=torch.bool)
        for number, reads in enumerate(self.seen):
            for rows, other, start, stop in reads:
                own = slice(self.starts[number] + rows.start, self.starts[number] + rows.stop)
                mask[own, self.starts[other] + start : self.starts[other] + stop] = True
        return mask


def rotation_at(places: list[int]) -> Callable[..., Rotation]:
    """The rotation of latents that stand at `places`, some of which may share one."""
    first = min(places)
    index = torch.tensor(places) - first

    def turned(num_latents: int, height: int, width: int, *options) -> Rotation:
        assert num_latents == len(places)
        table = rotation(max(places) - first + 1, height, width, *options)
        return Rotation(table.turn.unflatten(0, (-1, height * width))[index].flatten(0, 1))

    return turned


@torch.no_grad()
def roll_without_features(
    plan: Plan, dit: DiT, noise: NoiseOf, text: Callable[[Pass], dict], ready: Sequence[Latents] = ()
) -> tuple[dict[int, Latents], int]:
    """The slow twin of `sample`: the blocks it makes, and how many copies its largest pass took."""
    method, largest = plan.method, 0
    num_steps = [plan.schedule_of(block).num_steps for block in range(len(plan.block_sizes))]
    made = range(plan.num_ready, len(plan.block_sizes))
    kept = {(block, 0): noise(block, None) for block in made}
    kept.update({(block, num_steps[block]): x for block, x in enumerate(ready)})
    states, lanes = {}, {}

    def covered(p: Pass) -> Latents:
        pieces = []
        for cover in p.covers:
            x = kept[cover.block, cover.step]
            if cover.renoise:
                x = add_noise(x, noise(cover.block, max(method.num_steps, method.first_steps) + p.tick), cover.renoise)
            pieces.append(x[:, :, cover.start : cover.stop])
        return torch.cat(pieces, 2)

    for index, p in enumerate(plan.passes):
        if all(cover.step == num_steps[cover.block] for cover in p.covers):
            continue  # only its features would matter
        copies = Copies(plan, index)
        largest = max(largest, len(copies.indices))
        x = torch.cat([covered(plan.passes[i]) for i in copies.indices], 2)
        told = [c.timestep for i in copies.indices for c in plan.passes[i].covers for _ in range(c.start, c.stop)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dit_module, "rotation", rotation_at(copies.places))
            lanes[p.lane] = dit(x, torch.tensor([told]), text(p), fps=FPS, mask=copies.mask())[0]
        offset = 0
        for block, step, start, stop, *_ in p.covers:
            if block in p.updates:
                v = [velocity[:, :, offset : offset + stop - start] for velocity in lanes.values()]
                v = guide(v[1], v[0], method.guidance_scale) if len(v) > 1 else v[0]
                kept[block, step + 1], states[block] = solver_step(
                    method.solver,
                    kept[block, step],
                    v,
                    states.get(block),
                    plan.schedule_of(block).levels,
                    step,
                    noise(block, step),
                )
            offset += stop - start
    return {block: kept[block, num_steps[block]] for block in made}, largest
