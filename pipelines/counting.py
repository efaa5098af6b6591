"""Counts of what torch does, that come out the same each time: operations, allocations, memory, waits for the device.

They are taken where Python hands an operation over, so they know neither the processor nor the time.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.__bool__, Tensor.__int__,
         Tensor.__float__, Tensor.__index__, torch.equal, torch.nonzero}  # fmt: skip
"""Calls whose answer the host needs: on a GPU each waits for all that was asked for before."""


class Operations(TorchDispatchMode):
    """Counts operations and the storages that they make. Live bytes are of storages made since it began."""

    def __init__(self):
        super().__init__()
        self.operations = self.allocations = self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do it, and look at what it took and gave."""
        for x in tree_leaves((args, kwargs)):
            self._see(x, is_new=False)
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for x in tree_leaves(result):
            self._see(x, is_new=True)
        return result

    def _see(self, x: object, *, is_new: bool) -> None:
        if not isinstance(x, Tensor) or x.is_mkldnn:  # a packed weight has no storage to count
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if is_new else 0
        if key in self._known:
            return

        def gone(_: weakref.ref) -> None:
            del self._known[key]
            self.live_bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.allocations += is_new
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class Waits(TorchFunctionMode):
    """Counts calls that wait for the device, and copies to a device that is named."""

    def __init__(self):
        super().__init__()
        self.waits = self.copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Do it, and count it."""
        self.waits += func in WAITS
        targets = (*args[1:], *(kwargs or {}).values())
        self.copies += func is Tensor.to and any(isinstance(x, str | torch.device) for x in targets)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """A dictionary that holds, when the context ends, what happened within."""
    found: dict[str, int] = {}
    with Waits() as waits, Operations() as operations:
        yield found
    found |= {"operations": operations.operations, "allocations": operations.allocations,
              "peak_tensor_bytes": operations.peak_bytes, "waits_for_device": waits.waits,
              "copies_to_device": waits.copies}  # fmt: skip
