"""Connected areas of many activation maps at once: upsampled, thresholded at a share of their maximum, labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

CELLS = 2**22  # of upsampled maps that are labelled at a time


class ConnectedAreas(NamedTuple):
    """A areas of a stack of maps, in the order of the maps and of rows within a map."""

    layer: np.ndarray  #: ``(A,) int64`` which map an area is of
    masks: csr_matrix  #: ``(A, H * W) bool`` cells of the upsampled grid
    shape: tuple[int, int]  #: ``(H, W)``
    size: np.ndarray  #: ``(A,) float32`` in patches
    mass: np.ndarray  #: ``(A,) float32`` sum of the map over an area, in patches
    #: ``(A, 4) float32`` left, top, right, bottom as shares of the grid's width and height
    box: np.ndarray
    centre: np.ndarray  #: ``(A, 2) float32`` x, y of the centre of mass, as shares


def upsampling(n: int, times: int) -> np.ndarray:
    """``(times * n, n) float32`` bilinear interpolation between the centres of cells, constant at the ends."""
    at = ((np.arange(n * times) + 0.5) / times - 0.5).clip(0, n - 1)
    low = np.floor(at).astype(int).clip(0, max(n - 2, 0))
    out = np.zeros((n * times, n), np.float32)
    rows = np.arange(n * times)
    out[rows, low] += 1 - (at - low)
    out[rows, np.minimum(low + 1, n - 1)] += at - low
    return out


def connected_areas(maps: np.ndarray, times: int = 2, level: float = 0.5, least: float = 3.0) -> ConnectedAreas:
    """Where maps reach a share of their own maximum, split into connected areas (8 neighbours).

    Args:
        maps: ``(m, rows, cols)`` values, none below 0.
        times: How many times finer the grid of the areas is, by bilinear interpolation.
        level: Share of a map's maximum that a cell has to reach.
        least: Areas of fewer patches are left out; below two patches an area is noise.
    """
    from scipy.sparse import csr_matrix

    m, rows, cols = maps.shape
    up_r, up_c = upsampling(rows, times), upsampling(cols, times)
    shape = (len(up_r), len(up_c))
    cells = shape[0] * shape[1]
    step = max(1, CELLS // max(cells, 1))
    parts = [_label(maps[lo : lo + step], up_r, up_c, level) for lo in range(0, m, step)]
    offset = np.cumsum([0, *(n for *_, n in parts)])
    area = np.concatenate([a + o for (a, *_), o in zip(parts, offset[:-1], strict=True)] or [np.zeros(0, int)])
    cell = np.concatenate([c + i * step * cells for i, (_, c, *_) in enumerate(parts)] or [np.zeros(0, int)])
    value = np.concatenate([v for *_, v, _ in parts] or [np.zeros(0, np.float32)])
    n = int(offset[-1])
    size = np.bincount(area, minlength=n) / times**2
    keep = size >= least
    number = np.cumsum(keep) - 1
    on = keep[area]
    area, cell, value, n = number[area[on]], cell[on], value[on], int(keep.sum())
    order = np.argsort(area, kind="stable")
    area, cell, value = area[order], cell[order], value[order]
    start = np.searchsorted(area, np.arange(n + 1))
    layer = cell[start[:-1]] // cells
    place = cell % cells
    masks = csr_matrix((np.ones(len(place), bool), place, start), shape=(n, cells))
    mass = np.bincount(area, value, n)
    y, x = np.divmod(place, shape[1])
    weight = np.maximum(mass, 1e-12)
    centre = np.stack([np.bincount(area, value * (v + 0.5) / s, n) / weight for v, s in ((x, shape[1]), (y, shape[0]))])
    return ConnectedAreas(
        layer,
        masks,
        shape,
        size[keep].astype(np.float32),
        (mass / times**2).astype(np.float32),
        boxes(masks, shape),
        centre.T.astype(np.float32),
    )


def _label(
    maps: np.ndarray, up_r: np.ndarray, up_c: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Area and flat cell of every cell that is on, its value, and the number of areas."""
    from scipy import ndimage

    fine = np.einsum("Hr,mrc,Wc->mHW", up_r, maps.astype(np.float32), up_c, optimize=True)
    top = maps.reshape(len(maps), -1).max(1)[:, None, None]
    # interpolation reaches a share of .5 * .5 * ... by rounding only: a hair less is as much
    on = (fine >= level * top * (1 - 1e-5)) & (top > 0)
    within = np.zeros((3, 3, 3), bool)
    within[1] = True  # neighbours within a map, none between maps
    label, n = ndimage.label(on, within)
    flat = label.ravel()
    cell = np.flatnonzero(flat)
    return flat[cell].astype(np.int64) - 1, cell, fine.ravel()[cell], n


def boxes(masks: csr_matrix, shape: tuple[int, int]) -> np.ndarray:
    """``(A, 4) float32`` left, top, right, bottom of masks ``(A, H * W)``, none of them empty, as shares."""
    if not masks.shape[0]:
        return np.zeros((0, 4), np.float32)
    y, x = np.divmod(masks.indices, shape[1])
    start = masks.indptr[:-1]
    low = [np.minimum.reduceat(v, start) for v in (x, y)]
    high = [np.maximum.reduceat(v, start) + 1 for v in (x, y)]
    return (np.stack([*low, *high], 1) / np.array([shape[1], shape[0]] * 2)).astype(np.float32)


def overlaps(a: csr_matrix, b: csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(A, B)`` float64 cells that masks share, and the cells of each, ``(A,)`` and ``(B,)``."""
    shared = (a.astype(np.float64) @ b.astype(np.float64).T).toarray()
    return shared, np.diff(a.indptr).astype(float), np.diff(b.indptr).astype(float)


def iou(a: csr_matrix, b: csr_matrix) -> np.ndarray:
    """``(A, B)`` intersection over union of masks on one grid; 0 of two empty ones."""
    shared, left, right = overlaps(a, b)
    return shared / np.maximum(left[:, None] + right[None] - shared, 1)
