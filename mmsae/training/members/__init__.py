"""Several SAEs trained on the same batches, in one pass over the data."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "lit": "LitSAEs",
        "options": "Members",
        "view": "for_each_member",
    },
)
