"""Codes of the patches of one image, and which latents may make areas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmsae.types import IMAGE, Codes, InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from mmsae.interpret.evidence.folder import Evidence, Grid, ItemTokens, LatentStats

LEAST_ITEMS = 5  # in which a latent fires, before its maps are compared with each other


class PatchCodes(NamedTuple):
    """What fires on the patch grid of one image; entries in any order, values are absolute and above 0."""

    latent: np.ndarray  #: ``(m,) int64``
    position: np.ndarray  #: ``(m,) int64`` ``row * cols + column``
    value: np.ndarray  #: ``(m,) float32``
    rows: int  #: Of the grid
    cols: int  #: Of the grid
    d_sae: int  #: Number of latents

    @classmethod
    def of_tokens(cls, tokens: ItemTokens, grid: Grid, d_sae: int, step: int = 0) -> PatchCodes:
        """Those of an item in evidence; ``step`` is a place in ``grid.steps``.

        Raises:
            InputError: The evidence has no patch grid.
        """
        if not grid.rows:
            raise InputError("areas need codes of patches, and this evidence is of a site without a patch grid")
        on = (tokens.position // grid.places == step) & (tokens.value != 0)
        place = tokens.position[on].astype(np.int64) % grid.places
        return cls(tokens.latent[on].astype(np.int64), place, np.abs(tokens.value[on]), grid.rows, grid.cols, d_sae)

    @classmethod
    def of_codes(cls, codes: Codes, rows: int, cols: int) -> PatchCodes:
        """Those of the ``rows * cols`` rows of codes at hand, row by row of the grid.

        Raises:
            InputError: Another number of rows.
        """
        if codes.n != rows * cols:
            raise InputError(
                f"{codes.n} rows of codes were given for a grid of {rows} x {cols} = {rows * cols} patches"
            )
        values = codes.values.detach().cpu().numpy()
        at, slot = np.nonzero(values)
        latent = slot if codes.indices is None else codes.indices.detach().cpu().numpy()[at, slot]
        return cls(latent.astype(np.int64), at, np.abs(values[at, slot]).astype(np.float32), rows, cols, codes.d_sae)

    @classmethod
    def of_dense(cls, z: np.ndarray) -> PatchCodes:
        """Those of a dense ``(rows, cols, d_sae)`` array."""
        rows, cols, d = z.shape
        at, latent = np.nonzero(z.reshape(-1, d))
        return cls(latent, at, np.abs(z.reshape(-1, d)[at, latent]).astype(np.float32), rows, cols, d)

    def keep(self, latents: np.ndarray) -> PatchCodes:
        """Without the entries of latents that a mask ``(d_sae,) bool`` leaves out."""
        on = latents[self.latent]
        return self._replace(latent=self.latent[on], position=self.position[on], value=self.value[on])

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """``(L,)`` latents that fire, ascending, and their maps ``(L, rows, cols) float32``."""
        latents, layer = np.unique(self.latent, return_inverse=True)
        out = np.zeros((len(latents), self.rows * self.cols), np.float32)
        out[layer, self.position] = self.value
        return latents, out.reshape(-1, self.rows, self.cols)

    def matrix(self) -> csr_matrix:
        """``(rows * cols, d_sae)``."""
        from scipy.sparse import csr_matrix

        return csr_matrix((self.value, (self.position, self.latent)), shape=(self.rows * self.cols, self.d_sae))


@dataclass(frozen=True)
class AreaOptions:
    """How areas are made from patch codes."""

    percentile: float = 90.0
    """A latent makes areas in an image where its maximum reaches this percentile of its values above 0 over the
    corpus."""
    level: float = 0.5
    """Share of its maximum in the image that an area reaches."""
    upsample: int = 2
    """How many times finer the grid of the areas is than that of the patches."""
    least_patches: float = 3.0
    """Smaller areas are left out."""
    merge: float = 0.8
    """Areas of several latents are one where their masks have at least this intersection over union."""
    dense: float = 0.1
    """Latents that fire on a larger share of all patches make no areas."""
    fixed: float = 0.8
    """Latents whose maps in different images have a larger mean cosine say where something is, not what: they make no
    areas."""


class AreaLatents(NamedTuple):
    """What is known of latents over a corpus, all ``(d_sae,)``."""

    usable: np.ndarray  #: ``bool`` neither dense nor position-only
    least: np.ndarray  #: ``float32`` what the maximum in an image has to reach
    idf: np.ndarray  #: ``float32`` logarithm of the number of images per image in which a latent fires

    @classmethod
    def plain(cls, d_sae: int) -> AreaLatents:
        """All latents alike, where no corpus is at hand."""
        return cls(np.ones(d_sae, bool), np.zeros(d_sae, np.float32), np.ones(d_sae, np.float32))

    @classmethod
    def of_evidence(
        cls, evidence: Evidence, options: AreaOptions = AreaOptions(), modality: str = IMAGE
    ) -> AreaLatents:
        """From the counts of a folder of evidence; position-only latents are found on the items in evidence.

        Raises:
            InputError: The evidence has no patch grid.
        """
        grid, stats = evidence.grid(modality), evidence.stats(modality)
        if not grid.rows:
            raise InputError(f"{evidence.folder} has no patch grid for {modality}: areas need an SAE on patches")
        # evidence has the rows of some items only; the counts are of all
        rows = evidence.n * grid.places * max(len(grid.steps), 1)
        usable = stats.fired_rows <= options.dense * rows
        usable &= position_cosine(*evidence_entries(evidence, modality), grid.places, evidence.d_sae) <= options.fixed
        idf = np.log(max(evidence.n, 1) / np.maximum(stats.fired_items, 1))
        return cls(usable, value_percentile(stats, options.percentile), idf.astype(np.float32))

    @classmethod
    def of_entries(
        cls, item: np.ndarray, latent: np.ndarray, place: np.ndarray, value: np.ndarray, shape: tuple[int, int, int],
        options: AreaOptions = AreaOptions(),
    ) -> AreaLatents:  # fmt: skip
        """From all entries above 0 of the patch codes of some images; ``shape`` is images, patches and latents."""
        images, places, d_sae = shape
        usable = np.bincount(latent, minlength=d_sae) <= options.dense * images * places
        usable &= position_cosine(item, latent, place, value, places, d_sae) <= options.fixed
        order = np.lexsort((value, latent))
        start = np.searchsorted(latent[order], np.arange(d_sae + 1))
        n = np.diff(start)
        least = np.zeros(d_sae, np.float32)
        at = start[:-1] + np.ceil(options.percentile / 100 * n).astype(int).clip(1) - 1
        least[n > 0] = value[order][at[n > 0]]
        fired = np.bincount(np.unique(item.astype(np.int64) * d_sae + latent) % d_sae, minlength=d_sae)
        idf = np.log(max(images, 1) / np.maximum(fired, 1))
        return cls(usable, least if options.percentile > 0 else 0 * least, idf.astype(np.float32))


def evidence_entries(
    evidence: Evidence, modality: str = IMAGE, step: int = 0, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Item, latent, place and absolute value of all entries of the items in evidence; one denoising step of several.

    ``rows`` of the table of these items are looked at; by blocks of them memory stays bounded.
    """
    tokens, grid = evidence.all_tokens(modality), evidence.grid(modality)
    first, last, _ = rows.indices(len(tokens.items))
    start = np.asarray(tokens.start[first : last + 1], np.int64)
    at = slice(int(start[0]), int(start[-1]))
    item = np.repeat(tokens.items[first:last], np.diff(start))
    latent, position, value = tokens.latent[at], tokens.position[at], np.abs(tokens.value[at])
    if len(grid.steps) > 1:
        on = position // grid.places == step
        item, latent, position, value = item[on], latent[on], position[on], value[on]
    return item, latent, position % grid.places, value


