"""A mode that refuses what would make the host wait for a device, on whatever device it runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations whose result, or its size, the host has to read.
READS = {
    "_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave",
}  # fmt: skip


class Waited(AssertionError):
    """An operation that waits."""


class NoWaits(TorchDispatchMode):
    """Raises :class:`Waited` at operations that read values of a tensor, and at indexing with masks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in READS or any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise Waited(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))
