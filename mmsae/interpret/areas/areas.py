"""Concept areas of an image: where latents fire together on its patches, with boxes, descriptors and relations.

The form that the semantic areas of MESA (arXiv 2401.16741, 2408.00279) are given on an SAE's patch codes, which are a
segmentation into concepts already: no segmenter is needed, and areas come with names (reconstructed; the authors' areas
are proposals of SAM).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmsae.interpret.areas.connected import ConnectedAreas, boxes, connected_areas, iou, overlaps
from mmsae.interpret.areas.patches import AreaLatents, AreaOptions, PatchCodes

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

INSIDE = 0.8  # share of the smaller area that lies in the larger one


def called(latent: int, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """A latent and its name, which is empty where it has none."""
    return {"latent": int(latent), "name": (names or {}).get(int(latent), "")}


class Areas(NamedTuple):
    """A areas of one image, largest mass first."""

    masks: csr_matrix  #: ``(A, H * W) bool`` cells of the upsampled grid
    shape: tuple[int, int]  #: ``(H, W)``
    box: np.ndarray  #: ``(A, 4) float32`` left, top, right, bottom as shares of the host's view
    size: np.ndarray  #: ``(A,) float32`` in patches; nothing below a patch is resolved
    mass: np.ndarray  #: ``(A,) float32`` sum of the values of its latents over it
    latents: csr_matrix  #: ``(A, d_sae) float32`` mass of each latent that makes an area
    descriptor: csr_matrix  #: ``(A, d_sae) float32`` unit rows: largest value of every latent in an area, times its idf

    @property
    def n(self) -> int:
        """Number of areas."""
        return len(self.size)

    def mask(self, i: int) -> np.ndarray:
        """``(H, W) bool`` the cells of one area."""
        return self.masks[i].toarray().reshape(self.shape)

    def about(self, names: Mapping[int, str] | None = None, most: int = 3) -> list[dict[str, Any]]:
        """Plain values of every area: box, size, mass, and its latents by mass, with their names."""
        out = []
        for i in range(self.n):
            row = self.latents[i]
            order = np.argsort(-row.data, kind="stable")[:most]
            found = [{**called(row.indices[k], names), "mass": float(row.data[k])} for k in order]
            box = [round(float(v), 4) for v in self.box[i]]
            out.append({"box": box, "size": float(self.size[i]), "mass": float(self.mass[i]), "latents": found})
        return out


def find_areas(
    codes: PatchCodes, latents: AreaLatents | None = None, options: AreaOptions = AreaOptions()
) -> Areas:  # fmt: skip
    """The concept areas of one image.

    A map of every latent that reaches its threshold is upsampled, cut at a share of its maximum and split into
    connected areas; areas of several latents that cover the same cells become one, which covers the cells that half of
    their mass lies on.

    Args:
        codes: Codes of its patches.
        latents: What is known of the latents over a corpus; default: all are alike.
        options: How.
    """
    latents = AreaLatents.plain(codes.d_sae) if latents is None else latents
    codes = codes.keep(latents.usable)
    ids, maps = codes.maps()
    strong = maps.reshape(len(maps), codes.rows * codes.cols).max(1, initial=0) >= latents.least[ids]
    found = connected_areas(maps[strong], options.upsample, options.level, options.least_patches)
    masks, weights = _merged(found, ids[strong], codes.d_sae, options.merge)
    mass = np.asarray(weights.sum(1)).ravel()
    order = np.argsort(-mass, kind="stable")
    masks, weights, mass = masks[order], weights[order], mass[order]
    size = np.diff(masks.indptr) / options.upsample**2
    descriptor = describe(masks, found.shape, codes, latents.idf)
    return Areas(masks, found.shape, boxes(masks, found.shape), size.astype(np.float32), mass, weights, descriptor)


def _merged(
    found: ConnectedAreas, ids: np.ndarray, d_sae: int, least: float
) -> tuple[csr_matrix, csr_matrix]:  # fmt: skip
    """Masks and ``(A, d_sae)`` masses, areas that cover the same cells being one."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(found.size)
    groups, group = connected_components(csr_matrix(iou(found.masks, found.masks) >= least), directed=False)
    if not n:
        return found.masks, csr_matrix((0, d_sae), dtype=np.float32)
    into = csr_matrix((found.mass.astype(np.float64), (group, np.arange(n))), shape=(groups, n))
    covered = into @ found.masks.astype(np.float64)
    total = np.asarray(into.sum(1)).ravel()
    rows = np.repeat(np.arange(groups), np.diff(covered.indptr))
    on = covered.data >= 0.5 * total[rows] * (1 - 1e-6)
    masks = csr_matrix((np.ones(int(on.sum()), bool), (rows[on], covered.indices[on])), shape=covered.shape)
    masks.sort_indices()
    weights = csr_matrix((found.mass, (group, ids[found.layer])), shape=(groups, d_sae), dtype=np.float32)
    return masks, weights


