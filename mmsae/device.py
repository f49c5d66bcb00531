"""Host and device work side by side: what tells whether the host waits, and how numbers pass without that."""

from __future__ import annotations

import torch
from torch import Tensor


def waits(t: Tensor) -> bool:
    """Whether reading a value of a tensor waits for a device that otherwise works on its own."""
    return t.is_cuda


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU copies it by itself, from pinned memory."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Ahead:
    """A number on its way from a device to the host, which need not wait before it is asked for."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._event = torch.cuda.Event() if cuda else None
        self._host = torch.zeros((), dtype=torch.long, pin_memory=cuda)
        self._value = self._host.numpy()

    def send(self, number: Tensor) -> None:
        """Have the device copy an integer when it comes to it."""
        self._host.copy_(number, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def get(self) -> int:
        """The number; waits for what the device had to do before :meth:`send`, and for no more."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._value)
