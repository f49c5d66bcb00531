"""Sparse products that never build the (N, d_sae) matrix: one interface, whose backend follows the device."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "backend": "Backend Ranking",
        "choice": "backend_for use",
        "grouped": "Largest pays",
        "sparse": "chunked_above chunked_largest chunked_topk decode_largest decode_largest_each dense_columns "
        "dense_linear raw_product sampled_linear sparse_decode sparse_scatter",
    },
)
