"""Batches sent to a GPU ahead of their use: read by a thread, from pinned memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from mmsae.types import Tokens


def prefetched(batches: Iterator[Tokens], device: torch.device | str) -> Iterator[Tokens]:
    """The same batches in the same order on a device, two of them ahead of the one in use.

    Whatever the reader raises is raised where its batch would have been. The thread ends with the iterator.
    """
    device = torch.device(device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    queue: Queue[Any] = Queue(1)
    stop = Event()

    def hand_over(found: Any) -> None:
        while not stop.is_set():
            try:
                queue.put(found, timeout=0.1)
                return
            except Full:
                continue

    def read() -> None:
        try:
            for tokens in batches:
                hand_over(_sent(tokens, device, stream))
                if stop.is_set():
                    return
            hand_over(None)
        except BaseException as e:
            hand_over(e)

    thread = Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        while (found := queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            tokens, done = found
            if done is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(done)
                tokens.each(lambda t, current=current: t.record_stream(current) or t)
            yield tokens
    finally:
        stop.set()
        thread.join()


def _sent(tokens: Tokens, device: torch.device, stream: Any) -> tuple[Tokens, Any]:
    if stream is None:
        return tokens.each(lambda t: t.to(device)), None

    def send(t: Tensor) -> Tensor:
        return (t if t.is_pinned() else t.pin_memory()).to(device, non_blocking=True)

    with torch.cuda.stream(stream):
        sent = tokens.each(send)
        return sent, stream.record_event()
