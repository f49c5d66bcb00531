"""What large trainings take, from sizes alone: memory of a million latents over GPUs, and bytes of stores.

    python -m benchmarks.arithmetic

Nothing is measured here; `docs/how-to/scale.md` shows these tables, and tests compare them with it and with tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mmsae.report.tables import markdown_table

LATENTS, WIDTHS, GPUS = 2**20, (1024, 1152), (1, 2, 4, 8, 16)
BATCH, K = 4096, 64


class Data(NamedTuple):
    """A set of activations: rows and widths of every modality."""

    name: str
    units: float  #: Pairs, or conversations.
    rows: tuple[tuple[float, int], ...]  #: ``(rows of a unit, width)`` of each modality.
    batch: int  #: Rows of the first modality in a step.


DATA = (
    Data("CC3M, 2.97 million pairs of ViT-B/32", 2.97e6, ((1, 512), (1, 512)), 8192),
    Data("CC3M, 2.97 million pairs of ViT-L/14", 2.97e6, ((1, 768), (1, 768)), 8192),
    Data("DataComp-1B, 1.4 billion pairs of ViT-L/14", 1.4e9, ((1, 768), (1, 768)), 65536),
    Data("LLaVA-1.5's 665,000 conversations, 576 image and 200 text tokens", 6.65e5, ((576, 4096), (200, 4096)), 3072),
)


def weights(latents: int, width: int, dictionaries: int = 1) -> int:
    """Bytes of the float32 matrices of an SAE: encoder and dictionaries."""
    return 4 * latents * width * (1 + dictionaries)


def kept(latents: int, width: int, dictionaries: int = 1) -> int:
    """Bytes that a training holds all the time: weights, gradients and Adam's two moments."""
    return 4 * weights(latents, width, dictionaries)


def step(latents: int, width: int, batch: int, k: int) -> int:
    """Bytes that a step adds at most: the encoder in bfloat16, the tangent part of a gradient twice, codes and rows."""
    codes = batch * k * (4 + 8)
    return 2 * latents * width + 2 * 4 * latents * width + codes + 3 * 4 * batch * width


def exchanged(width: int, batch: int, k: int, ranks: int) -> int:
    """Bytes that a rank receives in a forward pass where ranks share latents: candidates and reconstructions."""
    return 0 if ranks == 1 else 4 * batch * (k * ranks + width)


def store(data: Data) -> float:
    """Bytes of a 16-bit store's rows."""
    return data.units * sum(rows * width * 2 for rows, width in data.rows)


def _gb(number: float) -> str:
    return f"{number / 1e12:,.1f} TB" if number >= 1e12 else f"{number / 1e9:,.1f} GB"


def tables() -> Iterator[str]:
    """The tables of the page."""
    head = ["GPUs", *(f"{d} wide, {n}" for d in WIDTHS for n in ("one dictionary", "two")), "exchanged a step"]
    rows = []
    for ranks in GPUS:
        mine = LATENTS // ranks
        sizes = [_gb(kept(mine, d, n) + step(mine, d, BATCH, K)) for d in WIDTHS for n in (1, 2)]
        rows.append([str(ranks), *sizes, f"{exchanged(WIDTHS[0], BATCH, K, ranks) / 1e6:.0f} MB"])
    yield markdown_table(head, rows)
    head = ["data", "rows", "store, 16 bit", "rows a step", "steps of a pass"]
    rows = []
    for data in DATA:
        first = data.units * data.rows[0][0]
        total = data.units * sum(n for n, _ in data.rows)
        rows.append([data.name, f"{total:.3g}", _gb(store(data)), f"{data.batch:,}", f"{first / data.batch:,.0f}"])
    yield markdown_table(head, rows)


if __name__ == "__main__":
    print("\n".join(tables()))
