"""Other libraries' checkpoints."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "command": "convert",
        "vlsae": "load",
    },
)
