"""Sparse autoencoders in pure torch: normalise -> encode -> select -> dictionary."""

from mmsae.lazy import lazy

__all__, __getattr__ = lazy(
    __name__,
    {
        "dictionary": "Dictionary",
        "encoder": "AffineEncoder DistanceEncoder Encoder PerModalityEncoder PreCodes",
        "losses": "AuxK CodeCosine LossContext LossTerm Reconstruction",
        "normaliser": "Normaliser",
        "random_control": "random_control",
        "sae": "SAE fit_rows",
        "selector": "Selector TopK",
        "usage": "UsageTracker",
    },
)
