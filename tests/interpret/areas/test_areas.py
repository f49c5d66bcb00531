import numpy as np
import pytest
import torch
from scipy import ndimage

from mmsae.interpret.areas.areas import area_graph, find_areas
from mmsae.interpret.areas.connected import connected_areas, iou, upsampling
from mmsae.interpret.areas.patches import AreaLatents, AreaOptions
from tests.helpers.areas import D, codes, drawn, scene


def test_two_blobs_of_one_latent_are_two_areas_and_two_latents_on_one_blob_are_one():
    z, _ = scene([([3], 1, 1, 3, 3), ([3], 9, 9, 3, 3), ([5, 7], 1, 9, 3, 3)])
    areas = find_areas(codes(z))
    made = sorted(tuple(areas.latents[i].indices.tolist()) for i in range(areas.n))
    assert made == [(3,), (3,), (5, 7)]
    both = made.index((5, 7))
    one = next(i for i in range(areas.n) if len(areas.latents[i].indices) == 2)
    assert areas.about({5: "wheel", 7: "spoke"})[one]["latents"][0]["name"] == "spoke" and both >= 0  # 1.1 > 1
    assert areas.size[one] == pytest.approx(9, abs=3)


def test_counts_of_separate_shapes_are_right():
    for n in range(1, 7):
        for seed in range(5):
            shapes = [(4, *s[1:]) for s in drawn(n, seed)]
            assert find_areas(codes(scene(shapes)[0])).n == n


def test_masks_cover_the_shapes():
    for seed in range(5):
        shapes = drawn(6, seed)
        z, masks = scene(shapes)
        areas = find_areas(codes(z))
        fine = masks.repeat(2, 1).repeat(2, 2)
        assert areas.n == len(shapes)
        for i in range(areas.n):
            which = [s[0] for s in shapes].index(areas.latents[i].indices[0])
            m = areas.mask(i)
            assert (m & fine[which]).sum() / (m | fine[which]).sum() > 0.7
            ys, xs = np.nonzero(m)
            assert areas.box[i] == pytest.approx(
                [xs.min() / 32, ys.min() / 32, (xs.max() + 1) / 32, (ys.max() + 1) / 32]
            )


def test_connected_areas_equal_the_slow_way():
    rng = np.random.default_rng(0)
    maps = rng.random((20, 9, 7)).astype(np.float32) ** 3
    maps[3] = 0
    found = connected_areas(maps, 2, 0.5, 2.0)
    slow = []
    for layer, m in enumerate(maps):
        fine = torch.nn.functional.interpolate(
            torch.from_numpy(m)[None, None], scale_factor=2, mode="bilinear", align_corners=False
        )[0, 0].numpy()
        label, n = ndimage.label(fine >= 0.5 * m.max(), np.ones((3, 3))) if m.max() else (None, 0)
        slow += [(layer, (label == k).ravel(), fine[label == k].sum() / 4) for k in range(1, n + 1)
                 if (label == k).sum() >= 8]  # fmt: skip
    assert found.layer.tolist() == [s[0] for s in slow]
    assert (found.masks.toarray() == np.stack([s[1] for s in slow])).all()
    assert np.allclose(found.mass, [s[2] for s in slow], rtol=1e-5)


def test_many_maps_are_labelled_in_parts(monkeypatch):
    maps = np.random.default_rng(1).random((11, 6, 6)).astype(np.float32) ** 4
    whole = connected_areas(maps, least=1)
    monkeypatch.setattr("mmsae.interpret.areas.connected.CELLS", 3 * 144)
    parts = connected_areas(maps, least=1)
    assert (whole.layer == parts.layer).all() and (whole.masks != parts.masks).nnz == 0
    assert np.allclose(whole.centre, parts.centre)


def test_upsampling_keeps_constants_and_a_lone_patch_keeps_its_place():
    assert np.allclose(upsampling(5, 3).sum(1), 1)
    maps = np.zeros((1, 5, 5), np.float32)
    maps[0, 2, 3] = 1
    found = connected_areas(maps, 2, 0.5, 1)
    assert found.box.tolist() == [[pytest.approx(0.6), pytest.approx(0.4), pytest.approx(0.8), pytest.approx(0.6)]]
    assert found.size.tolist() == [1]


def test_nested_squares_are_a_chain_with_levels():
    z, _ = scene([([1], 0, 0, 16, 16), ([2], 2, 2, 10, 10), ([3], 4, 4, 5, 5), ([4], 5, 5, 2, 2)])
    areas = find_areas(codes(z))
    graph = area_graph(areas)
    by = {int(areas.latents[i].indices[0]): i for i in range(areas.n)}
    chain = [by[k] for k in (4, 3, 2, 1)]
    assert [graph.parent[i] for i in chain] == [*chain[1:], -1]
    assert (np.diff(graph.level[chain]) > 0).all()
    assert not graph.adjacent.any()
    assert graph.inside.sum() == 6 and not (graph.inside & graph.inside.T).any()


def test_touching_areas_are_neighbours_and_distant_ones_not():
    z, _ = scene([([1], 2, 2, 4, 4), ([2], 2, 6, 4, 4), ([3], 12, 12, 3, 3)])
    areas = find_areas(codes(z))
    by = {int(areas.latents[i].indices[0]): i for i in range(areas.n)}
    touch = area_graph(areas).adjacent
    assert touch[by[1], by[2]] and touch[by[2], by[1]] and touch.sum() == 2


def test_what_makes_no_area():
    z, _ = scene([([1], 2, 2, 4, 4), ([2], 9, 9, 4, 4), ([3], 2, 9, 1, 2)])  # the last is too small
    latents = AreaLatents.plain(D)
    latents.usable[1] = False
    assert [tuple(r.indices) for r in find_areas(codes(z), latents).latents] == [(2,)]
    weak = AreaLatents.plain(D)
    weak.least[2] = 1.5
    assert [tuple(r.indices) for r in find_areas(codes(z), weak).latents] == [(1,)]
    assert find_areas(codes(z), options=AreaOptions(least_patches=1)).n == 3


def test_an_empty_image_has_no_areas():
    areas = find_areas(codes(np.zeros((4, 4, D), np.float32)))
    assert areas.n == 0 and areas.about() == [] and areas.descriptor.shape == (0, D)
    assert area_graph(areas).parent.shape == (0,)


def test_descriptors_are_maxima_over_masks_times_idf():
    z, _ = scene([([1], 2, 2, 4, 4)])
    z[3, 3, 9] = 3.0  # a small part within, of another latent
    z[15, 15, 9] = 8.0  # and elsewhere
    latents = AreaLatents.plain(D)
    latents.idf[:] = 2.0
    latents.idf[9] = 1.0
    latents.usable[9] = True
    areas = find_areas(codes(z), latents, AreaOptions(least_patches=4))
    assert areas.n == 1
    expected = np.zeros(D)
    expected[1], expected[9] = 2.0, 3.0
    assert np.allclose(areas.descriptor[0].toarray()[0], expected / np.linalg.norm(expected))


def test_areas_of_almost_the_same_cells_become_the_cells_of_most_mass():
    z = np.zeros((16, 16, D), np.float32)
    z[2:12, 2:12, 1], z[2:12, 2:13, 2] = 1.0, 3.0
    areas = find_areas(codes(z))
    assert areas.n == 1 and areas.latents[0].indices.tolist() == [1, 2]
    alone = find_areas(codes(z * (np.arange(D) == 2)))
    assert iou(areas.masks, alone.masks)[0, 0] == 1
