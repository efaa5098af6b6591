"""Makes links between processes, and measures one: through memory on the CPU of one machine, else over groups."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.agree import from_all
from parallel.group_link import GroupReceiver, GroupSender
from parallel.heartbeat import machine
from parallel.link import Receiver, Sender
from parallel.memory_link import MemoryReceiver, MemorySender

LARGE = 2**22
"""Bytes of a message by which bandwidth is measured."""

TYPICAL, COUNTED = 2**17, 32
"""Bytes and number of the messages by which it is measured what one takes of the process that sends or receives it."""

Edge = tuple[int, int]
"""Ranks (from, to)."""

Ends = tuple[dict[int, Sender], dict[int, Receiver]]
"""Of this process's links: senders by the rank that they lead to, receivers by the rank that they come from."""


def connect(edges: Sequence[Edge], device: torch.device) -> Ends:
    """This process's ends of these links, each tried once. Every process must call it, with the same edges."""
    near, senders, receivers = _through_memory(edges) if device.type == "cpu" else ((), {}, {})
    rank = dist.get_rank()
    for sender, receiver in (edge for edge in edges if edge not in near):
        group = dist.new_group(sorted((sender, receiver)))
        if rank == sender:
            senders[receiver] = GroupSender(group, receiver)
        if rank == receiver:
            receivers[sender] = GroupReceiver(group, sender, device)
    for link in receivers.values():
        link.expect([((1,), torch.float32)])
    for link in senders.values():
        link.send(torch.zeros(1, device=device), 0, -1)
    for link in receivers.values():
        link.receive()
        link.waited_s = 0.0
    for link in senders.values():
        link.flush()
        link.num_bytes = 0
    return senders, receivers


def _through_memory(edges: Sequence[Edge]) -> tuple[set[Edge], dict[int, Sender], dict[int, Receiver]]:
    """The links within machines, but for those that a machine does not allow, and this process's ends of them."""
    rank, homes = dist.get_rank(), from_all(_home())
    near = {edge for edge in edges if homes[edge[0]] == homes[edge[1]] is not None}
    senders = {receiver: MemorySender(receiver) for sender, receiver in near if sender == rank}
    addresses = from_all({receiver: link.address for receiver, link in senders.items()})
    receivers, refused = {}, []
    for sender, receiver in (edge for edge in near if edge[1] == rank):
        try:
            receivers[sender] = MemoryReceiver(addresses[sender][receiver], sender)
        except OSError:
            refused.append((sender, receiver))
    near -= {edge for of_rank in from_all(refused) for edge in of_rank}
    senders = {receiver: link for receiver, link in senders.items() if (rank, receiver) in near}
    for link in senders.values():
        link.connected()
    return near, senders, receivers


def _home() -> tuple[str, ...] | None:
    """Among which processes this one finds the files of another by its number; None if it finds none."""
    try:
        start, names = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return (machine(), start, names) if hasattr(os, "memfd_create") else None


class Measured(NamedTuple):
    """Of a link: latency in seconds, bandwidth in bytes a second, and seconds that a message takes of a process."""

    latency: float = 0.0
    bandwidth: float = float("inf")
    message: float = 0.0


def measured_link(rank: int, device: torch.device, repeats: int = 5) -> Measured:
    """The links between rank 0 and another, measured by these two; for others, nothing. All processes must call it.

    The rank 0 answers each message of the other with one of equal size; then both send `COUNTED` at once, and the time
    of this thread is counted; on a CPU that of all threads, since the library's own take it from the work.
    """
    senders, receivers = connect([(0, rank), (rank, 0)] if rank else [], device)
    if not senders:
        return Measured()
    (there,), (back,) = senders.values(), receivers.values()
    is_first = dist.get_rank() == rank
    times = []
    for size in (1, LARGE):
        x, spent = torch.zeros(size, dtype=torch.uint8, device=device), []
        back.expect([(x.shape, x.dtype)] * (repeats + 1))
        for i in range(repeats + 1):
            start = time.perf_counter()
            if is_first:
                there.send(x, i, i - 1)
            come = back.receive()
            if not is_first:
                there.send(x, i, i - 1)
            int(come[0])  # a GPU has it only then
            spent.append(time.perf_counter() - start)
        there.flush()
        times.append(min(spent[1:]) / 2)
    bandwidth = LARGE / max(times[1] - times[0], 1e-9)
    clock = time.process_time if device.type == "cpu" else time.thread_time
    x = torch.zeros(TYPICAL, dtype=torch.uint8, device=device)
    back.expect([(x.shape, x.dtype)] * COUNTED)
    start = clock()
    for i in range(COUNTED):
        there.send(x, i, i - 2)
        time.sleep(4 * (times[0] + TYPICAL / bandwidth))
        back.receive()
    there.flush()
    return Measured(times[0], bandwidth, (clock() - start) / COUNTED / 2)
