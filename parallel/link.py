"""One-way links between processes: messages arrive in the order in which they were sent, handles are kept until done.

Both ends derive what comes next from the plan, so a message is a bare tensor whose shape the receiver knows. A link
has a process group of its own: on a GPU two directions between the same pair would otherwise wait for one another.
"""

import time
from collections import deque
from collections.abc import Iterable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

Message = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of what is sent."""

AHEAD = 2
"""Messages for which a receive is posted before they are needed."""


@contextmanager
def _said_plainly(peer: int):
    """What torch says of a connection that broke, in words for people."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"the process of rank {peer}, which this one works with, is gone or hangs") from error


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
        with _said_plainly(self.to):
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
        with _said_plainly(self.to):
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
        with _said_plainly(self.source):
            work.wait()
        self.waited_s += time.perf_counter() - start
        self._post()
        return x

    def _post(self) -> None:
        if (message := next(self._expected, None)) is not None:
            x = torch.empty(message[0], dtype=message[1], device=self.device)
            with _said_plainly(self.source):
                self._coming.append((dist.irecv(x, self.source, group=self.group), x))


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
