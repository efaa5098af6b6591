"""What processes tell each other besides tensors: small values, which all of them have to have."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def attempted(make: Callable[[], T]) -> Callable[[], T]:
    """Make it now; a call that gives what came of it, or raises the ValueError that did."""
    try:
        found = make()
    except ValueError as error:
        found = error

    def give() -> T:
        if isinstance(found, ValueError):
            raise found
        return found

    return give


def from_rank(rank: int, make: Callable[[], T]) -> T:
    """What one process makes, on every process. A ValueError there ends the others without a word."""
    found: list = [None]
    if dist.get_rank() == rank:
        try:
            found = [make()]
        except ValueError:
            dist.broadcast_object_list(found, rank)
            raise
    dist.broadcast_object_list(found, rank)
    if found[0] is None:
        raise SystemExit(2)
    return found[0]


def from_all(this: T) -> list[T]:
    """What each process has, in order of rank."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, this)
    return found
