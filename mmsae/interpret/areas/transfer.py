"""Where an area of one image lies in another, patch by patch, without areas of the other image.

The dense variant of area matching (DMESA, arXiv 2408.00279, on codes; reconstructed): every patch goes to where its
codes fit best and is drawn there as a Gaussian; every patch of the other image that fits one of the area's best is
drawn too, or an area that is larger there would have holes. A place counts if the way back leads to where it came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmsae.interpret.areas.areas import Areas, patches_of
from mmsae.interpret.areas.connected import boxes, iou
from mmsae.interpret.areas.patches import PatchCodes

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class Transfer(NamedTuple):
    """Places of an image's areas in another image."""

    masks: csr_matrix  #: ``(A, H2 * W2) bool`` on the second image's upsampled grid; empty rows where there is no place
    shape: tuple[int, int]  #: ``(H2, W2)``
    box: np.ndarray  #: ``(A, 4) float32`` as shares; NaN where there is no place
    back: np.ndarray  #: ``(A,) float64`` intersection over union of an area and the way back of its place
    accepted: np.ndarray  #: ``(A,) bool`` whether the way back leads to more than half of where it came from


def unit_patches(codes: PatchCodes, idf: np.ndarray | None = None) -> csr_matrix:
    """``(rows * cols, d_sae)`` unit rows of patches' codes, times idf."""
    from scipy.sparse import diags

    z = codes.matrix().astype(np.float64)
    z = z if idf is None else z @ diags(idf.astype(np.float64))
    norm = np.sqrt(np.asarray(z.multiply(z).sum(1)).ravel())
    return (diags(1 / np.maximum(norm, 1e-12)) @ z).tocsr()


def patch_cosines(first: PatchCodes, second: PatchCodes, idf: np.ndarray | None = None) -> np.ndarray:
    """``(P1, P2) float64`` cosines of patches by their codes."""
    return (unit_patches(first, idf) @ unit_patches(second, idf).T).toarray()


def transfer_areas(
    areas: Areas, cosines: np.ndarray, grids: tuple[tuple[int, int], tuple[int, int]], *,
    level: float = 0.5, sharp: float = 0.01, least: float = 0.5,
) -> Transfer:  # fmt: skip
    """Places of areas in another image.

    Args:
        areas: Of the first image.
        cosines: ``(P1, P2)`` of the patches of both: :func:`patch_cosines`, or those of dense features.
        grids: Rows and columns of both patch grids.
        level: Share of a place's maximum that its cells reach.
        sharp: Temperature of the soft maximum over the patches around the best one.
        least: Intersection over union that the way back has to have.
    """
    times = areas.shape[0] // grids[0][0]
    there, shape = _send(areas.masks, areas.shape, cosines, *grids, times, level, sharp)
    again, _ = _send(there, shape, cosines.T, *grids[::-1], times, level, sharp)
    back = np.asarray(iou(again, areas.masks).diagonal()) if areas.n else np.zeros(0)
    some = np.diff(there.indptr) > 0
    box = np.full((areas.n, 4), np.nan, np.float32)
    box[some] = boxes(there[some], shape)
    return Transfer(there, shape, box, back, back > least)


def _send(
    masks: csr_matrix, shape: tuple[int, int], cosines: np.ndarray, here: tuple[int, int], there: tuple[int, int],
    times: int, level: float, sharp: float,
) -> tuple[csr_matrix, tuple[int, int]]:  # fmt: skip
    """Masks of one grid sent to the other; each patch counts by how well it fits."""
    from scipy.sparse import csr_matrix

    inside = patches_of(masks, shape, *here)
    y, x, weight = _soft_best(cosines, there, sharp)
    used = inside.multiply(weight[None]).toarray()
    grid = [np.arange(n * times) / times + 0.5 / times - 0.5 for n in there]  # centres of cells, in patches
    # a patch covers its own cell: sigma is half its side
    draw = [np.exp(-0.5 * ((g[None] - at[:, None]) / 0.5) ** 2) for g, at in zip(grid, (y, x), strict=True)]
    heat = np.einsum("ap,ph,pw->ahw", used, *draw, optimize=True).clip(0, 1)
    drawn_back = inside[:, cosines.argmax(0)].multiply(cosines.max(0).clip(0)[None]).toarray().reshape(-1, *there)
    heat = np.maximum(heat, drawn_back.repeat(times, 1).repeat(times, 2))
    top = heat.reshape(len(heat), -1).max(1, initial=0)[:, None, None]
    on = (heat >= level * top * (1 - 1e-9)) & (top > 1e-9)
    size = tuple(n * times for n in there)
    return csr_matrix(_largest(on).reshape(len(heat), size[0] * size[1])), size


def _soft_best(cosines: np.ndarray, grid: tuple[int, int], sharp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and cosine of where each patch fits best; between patches, by a soft maximum over the 3 x 3 around
    the best one, since a soft maximum over all would put a patch with two places between them.
    """
    best = cosines.argmax(1)
    r, c = np.divmod(best, grid[1])
    step = np.arange(-1, 2)
    rr, cc = np.meshgrid(step, step, indexing="ij")
    rows, cols = r[:, None] + rr.ravel(), c[:, None] + cc.ravel()
    ok = (rows >= 0) & (rows < grid[0]) & (cols >= 0) & (cols < grid[1])
    near = np.take_along_axis(cosines, np.where(ok, rows * grid[1] + cols, 0), 1)
    top = cosines.max(1)
    w = np.where(ok, np.exp((near - top[:, None]) / sharp), 0)
    w /= w.sum(1, keepdims=True)
    return (w * rows).sum(1), (w * cols).sum(1), top.clip(0)


def _largest(masks: np.ndarray) -> np.ndarray:
    """``(A, H, W)`` with the largest connected part of each."""
    from scipy import ndimage

    within = np.zeros((3, 3, 3), bool)
    within[1] = True
    label, n = ndimage.label(masks, within)
    if not n:
        return masks
    flat = label.ravel()
    size = np.bincount(flat, minlength=n + 1)
    size[0] = 0
    best = size[label].reshape(len(masks), -1).argmax(1)
    chosen = label.reshape(len(masks), -1)[np.arange(len(masks)), best]
    return masks & (label == chosen[:, None, None])


def warp_masks(masks: csr_matrix, shape: tuple[int, int], source: np.ndarray) -> csr_matrix:
    """Masks seen through a warp: ``source (H2 * W2,) int64`` is the cell that each cell comes from, -1 for none."""
    from scipy.sparse import csr_matrix

    cells = np.flatnonzero(source >= 0)
    move = csr_matrix((np.ones(len(cells)), (source[cells], cells)), shape=(shape[0] * shape[1], len(source)))
    return (masks.astype(float) @ move).astype(bool).tocsr()
