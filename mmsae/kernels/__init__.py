"""Sparse products that never build the (N, d_sae) matrix, one interface for every device."""

from mmsae.kernels.sparse import chunked_above, chunked_topk, sampled_linear, sparse_decode, sparse_scatter

__all__ = ["chunked_above", "chunked_topk", "sampled_linear", "sparse_decode", "sparse_scatter"]
