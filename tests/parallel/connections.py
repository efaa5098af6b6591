"""What `test_connect` starts as several processes: links of a ring, of every kind, and messages over them."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallel import connect

CPU = torch.device("cpu")
SIZES = (3, 10_000, 2**25, 1, 10_000)
"""Numbers in each message: one is 128 MiB."""


def talk(rank: int, num: int) -> dict:
    """Everybody sends all to the next before it listens to the one before; kinds of both ends, and whether all came."""
    edges = [(i, (i + 1) % num) for i in range(num)]
    senders, receivers = connect.connect(edges, CPU)
    (sender,), (receiver,) = senders.values(), receivers.values()
    receiver.expect([((size,), torch.float32) for size in SIZES])
    for i, size in enumerate(SIZES):
        sender.send(torch.full((size,), float(10 * rank + i)), i, -1)
    before = (rank - 1) % num
    came = [bool((receiver.receive() == 10 * before + i).all()) for i in range(len(SIZES))]
    sender.flush()
    return {"to": [type(sender).__name__, sender.to], "from": [type(receiver).__name__, receiver.source],
            "came": came, "bytes": sender.num_bytes}  # fmt: skip


def refusing(address, source):
    """A machine that does not show one process the files of another."""
    raise PermissionError(address)


def main(out: Path) -> None:
    """Talk through memory, with one link that cannot be, and from machine to machine; and measure a link."""
    rank, num = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    found = {"near": talk(rank, num), "measured": connect.measured_link(num - 1, CPU)._asdict()}
    if rank == 1:
        connect.MemoryReceiver = refusing
    found["refused"] = talk(rank, num)
    os.environ["GROUP_RANK"] = str(rank)
    found |= {"far": talk(rank, num), "measured far": connect.measured_link(num - 1, CPU)._asdict()}
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
