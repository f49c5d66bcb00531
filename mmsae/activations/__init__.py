"""Activations on disk: write them once with a frozen host, read them many times, shuffled and exactly resumable."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "extract": "extract",
        "loader": "StoreLoader",
        "memory": "write_store",
        "mixing_buffer": "MixingBuffer",
        "side_by_side": "SideBySideLoader",
        "spec": "StoreSpec",
        "store": "ActivationStore describe_store",
        "stream": "CaptureLoader StreamingLoader",
        "synthetic": "SyntheticLoader SyntheticPairs",
        "writer": "StoreWriter",
    },
)
