"""Processes in and out: torch's elastic agent starts them, and each finds its place from the environment.

`longvid generate --nproc N` and `torchrun --nproc-per-node N -m pipelines.cli generate` come to the same.
"""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.heartbeat import heartbeat

SHUTDOWN_S = 5
"""Seconds that processes have to end by themselves once one of them has failed."""

MEET_S = 120
"""Seconds that a machine waits for the others."""

TIMEOUT_S = 600
"""Seconds that a process waits for a message: longer than any pass, short enough to notice that another hangs."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How many processes on how many machines; `machine` counts this one, `endpoint` is HOST:PORT on machine 0."""

    num_processes: int
    threads: int
    num_machines: int = 1
    machine: int = 0
    endpoint: str = ""
    meet_s: int = MEET_S
    max_restarts: int = 0

    def __post_init__(self):
        if self.num_machines < 1 or not 0 <= self.machine < self.num_machines:
            raise ValueError(f"node_rank={self.machine} of nnodes={self.num_machines}: machines are counted from 0 to "
                             f"{max(self.num_machines, 1) - 1}")  # fmt: skip
        host, colon, port = self.endpoint.rpartition(":")
        if self.num_machines > 1 and not (host and colon and port.isdigit()):
            raise ValueError(f"rdzv_endpoint={self.endpoint!r} must be HOST:PORT of the first machine, the same on "
                             "all; such as 10.0.0.1:29400")  # fmt: skip
        if self.meet_s < 1:
            raise ValueError(f"rdzv_timeout={self.meet_s} must be at least 1 second; try {MEET_S}")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must be at least 0; try 1")

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.num_processes * self.num_machines


def launch(main: Callable[[list[str]], int], module: str, words: Sequence[str], how: Launch, *, fork: bool) -> int:
    """Run `python -m module words...` as the processes of this machine, in one group with all; returns an exit code.

    With `fork` they are copies of this process that call `main(words)`, which saves them their imports. This process
    must not have used a GPU then, nor more than one thread for arithmetic, since neither survives being copied.

    The code is 0, or that of the process that failed first; all others are ended then. Raises ChildProcessError if a
    signal ended it, KeyboardInterrupt if one was to end this process, and ValueError if the machines do not meet.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone = how.num_machines == 1
    config = LaunchConfig(
        min_nodes=how.num_machines, max_nodes=how.num_machines, nproc_per_node=how.num_processes,
        rdzv_backend="c10d" if alone else "static", rdzv_endpoint="localhost:0" if alone else how.endpoint,
        rdzv_configs={} if alone else {"rank": how.machine, "timeout": how.meet_s},
        run_id=secrets.token_hex(8) if alone else "longvid", max_restarts=how.max_restarts,
        shutdown_timeout=SHUTDOWN_S, start_method="fork",
    )  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = str(how.threads)
    logging.disable(logging.CRITICAL)  # the processes speak for themselves
    try:
        if fork:
            elastic_launch(config, _be_forked)(main, list(words), how.threads)
        else:
            elastic_launch(config, sys.executable)("-m", module, *words)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        if failures[0].exitcode < 0:
            name = signal.Signals(-failures[0].exitcode).name
            raise ChildProcessError(f"the process of rank {failures[0].local_rank} was ended by {name}") from error
        return failures[0].exitcode
    except SignalException as error:
        raise KeyboardInterrupt from error
    except dist.DistError as error:
        raise ValueError(f"the {how.num_machines} machines did not meet at {how.endpoint} within {how.meet_s} s: "
                         f"{error}; start the same command on each, with its --node-rank, and see that the port is "
                         "free and open") from error  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _be_forked(main: Callable[[list[str]], int], words: list[str], threads: int) -> None:
    """What a copy of the launching process does: forget that it was one, and leave with the code of `main`.

    Once it is done it waits for the others, and for the launcher to hear of that; if one of them fails, nothing is left
    here that would need time to end.
    """
    logging.disable(logging.NOTSET)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    code = main(words)
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if code:
        raise SystemExit(code)


def threads_each(num_processes: int) -> int:
    """CPU threads of each process: what OMP_NUM_THREADS says, or an equal share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // num_processes))


@contextmanager
def join(device: str, lost: Callable[[str], None]):
    """The process group of all processes, for as long as the context lasts; yields this process's device.

    gloo on a CPU, NCCL on GPUs, of which each process takes the one of its place on the machine. `lost` is as in
    `parallel.heartbeat`.
    """
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    timeout = timedelta(seconds=TIMEOUT_S)
    store, rank, num_processes = next(dist.rendezvous("env://", timeout=timeout))
    # After a restart the store still has the addresses of the processes before: each attempt has names of its own.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_processes, timeout=timeout)
    try:
        with heartbeat(store, rank, num_processes, lost):
            yield device
    finally:
        dist.destroy_process_group()
