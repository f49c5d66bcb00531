"""Sparse products that never build the (N, d_sae) matrix: one interface, whose backend follows the device."""

from mmsae.kernels.backend import Backend, Ranking
from mmsae.kernels.choice import backend_for, use
from mmsae.kernels.grouped import Largest, pays
from mmsae.kernels.sparse import (
    chunked_above,
    chunked_largest,
    chunked_topk,
    decode_largest,
    dense_linear,
    raw_product,
    sampled_linear,
    sparse_decode,
    sparse_scatter,
)

__all__ = [
    "Backend",
    "Largest",
    "Ranking",
    "backend_for",
    "chunked_above",
    "chunked_largest",
    "chunked_topk",
    "decode_largest",
    "dense_linear",
    "pays",
    "raw_product",
    "sampled_linear",
    "sparse_decode",
    "sparse_scatter",
    "use",
]
