"""Links between processes of one machine: messages lie in memory that both map, and a pipe says which is next.

No thread takes part and nothing goes through a socket, so a message takes two copies and two calls of the system. The
memory has no name and the pipe none either: both are gone with the processes, however these end.
"""

import mmap
import os
import struct
import time
import weakref
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.link import Message, Receiver, Sender, said_plainly, works_with

OFFSET = struct.Struct("q")
"""What goes through the pipe: where a message begins. A write of so few bytes is never torn."""


class Address(NamedTuple):
    """Where a receiver finds a link: in the files of the process that sends."""

    pid: int
    memory: int
    pipe: int


class _Memory:
    """Shared memory, mapped piece by piece; a piece is mapped once."""

    def __init__(self, file: int):
        self.file = file
        self._pieces: dict[int, Tensor] = {}
        weakref.finalize(self, os.close, file)

    def piece(self, offset: int, size: int) -> Tensor:
        """So many bytes from `offset` on; both are whole pages."""
        if offset not in self._pieces:
            mapped = mmap.mmap(self.file, size, offset=offset)
            self._pieces[offset] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._pieces[offset]


def _pages(num_bytes: int) -> int:
    """Bytes of the pages that so many need."""
    return -(-max(num_bytes, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


class MemorySender(Sender):
    """A message's piece of the memory is used again once it is known to have arrived."""

    def __init__(self, to: int):
        super().__init__(to)
        self._memory, self._end = _Memory(os.memfd_create("longvid-link")), 0
        pipe, self._pipe = os.pipe()
        weakref.finalize(self, os.close, self._pipe)
        self._close_other_end = weakref.finalize(self, os.close, pipe)
        self.address = Address(os.getpid(), self._memory.file, pipe)
        self._free: dict[int, list[int]] = {}
        self._going: deque[tuple[int, int, int]] = deque()

    def connected(self) -> None:
        """The receiver has found the link: from now on it is known if that goes."""
        self._close_other_end()

    def send(self, x: Tensor, index: int, arrived: int) -> None:
        """As `Sender` says; `x` may even be changed afterwards."""
        while self._going and self._going[0][0] <= arrived:
            _, size, offset = self._going.popleft()
            self._free[size].append(offset)
        size = _pages(x.nbytes)
        free = self._free.setdefault(size, [])
        offset = free.pop() if free else self._more(size)
        self._memory.piece(offset, size)[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        self._going.append((index, size, offset))
        with said_plainly(works_with(self.to)):
            os.write(self._pipe, OFFSET.pack(offset))
        self.num_bytes += x.nbytes

    @property
    def num_held(self) -> int:
        """Pieces in use."""
        return len(self._going)

    def flush(self) -> None:
        """Everything has gone at once. Pieces that may not have been read are never used again."""
        self._going.clear()

    def _more(self, size: int) -> int:
        offset, self._end = self._end, self._end + size
        os.ftruncate(self._memory.file, self._end)
        return offset


class MemoryReceiver(Receiver):
    """Copies a message out, since its memory is used again. Raises OSError if the link cannot be opened."""

    def __init__(self, address: Address, source: int):
        super().__init__(source)
        files = f"/proc/{address.pid}/fd"
        self._memory = _Memory(os.open(f"{files}/{address.memory}", os.O_RDWR))
        self._pipe = os.open(f"{files}/{address.pipe}", os.O_RDONLY)
        weakref.finalize(self, os.close, self._pipe)
        self._expected: Iterable[Message] = iter(())

    def expect(self, messages: Iterable[Message]) -> None:
        """Say what will come."""
        self._expected = iter(messages)

    def receive(self) -> Tensor:
        """The oldest message expected."""
        shape, dtype = next(self._expected)
        start = time.perf_counter()
        with said_plainly(works_with(self.source)):
            told = os.read(self._pipe, OFFSET.size)
            if not told:
                raise BrokenPipeError
        self.waited_s += time.perf_counter() - start
        x = torch.empty(shape, dtype=dtype)
        piece = self._memory.piece(*OFFSET.unpack(told), _pages(x.nbytes))
        return x.copy_(piece[: x.nbytes].view(dtype).view(shape))
