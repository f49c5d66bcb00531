import numpy as np

from mmsae.interpret.areas.areas import find_areas
from mmsae.interpret.areas.connected import iou
from mmsae.interpret.areas.match import MatchOptions, match_areas
from mmsae.interpret.areas.transfer import patch_cosines, transfer_areas, warp_masks
from tests.helpers.areas import VIEWS, codes, scene


def textured(seed):
    """Shapes each patch of which has latents of its own besides that of its shape, as parts of an object have."""
    rng = np.random.default_rng(seed)
    z, masks = scene([([0], 1, 1, 4, 4), ([1], 2, 10, 5, 4), ([2], 10, 2, 4, 5)])
    parts = rng.random((16, 16, 24)) * (rng.random((16, 16, 24)) < 0.2) * masks.any(0)[..., None]
    z[..., 8:32] = parts
    return z


def test_an_area_goes_where_the_area_matcher_finds_it():
    change, source = VIEWS["crop"]
    for seed in range(4):
        z = textured(seed)
        w = np.ascontiguousarray(change(z))
        a, b = find_areas(codes(z)), find_areas(codes(w))
        match = match_areas(a, b, MatchOptions(assign="mutual"))
        moved = transfer_areas(a, patch_cosines(codes(z), codes(w)), ((16, 16), (16, 16)))
        warped = warp_masks(a.masks, a.shape, source.ravel())
        i, j = next((i, j) for i, j in match.pairs if iou(warped, b.masks)[i, j] > 0.7)
        by_area, by_patch = iou(warped, b.masks)[i, j], iou(warped, moved.masks)[i, i]
        assert moved.accepted[i] and by_patch > by_area - 0.1


def test_an_area_stays_in_its_own_image():
    z = textured(0)
    areas = find_areas(codes(z))
    moved = transfer_areas(areas, patch_cosines(codes(z), codes(z)), ((16, 16), (16, 16)))
    own = np.array([areas.latents[i].indices[0] < 3 for i in range(areas.n)])
    assert moved.accepted[own].all() and np.diag(iou(moved.masks, areas.masks))[own].min() > 0.7
    assert np.abs(moved.box - areas.box)[own].max() <= 1.5 / 16


def test_what_is_nowhere_has_no_place():
    a, b = scene([([0], 1, 1, 4, 4)])[0], scene([([1], 1, 1, 4, 4)])[0]
    areas = find_areas(codes(a))
    moved = transfer_areas(areas, patch_cosines(codes(a), codes(b)), ((16, 16), (16, 16)))
    assert not moved.accepted.any() and np.isnan(moved.box).all()
