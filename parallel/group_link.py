"""Links over torch's process groups: between machines, and between GPUs.

A link has a group of its own: on a GPU two directions between the same pair would otherwise wait for one another.
"""

import time
from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.link import Message, Receiver, Sender, said_plainly, works_with

AHEAD = 2
"""Messages for which a receive is posted before they are needed."""


class GroupSender(Sender):
    """A tensor is held until it is known to have arrived."""

    def __init__(self, group: dist.ProcessGroup, to: int):
        super().__init__(to)
        self.group = group
        self._going: deque[tuple[int, dist.Work, Tensor]] = deque()

    def send(self, x: Tensor, index: int, arrived: int) -> None:
        """As `Sender` says. What has arrived is waited for, which takes no time: gloo calls no send completed before
        that."""
        x = x.contiguous()
        with said_plainly(works_with(self.to)):
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
        with said_plainly(works_with(self.to)):
            while self._going:
                self._going.popleft()[1].wait()


class GroupReceiver(Receiver):
    """Receives are posted ahead of their use."""

    def __init__(self, group: dist.ProcessGroup, source: int, device: torch.device):
        super().__init__(source)
        self.group, self.device = group, device
        self._expected: Iterable[Message] = iter(())
        self._coming: deque[tuple[dist.Work, Tensor]] = deque()

    def expect(self, messages: Iterable[Message]) -> None:
        """Say what will come, and post the first receives."""
        assert not self._coming
        self._expected = iter(messages)
        for _ in range(AHEAD):
            self._post()

    def receive(self) -> Tensor:
        """The oldest message expected."""
        work, x = self._coming.popleft()
        start = time.perf_counter()
        with said_plainly(works_with(self.source)):
            work.wait()
        self.waited_s += time.perf_counter() - start
        self._post()
        return x

    def _post(self) -> None:
        if (message := next(self._expected, None)) is not None:
            x = torch.empty(message[0], dtype=message[1], device=self.device)
            with said_plainly(works_with(self.source)):
                self._coming.append((dist.irecv(x, self.source, group=self.group), x))