def value_percentile(stats: LatentStats, percentile: float) -> np.ndarray:
    """``(d_sae,) float32`` the lower edge of the bin in which a percentile of a latent's values lies; 0 for the 0th."""
    from mmsae.interpret.evidence.folder import EDGES

    total = np.cumsum(stats.histogram, 1)
    at = (total < percentile / 100 * total[:, -1:]).sum(1)
    edge = np.where((at == 0) | (percentile <= 0), 0.0, EDGES[:-1][at.clip(0, len(EDGES) - 2)])
    return np.minimum(edge, stats.max).astype(np.float32)


def position_cosine(
    item: np.ndarray, latent: np.ndarray, place: np.ndarray, value: np.ndarray, places: int, d_sae: int
) -> np.ndarray:
    """``(d_sae,) float32`` mean cosine of a latent's maps in two different images, 0 where it fires in too few to tell.

    A latent that fires at the same patches whatever the image shows has 1. With unit maps u of n images the mean over
    pairs is ``(|sum u|^2 - n) / (n (n - 1))``, so no pair is looked at.
    """
    from scipy.sparse import coo_matrix

    out = np.zeros(d_sae, np.float32)
    if not len(item):
        return out
    key = item.astype(np.int64) * d_sae + latent
    maps, which = np.unique(key, return_inverse=True)
    norm = np.sqrt(np.bincount(which, np.square(value, dtype=np.float64)))
    unit = value / np.maximum(norm[which], 1e-30)
    total = coo_matrix((unit, (latent, place)), shape=(d_sae, places)).tocsr()
    n = np.bincount(maps % d_sae, minlength=d_sae)
    square = np.asarray(total.multiply(total).sum(1)).ravel()
    enough = n >= LEAST_ITEMS
    out[enough] = (square[enough] - n[enough]) / (n[enough] * (n[enough] - 1.0))
    return out
