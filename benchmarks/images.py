"""What a worker's time goes to: CPU time a picture, of decoders and of the parts of a host's transform.

    python benchmarks/images.py timm:local-dir:lite0

Decoders beside Pillow are timed where they are installed. Pictures are drawn: smooth colours with noise, as JPEG of
64 x 64 and of 375 x 500.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image

from mmsae.allocator import keep_memory
from mmsae.hosts import Encoder, load_host
from mmsae.hosts.encoders.pixels import Agreement
from mmsae.shards.decode import by_pillow, decode_image
from mmsae.types import ImageTextBatch


def jpegs(n: int, h: int, w: int) -> list[bytes]:
    """``n`` pictures of ``h`` x ``w``."""
    rng, made = np.random.default_rng(0), []
    y, x = np.mgrid[:h, :w] / h
    for i in range(n):
        waves = np.stack([np.sin(9 * x + i), np.cos(13 * y + i), np.sin(7 * (x + y))], 2)
        out = io.BytesIO()
        pixels = (127 + 80 * waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(out, "jpeg", quality=90)
        made.append(out.getvalue())
    return made


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Bytes to ``(h, w, 3)`` pixels, by every decoder that is installed."""
    found: dict[str, Callable[[bytes], np.ndarray]] = {"Pillow": lambda b: np.asarray(by_pillow(b))}
    if find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg"] = lambda b: simplejpeg.decode_jpeg(b, "RGB")
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        found["OpenCV"] = lambda b: cv2.imdecode(np.frombuffer(b, np.uint8), how)
    if find_spec("torchvision"):
        from torchvision.io import ImageReadMode, decode_jpeg

        def by_torchvision(b: bytes) -> np.ndarray:
            data = torch.frombuffer(bytearray(b), dtype=torch.uint8)
            return decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

        found["torchvision.io"] = by_torchvision
    return found


def cost(run: Callable[[], object], n: int, times: int = 5) -> str:
    """Milliseconds of CPU time for one of n, the best of some times."""
    best = np.inf
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return f"{1000 * best / n:.3f} ms"


def table(host: Encoder, data: list[bytes]) -> None:
    """Print what is done with each of some pictures, and what it costs."""
    n, pictures = len(data), [by_pillow(b) for b in data]
    head, unsized = host.reading({"image"})["transform"], host.unsized()
    for said, decode in decoders().items():
        same = sum(np.array_equal(decode(b), p) for b, p in zip(data, pictures, strict=True))
        print(f"  {said}: {cost(partial(each, decode, data), n)}, {same} of {n} as Pillow's")
    for said, make in (("whole transform", host.transform()), ("8-bit part", head)):
        print(f"  decoding, {said}: {cost(lambda m=make: torch.stack([m(decode_image(b)) for b in data]), n)}")
    print(f"  decoding for --resize device: {cost(lambda: [unsized(decode_image(b)) for b in data], n)}")
    made = ImageTextBatch(torch.stack(each(head, pictures)), None, [], [], [], [])
    print(f"  the arithmetic: {cost(lambda: host.prepared(made), n)}")
    rows = each(unsized, pictures)
    sizes = torch.tensor([r.shape[:2] for r in rows])
    inputs = {"pixels": torch.cat([r.flatten() for r in rows]), "sizes": sizes}
    print(f"  resizing on {host.device}: {cost(lambda: host.pixels(inputs), n)}, {Agreement.of(host, inputs)}")


def each(make: Callable, of: list) -> list:
    """What is made of each."""
    return [make(x) for x in of]


def main(name: str = "timm:tf_efficientnet_lite0") -> None:
    """Print a table for each size."""
    torch.set_num_threads(1)
    keep_memory()
    host = load_host(name)
    assert isinstance(host, Encoder)
    for h, w in ((64, 64), (375, 500)):
        data = jpegs(64, h, w)
        print(f"{h} x {w}, {sum(map(len, data)) // len(data)} bytes")
        table(host, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
