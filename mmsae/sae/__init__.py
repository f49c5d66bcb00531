"""Sparse autoencoders in pure torch: normalise -> encode -> select -> dictionary."""

from mmsae.lazy import lazy
from mmsae.moved import earlier

__all__, _get = lazy(
    __name__,
    {
        "dictionary": "Dictionary",
        "encoder": "AffineEncoder DistanceEncoder PerModalityEncoder PreCodes SAEEncoder",
        "losses": "AuxK CodeCosine LossContext LossTerm Reconstruction",
        "normaliser": "Normaliser",
        "random_control": "random_control",
        "sae": "SAE fit_rows",
        "selector": "Selector TopK",
        "usage": "UsageTracker",
    },
)

__getattr__ = earlier(__name__, _get)
