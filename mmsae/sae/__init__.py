"""Sparse autoencoders in pure torch: normalise -> encode -> select -> dictionary."""

from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder, DistanceEncoder, Encoder, PerModalityEncoder, PreCodes
from mmsae.sae.losses import AuxK, CodeCosine, LossContext, LossTerm, Reconstruction
from mmsae.sae.normaliser import Normaliser
from mmsae.sae.random_control import random_control
from mmsae.sae.sae import SAE, fit_rows
from mmsae.sae.selector import Selector, TopK
from mmsae.sae.usage import UsageTracker

__all__ = [
    "SAE",
    "AffineEncoder",
    "AuxK",
    "CodeCosine",
    "Dictionary",
    "DistanceEncoder",
    "Encoder",
    "LossContext",
    "LossTerm",
    "Normaliser",
    "PerModalityEncoder",
    "PreCodes",
    "Reconstruction",
    "Selector",
    "TopK",
    "UsageTracker",
    "fit_rows",
    "random_control",
]
