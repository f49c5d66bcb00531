"""The map of latents: two coordinates of every atom, so that atoms with a large cosine lie together."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from mmsae.interpret.browser.relations import unit_rows
from mmsae.types import InputError

TSNE_LIMIT = 6000  # atoms; t-SNE of more takes minutes


def layout(atoms: np.ndarray, living: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, str]:
    """Coordinates of atoms in [-1, 1] and how they were found.

    Args:
        atoms: ``(d_sae, d)``.
        living: ``(d_sae,)`` bool; the others get NaN.
        kind: ``pca``, ``tsne``, ``umap`` or ``auto``: t-SNE up to 6,000 atoms, PCA above.
        seed: Seed of t-SNE and UMAP.

    Returns:
        ``(d_sae, 2) float32`` and ``pca``, ``tsne`` or ``umap``.

    Raises:
        InputError: UMAP is asked for and not installed.
    """
    out = np.full((len(atoms), 2), np.nan, np.float32)
    rows = unit_rows(np.asarray(atoms, np.float32)[living])
    if len(rows) < 3:
        out[living] = 0
        return out, "none"
    if kind == "auto":
        kind = "tsne" if len(rows) <= TSNE_LIMIT else "pca"
    if kind == "umap":
        if find_spec("umap") is None:
            raise InputError("layout umap needs the package umap-learn, which is not installed; pca and tsne do not")
        from umap import UMAP

        found = UMAP(metric="cosine", random_state=seed).fit_transform(rows)
    else:
        from sklearn.decomposition import PCA

        start = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
        found = start[:, :2] if start.shape[1] > 1 else np.repeat(start, 2, 1)
        if kind == "tsne":
            from sklearn.manifold import TSNE

            found = TSNE(
                perplexity=min(30, (len(rows) - 1) / 3), init=found / max(found[:, 0].std(), 1e-12) * 1e-4,
                random_state=seed,
            ).fit_transform(start)  # fmt: skip
    low, high = np.percentile(found, (0.5, 99.5), 0)
    out[living] = np.clip((found - (low + high) / 2) / np.maximum((high - low).max() / 2, 1e-12), -1.1, 1.1)
    return out, kind
