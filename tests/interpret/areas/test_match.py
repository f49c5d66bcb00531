import numpy as np
import pytest

from mmsae.interpret.areas.areas import find_areas
from mmsae.interpret.areas.connected import iou
from mmsae.interpret.areas.match import MatchOptions, dense_similarity, energies, explain, match_areas, pool_dense
from mmsae.interpret.areas.transfer import warp_masks
from tests.helpers.areas import VIEWS, D, codes, drawn, scene


def places(z):
    """Codes that say where a shape is and not what it is."""
    rows, cols, _ = z.shape
    out = np.zeros((rows, cols, D), np.float32)
    block = (np.arange(rows)[:, None] // 4) * 4 + np.arange(cols)[None] // 4
    np.put_along_axis(out, block[..., None], z.any(-1)[..., None].astype(np.float32), -1)
    return out


def right_share(view, describe=lambda z: z):
    """Share of shapes of four patches or more, whole in the view, whose match covers where they went."""
    change, source = VIEWS[view]
    right = total = 0
    for seed in range(12):
        z, _ = scene(drawn(6, seed))
        first, second = (find_areas(codes(describe(v))) for v in (z, np.ascontiguousarray(change(z))))
        warped = warp_masks(first.masks, first.shape, source.ravel())
        whole = np.diff(warped.indptr) >= np.diff(first.masks.indptr) * (4 if view == "crop" else 1)
        match = match_areas(first, second)
        overlap = iou(warped, second.masks)
        hit = {i for i, j in match.pairs.tolist() if overlap[i, j] > 0.7}
        some = [i for i in np.flatnonzero(whole) if first.size[i] >= 4]
        right, total = right + sum(i in hit for i in some), total + len(some)
    assert total >= 8
    return right / total


@pytest.mark.parametrize("view", VIEWS)
def test_shapes_are_found_again_in_another_view(view):
    assert right_share(view) >= 0.9


@pytest.mark.parametrize("view", VIEWS)
def test_codes_of_places_alone_do_not_find_them(view):
    assert right_share(view, places) < 0.5


def test_an_image_matches_itself():
    for seed in range(5):
        areas = find_areas(codes(scene(drawn(6, seed), noise=0.2, seed=seed)[0]))
        match = match_areas(areas, areas)
        assert match.pairs.tolist() == [[i, i] for i in range(areas.n)]
        assert np.abs(np.diag(match.energy)).max() < 1e-6
        assert np.allclose(match.similarity, match.similarity.T)


@pytest.mark.parametrize("options", [MatchOptions(), MatchOptions(assign="mutual"), MatchOptions(relatives=False)])
def test_exchanging_the_images_inverts_the_match(options):
    z, _ = scene(drawn(6, 1), noise=0.3, seed=1)
    other, _ = scene([*drawn(6, 1)[:4], ([30], 12, 12, 3, 3)], noise=0.3, seed=2)
    a, b = find_areas(codes(z)), find_areas(codes(other))
    there, back = match_areas(a, b, options), match_areas(b, a, options)
    assert len(there.pairs) >= 4
    assert sorted(there.pairs.tolist()) == sorted(p[::-1] for p in back.pairs.tolist())
    assert np.allclose(there.energy, back.energy.T)


def test_images_without_anything_in_common_do_not_match():
    a = find_areas(codes(scene([([1], 1, 1, 4, 4), ([2], 9, 9, 4, 4)])[0]))
    b = find_areas(codes(scene([([3], 1, 1, 4, 4), ([4], 9, 9, 4, 4)])[0]))
    match = match_areas(a, b)
    assert not len(match.pairs) and (match.energy == 1).all()
    empty = find_areas(codes(np.zeros((16, 16, D), np.float32)))
    assert match_areas(a, empty).pairs.shape == (0, 2) == match_areas(empty, empty, MatchOptions("mutual")).pairs.shape


def test_energies_equal_the_formula():
    z, _ = scene([([1], 0, 0, 12, 12), ([2], 2, 2, 4, 4), ([3], 2, 12, 4, 4), ([4], 13, 13, 3, 3)])
    w, _ = scene([([1], 0, 0, 12, 12), ([5], 2, 2, 4, 4), ([3], 2, 12, 4, 4), ([2], 12, 2, 3, 3)], noise=0.5)
    from mmsae.interpret.areas.areas import area_graph

    a, b = find_areas(codes(z)), find_areas(codes(w))
    g, h = area_graph(a), area_graph(b)
    own = np.random.default_rng(0).random((a.n, b.n))
    out = energies(own, g, h)
    for i in range(a.n):
        for j in range(b.n):
            total, weight = 10 * own[i, j], 10
            for left, right in ((g.inside.T, h.inside.T), (g.inside, h.inside), (g.adjacent, h.adjacent)):
                pairs = [own[p, q] for p in np.flatnonzero(left[i]) for q in np.flatnonzero(right[j])]
                if pairs:
                    total, weight = total + min(pairs), weight + 1
            assert out[i, j] == pytest.approx(total / weight)
    assert g.inside.any() and g.adjacent.any()


def test_reasons_sum_to_the_similarity_and_begin_with_the_planted_latent():
    z, _ = scene([([1, 2, 3], 2, 2, 5, 5)])
    z[..., 2] *= 4
    w, _ = scene([([2, 3, 9], 8, 8, 5, 5)])
    w[..., 2] *= 4
    a, b = find_areas(codes(z)), find_areas(codes(w))
    said = explain(a, 0, b, 0, {2: "wheel"})
    assert said[0].latent == 2 and said[0].name == "wheel"
    assert sum(r.share for r in said) == pytest.approx(match_areas(a, b).similarity[0, 0])
    assert {r.latent for r in said} == {2, 3}


def test_repeated_objects_are_said_to_be_ambiguous():
    z, _ = scene([([1], 1, 1, 4, 4), ([1], 9, 9, 4, 4), ([2], 1, 9, 4, 4)])
    areas = find_areas(codes(z))
    match = match_areas(areas, areas)
    twin = [areas.latents[i].indices[0] == 1 for i in match.pairs[:, 0]]
    assert np.allclose(match.margin[twin], 0, atol=1e-6) and (match.margin[~np.array(twin)] > 0.5).all()
    clear = match_areas(areas, areas, MatchOptions("mutual", ratio=0.8))
    assert [areas.latents[i].indices[0] for i, _ in clear.pairs] == [2]


def test_dense_descriptors_are_means_over_areas():
    z, masks = scene([([1], 2, 2, 4, 4), ([2], 9, 9, 4, 4)])
    features = np.random.default_rng(0).normal(size=(16, 16, 5))
    areas = find_areas(codes(z))
    pooled = pool_dense(areas, features)
    for i in range(areas.n):
        own = masks[int(areas.latents[i].indices[0]) - 1]
        assert np.allclose(pooled[i], features[own].mean(0), atol=1e-6)
    s = dense_similarity(pooled, pooled)
    assert match_areas(areas, areas, similarity=s).pairs.tolist() == [[0, 0], [1, 1]]
