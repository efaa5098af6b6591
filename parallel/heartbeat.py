"""Notices that another process is silent: stopped, cut off, or its machine gone, which no closed connection tells.

Each process counts up a number in the store that all share, and watches that of the next rank. What breaks is thus
seen by one process, which says so and ends; the others see that as a closed connection. On the same machine it kills
the silent one, which would not hear its launcher either. The store is asked in a thread of its own, since a question
over a cut link has no answer.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

BEAT_S = 2.0
"""Seconds between two beats."""

SILENT_S = 15.0
"""Seconds without a beat of the other, or without the store, after which it counts as lost."""

GOODBYE = -(2**40)
"""What a count goes down by at the end: below zero it means that the process has left, and is not to be missed."""


@contextmanager
def heartbeat(store: dist.Store, rank: int, world_size: int, lost: Callable[[str], None]) -> Iterator[None]:
    """Beat and watch within, and say goodbye at the end if that is a good one.

    If another is lost, `lost` is called with what to say, in another thread, and this process ends at once with code 1,
    since its main thread waits for what will not come.
    """
    if world_size == 1:
        yield
        return
    heart = _Heart(store.clone(), rank, (rank + 1) % world_size)
    ended = threading.Event()
    threads = [threading.Thread(target=target, args=(ended, *more), daemon=True)
               for target, more in ((heart.beat, ()), (heart.watch, (lost,)))]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        yield
        heart.store.add(f"beat-{rank}", GOODBYE)
    finally:
        ended.set()


class _Heart:
    def __init__(self, store: dist.Store, rank: int, other: int):
        self.store, self.rank, self.other = store, rank, other
        self.heard = time.monotonic()
        self.left = False
        self.other_pid: int | None = None
        self.store.set(f"process-{rank}", f"{machine()} {os.getpid()}")

    def beat(self, ended: threading.Event) -> None:
        """Count up, and look whether the other has."""
        before = None
        try:
            where, pid = self.store.get(f"process-{self.other}").decode().split()
            self.other_pid = int(pid) if where == machine() else None
            while not ended.wait(BEAT_S):
                self.store.add(f"beat-{self.rank}", 1)
                now = self.store.add(f"beat-{self.other}", 0)
                if now != before:
                    self.heard, before = time.monotonic(), now
                self.left = now < 0
        except (RuntimeError, dist.DistError):
            return  # the store is gone: that is silence, too

    def watch(self, ended: threading.Event, lost: Callable[[str], None]) -> None:
        """Say so when nothing was heard for too long."""
        while not ended.wait(BEAT_S) and not self.left:
            if time.monotonic() - self.heard > SILENT_S:
                try:
                    lost(f"nothing was heard of the process of rank {self.other} for {SILENT_S:.0f} s: it hangs, or "
                         "its machine is cut off")  # fmt: skip
                finally:
                    if self.other_pid is not None:  # only now: the launcher ends this process when that one has ended
                        with suppress(ProcessLookupError):
                            os.kill(self.other_pid, signal.SIGKILL)
                    os._exit(1)


def machine() -> str:
    """Which machine this is, as the launcher counts them."""
    return os.environ.get("GROUP_RANK", "0")
