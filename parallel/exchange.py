"""Sequence parallelism within a stage (Ulysses, arXiv 2309.14509): rows of tokens are exchanged for heads and back.

Outside attention each process has some rows of patches of every latent, with all heads; within it all rows, with some
heads, and so it keeps features of these heads alone. One all-to-all brings queries, keys and values there, another the
result back.

Axes: b batch, f latents, s tokens of a latent, n heads, d head dimension, k processes.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from longvid.models.attention import Exchange
from parallel.link import said_plainly


class Ulysses(Exchange):
    """The exchange of one process with its peers, `band` counting it among them; `rows` are those of each.

    Methods raise ConnectionError if a peer is gone.
    """

    def __init__(self, group: dist.ProcessGroup, rows: Sequence[int], band: int):
        self.group, self.rows, self.band = group, tuple(rows), band
        self.num_bytes = 0
        self.waited_s = 0.0

    def num_rows(self, rows: int) -> int:
        """Rows of patches of all peers together."""
        assert rows == self.rows[self.band], f"{rows} rows came, this process has {self.rows[self.band]}"
        return sum(self.rows)

    def by_heads(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors (b, f, s of this process, n, d) as (b, f, s of all, n / k, d)."""
        k = len(self.rows)
        per_row = parts[0].shape[2] // self.rows[self.band]
        mine = torch.stack(parts).unflatten(-2, (k, -1)).movedim(-3, 0).contiguous()  # k parts b f s n/k d
        sizes = [mine[0].numel() // self.rows[self.band] * rows for rows in self.rows]
        whole = mine.new_empty(sum(sizes))
        self._swap(whole, mine.flatten(), sizes, [mine[0].numel()] * k)
        shape = (*mine.shape[1:4], -1, *mine.shape[5:])
        come = [part.view(shape) for part in whole.split(sizes)]
        assert [x.shape[3] for x in come] == [rows * per_row for rows in self.rows]
        return tuple(torch.cat(come, 3).unbind(0))

    def by_tokens(self, x: Tensor) -> Tensor:
        """A tensor (b, f, s of all, n / k, d) as (b, f, s of this process, n, d)."""
        per_row = x.shape[2] // sum(self.rows)
        parts = x.split([rows * per_row for rows in self.rows], 2)
        own = parts[self.band]
        back = x.new_empty(len(self.rows) * own.numel())
        gone = torch.cat([part.flatten() for part in parts])
        self._swap(back, gone, [own.numel()] * len(self.rows), [part.numel() for part in parts])
        return torch.cat(back.view(len(self.rows), *own.shape).unbind(0), -2)

    def _swap(self, into: Tensor, x: Tensor, take: list[int], give: list[int]) -> None:
        """All-to-all of flat tensors; counts what leaves this process, and the time until all is there."""
        start = time.perf_counter()
        with said_plainly("a process that shares a stage with this one"):
            dist.all_to_all_single(into, x, take, give, group=self.group)
        self.waited_s += time.perf_counter() - start
        self.num_bytes += (sum(give) - give[self.band]) * x.element_size()
