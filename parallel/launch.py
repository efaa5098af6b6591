"""Processes in and out: torch's elastic agent starts them, and each finds its place from the environment.

`longvid generate --nproc N` and `torchrun --nproc-per-node N -m pipelines.cli generate` come to the same.
"""

import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

SHUTDOWN_S = 5
"""Seconds that processes have to end by themselves once one of them has failed."""

TIMEOUT_S = 600
"""Seconds that a process waits for a message: longer than any pass, short enough to notice that another hangs."""


def launch(module: str, words: Sequence[str], num_processes: int, threads: int, max_restarts: int = 0) -> int:
    """Run `python -m module words...` as so many processes of one group on this machine; returns an exit code.

    That is 0, or that of the process that failed first; all others are ended then. Raises ChildProcessError if a signal
    ended it, and KeyboardInterrupt if one was to end this process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=secrets.token_hex(8), max_restarts=max_restarts, shutdown_timeout=SHUTDOWN_S,
    )  # fmt: skip
    os.environ["OMP_NUM_THREADS"] = str(threads)
    logging.disable(logging.CRITICAL)  # the processes speak for themselves
    try:
        elastic_launch(config, sys.executable)("-m", module, *words)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        if failures[0].exitcode < 0:
            name = signal.Signals(-failures[0].exitcode).name
            raise ChildProcessError(f"the process of rank {failures[0].local_rank} was ended by {name}") from error
        return failures[0].exitcode
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        logging.disable(logging.NOTSET)
    return 0


def threads_each(num_processes: int) -> int:
    """CPU threads of each process: what OMP_NUM_THREADS says, or an equal share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // num_processes))


@contextmanager
def join(device: str):
    """The process group of all processes, for as long as the context lasts; yields this process's device.

    gloo on a CPU, NCCL on GPUs, of which each process takes the one of its place on the machine.
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
        yield device
    finally:
        dist.destroy_process_group()
