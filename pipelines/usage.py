"""What a process took for a video."""

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The share of the time that a process waited for others, its peak memory, what it sent to others, and read.

    `bytes_exchanged` of what was sent went to the processes that share its stage, and `exchange_s` went by meanwhile;
    `bytes_to` is the rest by the process that it went to.
    """

    idle_fraction: float
    peak_memory_mb: float
    bytes_sent: int
    bytes_exchanged: int
    bytes_to: dict[int, int]
    exchange_s: float
    weight_bytes_read: int


def peak_memory_mb(device: str) -> float:
    """Most memory used so far, MiB: of the GPU if the run is on one, else of the process.

    Linux is asked for the peak since this program began: that of `getrusage` begins with the peak of the process which
    started this one.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    if (status := Path("/proc/self/status")).exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
