"""Other libraries' checkpoints."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "command": "convert",
        "detect": "LIBRARIES load locate",
    },
)
