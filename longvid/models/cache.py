"""The feature cache as a value: what each pass reads and leaves of self-attention features.

The network never holds it. A pass takes a `Context` and returns the features of the latents that went through; the
cache is the table between passes, keyed by block and guidance lane, for the layers of this process alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from longvid.models.attention import KV, Sight
from longvid.passes import Pass, Slice

Features = Mapping[int, KV]
"""Features of some latents by layer index."""


class Context(NamedTuple):
    """What some latents of a pass attend to besides the pass's own, by layer: features placed before, and after.

    They are in pieces, one behind the other, as they were left: attention puts them together. It is for the latents
    `start` to `stop`, all by default, which see the pass's own from `own` to `stop`.
    """

    before: Mapping[int, Sequence[KV]] = {}
    after: Mapping[int, Sequence[KV]] = {}
    start: int = 0
    stop: int | None = None
    own: int = 0

    def in_layer(self, layer: int, num_latents: int) -> Sight:
        """The same in one layer, of a pass of so many latents."""
        stop = num_latents if self.stop is None else self.stop
        return Sight(self.start, stop, self.own, self.before.get(layer, ()), self.after.get(layer, ()))


@dataclass(frozen=True)
class Entry:
    """Features of latents `start` to `stop` of a block, as they were at `step`."""

    step: int
    start: int
    features: Features

    @property
    def stop(self) -> int:
        """One past the last latent kept."""
        return self.start + next(iter(self.features.values())).keys.shape[1]


@dataclass(frozen=True)
class Cache:
    """All features kept between passes. Writing gives a new cache that shares the old one's tensors."""

    entries: Mapping[tuple[int, int], Entry] = field(default_factory=dict)

    def contexts(self, p: Pass) -> tuple[Context, ...]:
        """The features that pass `p` reads, in the plan's order, for each of its views."""
        return tuple(Context(self._gather(view.before, p.lane), self._gather(view.after, p.lane), *view[:3])
                     for view in p.views)  # fmt: skip

    def after(self, p: Pass, features: Features) -> "Cache":
        """The cache once pass `p` has left the `features` of everything it covered."""
        entries = dict(self.entries)
        for piece in p.writes:
            offset = 0
            for cover in p.covers:
                if cover.block == piece.block:
                    start = offset + piece.start - cover.start
                    stop = offset + piece.stop - cover.start
                    kept = {layer: _keep(kv, start, stop) for layer, kv in features.items()}
                    entries[piece.block, p.lane] = Entry(piece.step, piece.start, kept)
                offset += cover.stop - cover.start
        for block in p.frees:
            entries.pop((block, p.lane), None)
        return Cache(entries)

    def num_bytes(self) -> int:
        """Bytes that the cached features hold alive."""
        tensors = [t for entry in self.entries.values() for kv in entry.features.values() for t in kv]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _gather(self, pieces: tuple[Slice, ...], lane: int) -> Mapping[int, Sequence[KV]]:
        if not pieces:
            return {}
        found = []
        for piece in pieces:
            entry = self.entries[piece.block, lane]
            assert entry.step == piece.step, f"block {piece.block} is kept at step {entry.step}, not {piece.step}"
            shift = entry.start
            assert shift <= piece.start < piece.stop <= entry.stop, f"{piece}: latents {shift} to {entry.stop} are kept"
            found.append({i: kv.narrow(piece.start - shift, piece.stop - shift) for i, kv in entry.features.items()})
        return {layer: [features[layer] for features in found] for layer in found[0]}


def _keep(kv: KV, start: int, stop: int) -> KV:
    """Latents `start` to `stop`; a part is copied, since a view of it would hold all of them alive."""
    if (start, stop) == (0, kv.keys.shape[1]):
        return kv
    return KV(*(tensor.clone() for tensor in kv.narrow(start, stop)))
