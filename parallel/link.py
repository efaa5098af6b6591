"""One-way links between processes: messages arrive in the order in which they were sent.

Both ends derive what comes next from the plan, so a message is a bare tensor whose shape the receiver knows.
`parallel.connect` makes links between processes.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

Message = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of what is sent."""


@contextmanager
def said_plainly(other: str):
    """What torch or the system says of a connection that broke, in words for people."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise ConnectionError(f"{other} is gone or hangs") from error


def works_with(peer: int) -> str:
    """The process of a rank, in words."""
    return f"the process of rank {peer}, which this one works with,"


class Sender(ABC):
    """The near end of a link to the process of rank `to`. What is sent overlaps what follows.

    Methods raise ConnectionError if the other process is gone.
    """

    def __init__(self, to: int):
        self.to = to
        self.num_bytes = 0

    @abstractmethod
    def send(self, x: Tensor, index: int, arrived: int) -> None:
        """Send a tensor, which must not be changed afterwards, as that of pass `index`.

        The messages of passes up to `arrived` are known to have been received, and are let go.
        """

    @property
    @abstractmethod
    def num_held(self) -> int:
        """Messages that are not known to have arrived."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything has gone."""


class Receiver(ABC):
    """The far end of a link from the process of rank `source`. Raises as `Sender` does."""

    def __init__(self, source: int):
        self.source = source
        self.waited_s = 0.0

    @abstractmethod
    def expect(self, messages: Iterable[Message]) -> None:
        """Say what will come, in order; all that was expected before must have been received."""

    @abstractmethod
    def receive(self) -> Tensor:
        """The oldest message expected."""


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
