"""The generated world: reproducible, true to its own truth table in pixels and in words."""

import numpy as np
import pytest

from mmsae.world.generator.captions import damage, full_captions, mentions, partial_captions, swap
from mmsae.world.generator.data import generate
from mmsae.world.generator.render import DIM, GROUND, PALETTE, _paint
from mmsae.world.generator.scene import (
    COLOURS,
    CONCEPTS,
    GROUP_COLUMNS,
    OBJECT_ATTRIBUTES,
    POSITIONS,
    change_one,
    sample_scenes,
)

N = 600


@pytest.fixture(scope="module")
def data():
    return generate(N, seed=7)


def test_same_seed_same_world_and_another_seed_another(data):
    again, other = generate(N, seed=7), generate(N, seed=8)
    assert np.array_equal(data.images, again.images) and data[3:] == again[3:]
    assert not np.array_equal(data.images, other.images)
    assert not set(data.uids) & set(other.uids) and len(set(data.uids)) == N
    assert all(len(u) == 32 and int(u, 16) >= 0 for u in data.uids)


def test_an_odd_number_keeps_a_lone_last_scene():
    assert len(generate(5, seed=0).images) == 5 and generate(5, seed=0).scenes.pair.tolist() == [0, 0, 1, 1, 2]


def test_siblings_differ_in_exactly_one_attribute_of_one_object(data):
    s = data.scenes
    a, b = s.rows(slice(0, None, 2)), s.rows(slice(1, None, 2))
    differs = a.objects != b.objects
    assert (differs.sum((1, 2)) == 1).all()
    assert (differs.any(1).argmax(1) == b.changed).all()
    for name in ("background", "position", "relation", "centre", "pair"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    share = np.bincount(b.changed, minlength=4) / len(b.changed)
    assert share.argmax() == list(OBJECT_ATTRIBUTES).index("shape") and share.min() > 0.05


def test_independent_scenes_have_no_siblings():
    assert len(set(generate(50, 3, siblings=False).scenes.pair.tolist())) == 50


def test_objects_of_one_scene_never_share_a_colour_also_after_a_change():
    s = sample_scenes(4000, 5)
    for scenes in (s, change_one(s, 6), change_one(s, 6, which_object=0)):
        two = scenes.objects[scenes.two]
        assert (two[:, 0, 1] != two[:, 1, 1]).all() and (two >= 0).all()
        assert (scenes.objects[~scenes.two, 1] == -1).all()


def test_every_changed_value_is_reached():
    s = sample_scenes(20000, 1, siblings=False)
    wrong = change_one(s, 2, which_object=0)
    old, new = s.objects[:, 0], wrong.objects[:, 0]
    for a, values in enumerate(OBJECT_ATTRIBUTES.values()):
        on = wrong.changed == a
        table = np.zeros((len(values), len(values)), int)
        np.add.at(table, (old[on, a], new[on, a]), 1)
        assert (np.diag(table) == 0).all() and (table + np.eye(len(values)) > 0).all()


def test_truth_matrix_counts(data):
    c, two = data.concepts, data.scenes.two
    assert len(CONCEPTS) == 26 == len(set(CONCEPTS)) and c.shape == (N, 26)
    assert (c[:, GROUP_COLUMNS["background"]].sum(1) == 1).all()
    assert (c[:, GROUP_COLUMNS["position"]].sum(1) == ~two).all()
    assert (c[:, GROUP_COLUMNS["relation"]].sum(1) == 2 * two).all()
    assert (c[:, GROUP_COLUMNS["colour"]].sum(1) == 1 + two).all()
    for group in ("shape", "size", "texture"):
        assert (c[~two][:, GROUP_COLUMNS[group]].sum(1) == 1).all()
    assert 0.3 < two.mean() < 0.5


def test_pixels_have_the_colour_the_ground_and_the_place_that_the_truth_says(data):
    lone = np.flatnonzero(~data.scenes.two)
    s, images = data.scenes.rows(lone), data.images[lone].astype(np.float32)
    corner = np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]], axis=1)
    assert (np.abs(corner[:, None] - GROUND).sum(-1).argmin(1) == s.background).all()
    off = np.abs(images - GROUND[s.background][:, None, None]).sum(-1)  # (m, 32, 32) distance from the ground
    targets = np.concatenate([PALETTE, PALETTE * DIM])  # dim stripes are the colour too
    y, x = np.mgrid[:32, :32] + 0.5
    sides = {"left": (x, -1), "right": (x, 1), "top": (y, -1), "bottom": (y, 1)}
    for i in range(len(lone)):
        on = off[i] > 60
        near = np.abs(images[i][on][:, None] - targets).sum(-1).argmin(1) % len(COLOURS)
        assert np.bincount(near).argmax() == s.objects[i, 0, 1]  # most pixels: edges are mixed with the ground
        name = POSITIONS[s.position[i]]
        if name == "center":
            assert abs(x[on].mean() - 16) < 3 and abs(y[on].mean() - 16) < 3
        else:
            axis, sign = sides[name]
            assert sign * (axis[on].mean() - 16) > 2


