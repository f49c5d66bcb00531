"""Names by the atom (method ``vocabulary``): the phrase nearest to a latent's decoder row, in joint spaces only.

``argmax_v cos(R d_i, R (t_v - mean_v t))``, where R projects out the unit direction from texts to images: without it an
image latent is nearest to whichever words lie closest to the images.
"""

from __future__ import annotations

import numpy as np

from mmsae.interpret.names.centroid import centred, unit
from mmsae.interpret.names.phrases import PhraseScores


def without(x: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Rows of ``x (n, d)`` with a direction ``(d,)`` projected out; a zero direction changes nothing."""
    u = unit(direction)
    return x - (x @ u)[:, None] * u


def decoder_scores(
    atoms: np.ndarray, latents: np.ndarray, phrases: list[str], vectors: np.ndarray, direction: np.ndarray
) -> PhraseScores:
    """Cosines of atoms with phrases.

    Args:
        atoms: ``(d_sae, width)`` decoder rows in the joint space.
        latents: Which of them.
        phrases: The V phrases.
        vectors: ``(V, width)`` their unit vectors in that space.
        direction: ``(width,)`` mean image embedding minus mean text embedding.
    """
    rows = unit(without(atoms[latents].astype(np.float64), direction)).astype(np.float32)
    words = unit(without(centred(vectors).astype(np.float64), direction)).astype(np.float32)
    return PhraseScores(latents, phrases, lambda lo, hi: rows[lo:hi] @ words.T)
