"""One-way links between processes: messages arrive in the order in which they were sent, handles are kept until done.

Both ends derive what comes next from the plan, so a message is a bare tensor whose shape the receiver knows. A link
has a process group of its own: on a GPU two directions between the same pair would otherwise wait for one another.
"""

import time
from collections import deque
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of what is sent."""

LARGE = 2**22
"""Bytes of a message by which bandwidth is measured."""

TYPICAL, COUNTED = 2**17, 32
"""Bytes and number of the messages by which it is measured what one takes of the process that sends or receives it."""

AHEAD = 2
"""Messages for which a receive is posted before they are needed."""


@contextmanager
def said_plainly(other: str):
    """What torch says of a connection that broke, in words for people."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"{other} is gone or hangs") from error


def _works_with(peer: int) -> str:
    return f"the process of rank {peer}, which this one works with,"


class Sender:
    """The near end of a link. Sends overlap what follows; a tensor is held until it is known to have arrived.

    Methods raise ConnectionError if the other process is gone.
    """

    def __init__(self, group: dist.ProcessGroup, to: int):
        self.group, self.to = group, to
        self.num_bytes = 0
        self._going: deque[tuple[int, dist.Work, Tensor]] = deque()

    def send(self, x: Tensor, index: int, arrived: int) -> None:
        """Send a tensor, which must not be changed afterwards, as that of pass `index`.

        The messages of passes up to `arrived` are known to have been received, and are let go. They have to be waited
        for, which takes no time then: gloo calls no send completed before that.
        """
        x = x.contiguous()
        with said_plainly(_works_with(self.to)):
            while self._going and self._going[0][0] <= arrived:
                self._going.popleft()[1].wait()
            self._going.append((index, dist.isend(x, self.to, group=self.group), x))
        self.num_bytes += x.nbytes

    @property
    def num_held(self) -> int:
        """Tensors that are not known to have arrived."""
        return len(self._going)

    def flush(self) -> None:
        """Wait until everything has gone."""
        with said_plainly(_works_with(self.to)):
            while self._going:
                self._going.popleft()[1].wait()


class Receiver:
    """The far end of a link. Receives are posted ahead of their use. Raises as `Sender` does."""

    def __init__(self, group: dist.ProcessGroup, source: int, device: torch.device):
        self.group, self.source, self.device = group, source, device
        self.waited_s = 0.0
        self._expected: Iterable[Message] = iter(())
        self._coming: deque[tuple[dist.Work, Tensor]] = deque()

    def expect(self, messages: Iterable[Message]) -> None:
        """Say what will come, in order; all that was expected before must have been received."""
        assert not self._coming
        self._expected = iter(messages)
        for _ in range(AHEAD):
            self._post()

    def receive(self) -> Tensor:
        """The oldest message expected."""
        work, x = self._coming.popleft()
        start = time.perf_counter()
        with said_plainly(_works_with(self.source)):
            work.wait()
        self.waited_s += time.perf_counter() - start
        self._post()
        return x

    def _post(self) -> None:
        if (message := next(self._expected, None)) is not None:
            x = torch.empty(message[0], dtype=message[1], device=self.device)
            with said_plainly(_works_with(self.source)):
                self._coming.append((dist.irecv(x, self.source, group=self.group), x))


class Measured(NamedTuple):
    """Of a link: latency in seconds, bandwidth in bytes a second, and seconds that a message takes of a process."""

    latency: float = 0.0
    bandwidth: float = float("inf")
    message: float = 0.0


def measured_link(rank: int, device: torch.device, repeats: int = 5) -> Measured:
    """The link between rank 0 and another, measured by these two; for others, nothing. All processes may call it.

    The rank 0 answers each message of the other with one of equal size; then both send `COUNTED` at once, and the time
    of this thread is counted; on a CPU that of all threads, since the library's own take it from the work.
    """
    times = []
    for size in (1, LARGE) if rank else ():
        x, spent = torch.zeros(size, dtype=torch.uint8, device=device), []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            if dist.get_rank() == rank:
                dist.send(x, 0)
                dist.recv(x, 0)
            elif dist.get_rank() == 0:
                dist.recv(x, rank)
                dist.send(x, rank)
            int(x[0])  # a GPU has it only then
            spent.append(time.perf_counter() - start)
        times.append(min(spent[1:]) / 2)
    if dist.get_rank() not in (0, rank) or not rank:
        return Measured()
    ways = (dist.irecv, dist.isend) if dist.get_rank() == 0 else (dist.isend, dist.irecv)  # NCCL takes turns
    bandwidth = LARGE / max(times[1] - times[0], 1e-9)
    clock = time.process_time if device.type == "cpu" else time.thread_time
    start = clock()
    for _ in range(COUNTED):
        there, back = (torch.zeros(TYPICAL, dtype=torch.uint8, device=device) for _ in range(2))
        going = [ways[0](there, rank - dist.get_rank()), ways[1](back, rank - dist.get_rank())]
        time.sleep(4 * (times[0] + TYPICAL / bandwidth))
        for work in going:
            work.wait()
    return Measured(times[0], bandwidth, (clock() - start) / COUNTED / 2)


class Local:
    """Both ends of a link of a process with itself."""

    num_bytes = 0
    num_held = 0
    waited_s = 0.0

    def __init__(self):
        self._coming: deque[Tensor] = deque()

    def send(self, x: Tensor, index: int, arrived: int) -> None:
        """Put a tensor at the end."""
        self._coming.append(x)

    def receive(self) -> Tensor:
        """Take the oldest."""
        return self._coming.popleft()

    def expect(self, messages: Iterable[Message]) -> None:
        """Nothing needs preparing."""

    def flush(self) -> None:
        """Nothing is under way."""