def test_two_objects_stand_as_their_relation_says(data):
    s = data.scenes.rows(data.scenes.two)
    dx, dy = (s.centre[:, 1] - s.centre[:, 0]).T
    assert (np.where(s.relation == 0, dx, dy) > 10).all() and (np.where(s.relation == 0, dy, dx) < 3).all()


def test_textures_sizes_and_shapes_are_seen_in_the_noiseless_picture():
    s = sample_scenes(3000, 4, siblings=False)
    s = s.rows(~s.two)
    clean = _paint(s)
    area = (np.abs(clean - GROUND[s.background][:, None, None]).sum(-1) > 60).sum((1, 2))
    shape, colour, size, texture = s.objects[:, 0].T
    for k in range(5):
        assert area[(shape == k) & (size == 1)].min() > area[(shape == k) & (size == 0)].max()
    paint = PALETTE[colour][:, None, None]
    bright, dim = ((np.abs(clean - paint * f).sum(-1) < 15).sum((1, 2)) for f in (1, DIM))
    assert (dim[texture == 1] > 0.25 * bright[texture == 1]).all() and (bright > 0).all()
    assert (dim[texture == 0] < 0.25 * bright[texture == 0]).all()


def test_full_captions_tell_exactly_the_truth_and_partial_ones_nothing_else(data):
    assert np.array_equal(mentions(data.full), data.concepts)
    told = mentions(data.partial)
    assert (told <= data.concepts).all()
    kept = told[:, GROUP_COLUMNS["background"]].sum() / N
    assert 0.6 < kept < 0.8
    assert any(" right of " in c or " below " in c for c in data.partial) and any(" and " in c for c in data.partial)


def test_equal_scenes_have_equal_full_captions_and_only_they(data):
    key = np.concatenate([data.scenes.objects.reshape(N, -1), np.stack(data.scenes[1:4], 1)], 1)
    assert len({tuple(k) for k in key.tolist()}) == len(set(data.full))


def test_converse_relations_are_true():
    s = sample_scenes(400, 9, siblings=False)
    s = s.rows(s.two)
    for i, text in enumerate(partial_captions(s, 1)):
        for word in (" right of ", " below "):
            if word in text:
                second = text.split(word)[0].split()
                told = set(second) & set(COLOURS)
                assert told <= {COLOURS[s.objects[i, 1, 1]]}


def test_damage_changes_one_word_and_only_of_the_first_object(data):
    captions, attributes = damage(data.scenes, seed=3)
    words = {name: set(values) for name, values in OBJECT_ATTRIBUTES.items()}
    for true, false, attribute in zip(full_captions(data.scenes), captions, attributes, strict=True):
        a, b = true.split(), false.split()
        at = [i for i in range(len(a)) if a[i] != b[i]]
        assert len(a) == len(b) and len(at) == 1 and at[0] < 5
        assert {a[at[0]], b[at[0]]} <= words[attribute]
    assert set(attributes) == set(OBJECT_ATTRIBUTES)


def test_swap_gives_the_chosen_share_another_text(data):
    captions, wrong = swap(data.full, seed=1, share=0.3)
    assert wrong.sum() == 180 and [a != b for a, b in zip(captions, data.full, strict=True)] == wrong.tolist()
    with pytest.raises(ValueError, match="all are equal"):
        swap(["a"] * 4, seed=0)


def test_meta_of_a_sample(data):
    meta = data.meta(3)
    assert meta["uid"] == data.uids[3] and meta["captions"] == [data.full[3], data.partial[3]] and meta["pair"] == 1
    assert [CONCEPTS[c] for c in np.flatnonzero(data.concepts[3])] == meta["concepts"]
