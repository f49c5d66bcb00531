"""A host that costs nothing, shards to run it over, and ways to compare stores byte by byte."""

import io
import os
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae.hosts import Encoder, Rows
from mmsae.shards import ShardWriter
from mmsae.types import InputError, Site


class FakeHost:
    """Sums of pixels and of token ids: the interface of Encoder that extraction uses, with rows one can compute."""

    fingerprint, hint, precision = "f" * 32, "fake", "fp32"
    device = torch.device("cpu")
    modalities = ("image", "text")

    def __init__(self, width=6, spoil=None):
        self.width, self.spoil, self.calls = width, spoil, 0

    reading = Encoder.reading
    _split = None  # its transform is of one part

    def batch_size(self, asked=None):
        return asked or 256

    def transform(self, train=False):
        return lambda image: torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255

    def tokenize(self, captions):
        return torch.tensor([[ord(c) for c in caption.ljust(8)[:8]] for caption in captions])

    def site(self, spec):
        if isinstance(spec, Site):
            return spec
        module, _, tokens = str(spec).partition("[")
        modality = module.split(".")[0]
        if modality not in self.modalities:
            raise InputError(f"host fake has no module {module}")
        return Site(
            self.fingerprint, module, tokens=tokens.rstrip("]") or "pooled", modality=modality, width=self.width
        )

    def default_sites(self):
        return {m: self.site(f"{m}.embed") for m in self.modalities}

    def read(self, batch, sites, gradient=""):
        self.calls += 1
        return [self._rows(batch, s) for s in sites]

    def _rows(self, batch, site):
        flat = batch.images.flatten(1) if site.modality == "image" else batch.texts.float() / 128
        powers = torch.arange(1, self.width + 1)
        if site.tokens == "pooled":
            x = flat.mean(1, keepdim=True) ** powers
            if self.spoil is not None:
                x[[k == self.spoil for k in batch.keys]] = float("nan")
            return Rows(x, torch.arange(len(x)))
        tokens = flat[:, :4, None] ** powers  # four tokens an item, of which the first item's last is left out
        keep = torch.ones(len(flat), 4, dtype=torch.bool)
        keep[0, 3] = False
        item, position = keep.nonzero(as_tuple=True)
        return Rows(tokens[keep], item, position, position == 0)


def image_bytes(value, size=4):
    out = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 30, 60)).save(out, "png")
    return out.getvalue()


def make_shards(folder, n_shards=3, per_shard=10, uid=None, size=4):
    """``n_shards`` tars; sample i has ``uid(i)`` where given."""
    with ShardWriter(folder, "data", per_shard=per_shard) as w:
        for i in range(n_shards * per_shard):
            meta = {} if uid is None else {"uid": uid(i)}
            w.write(f"{i:06d}", {"png": image_bytes(5 * i, size), "txt": f"item {i}", "json": meta})
    return sorted(map(str, Path(folder).glob("*.tar")))


def contents(folder):
    """``{file name: bytes}``, hidden files included."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def forked(work, after=None):
    """Run ``work`` in a forked process, kill it after some seconds; returns its exit code or minus the signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def peak(work):
    """Peak resident memory in bytes that ``work`` adds, in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    r, w = os.pipe()

    def measured():
        work(0)  # import and warm up
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work(1)
        os.write(w, str(_status("VmHWM") - before).encode())

    assert forked(measured) == 0
    os.close(w)
    return int(io.FileIO(r).read())


def _status(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