def patches_of(masks: csr_matrix, shape: tuple[int, int], rows: int, cols: int) -> csr_matrix:
    """``(A, rows * cols) float64`` patches that masks cover by half or more, or the ones they cover most of; 1 each."""
    from scipy.sparse import csr_matrix

    y, x = np.divmod(masks.indices, shape[1])
    place = (y * rows // shape[0]) * cols + x * cols // shape[1]
    ones = np.ones(len(place))
    cover = csr_matrix((ones, place, masks.indptr.copy()), shape=(masks.shape[0], rows * cols))
    cover.sum_duplicates()
    half = shape[0] // rows * (shape[1] // cols) / 2
    best = np.asarray(cover.max(1).todense()).ravel()
    row = np.repeat(np.arange(masks.shape[0]), np.diff(cover.indptr))
    on = cover.data >= np.minimum(half, best[row])
    return csr_matrix((np.ones(int(on.sum())), (row[on], cover.indices[on])), shape=cover.shape)


def describe(masks: csr_matrix, shape: tuple[int, int], codes: PatchCodes, idf: np.ndarray) -> csr_matrix:
    """``(A, d_sae) float32`` unit rows: the largest value of every latent within a mask, times its idf.

    The maximum, and not the mean, so that small parts of an area count.
    """
    from scipy.sparse import csr_matrix

    inside = patches_of(masks, shape, codes.rows, codes.cols)
    z = codes.matrix()
    lengths = np.diff(z.indptr)[inside.indices]
    start = np.repeat(z.indptr[inside.indices] - np.cumsum(lengths) + lengths, lengths)
    entry = start + np.arange(len(start))
    area = np.repeat(np.repeat(np.arange(inside.shape[0]), np.diff(inside.indptr)), lengths)
    key = area * codes.d_sae + z.indices[entry]
    order = np.argsort(key, kind="stable")
    key, value = key[order], z.data[entry][order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    top = np.maximum.reduceat(value, first) if len(first) else value
    row, latent = np.divmod(key[first], codes.d_sae)
    top = top * idf[latent]
    norm = np.sqrt(np.bincount(row, np.square(top, dtype=np.float64), inside.shape[0]))
    top = top / np.maximum(norm[row], 1e-12)
    out = csr_matrix((top.astype(np.float32), (row, latent)), shape=(inside.shape[0], codes.d_sae))
    out.eliminate_zeros()
    return out


class AreaGraph(NamedTuple):
    """How the areas of an image lie to each other."""

    inside: np.ndarray  #: ``(A, A) bool`` area i lies in area j, by four fifths or more of it
    parent: np.ndarray  #: ``(A,) int64`` smallest area that an area lies in, or -1
    adjacent: np.ndarray  #: ``(A, A) bool`` they touch, and neither lies in the other
    level: np.ndarray  #: ``(A,) int64`` size by powers of two: 0 for one patch, 1 from two, 2 from four, ...


def area_graph(areas: Areas) -> AreaGraph:
    """Inclusion, adjacency and levels of areas."""
    from scipy import ndimage
    from scipy.sparse import csr_matrix

    n = areas.n
    shared, size, _ = overlaps(areas.masks, areas.masks)
    rank = np.empty(n, int)
    rank[np.lexsort((np.arange(n), -size))] = np.arange(n)  # largest first, equal ones in their order
    smaller = rank[:, None] > rank[None]
    inside = smaller & (shared >= INSIDE * np.minimum(size[:, None], size[None]))
    held = np.where(inside, rank[None], -1)
    parent = np.where(inside.any(1), held.argmax(1) if n else 0, -1)
    solid = areas.masks.toarray().reshape(n, *areas.shape)
    around = np.zeros((3, 3, 3), bool)
    around[1] = True
    wide = csr_matrix(ndimage.binary_dilation(solid, around).reshape(n, -1)) if n else areas.masks
    touch = overlaps(wide, areas.masks)[0] > 0
    adjacent = (touch | touch.T) & ~inside & ~inside.T & ~np.eye(n, dtype=bool)
    return AreaGraph(inside, parent, adjacent, np.floor(np.log2(np.maximum(areas.size, 1))).astype(int))
