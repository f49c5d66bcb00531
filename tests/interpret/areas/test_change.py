import json

import numpy as np
import pytest

from mmsae.errors import InputError
from mmsae.interpret.areas.areas import find_areas
from mmsae.interpret.areas.change import what_changed
from tests.helpers.areas import codes, scene


def test_what_stayed_moved_went_and_came():
    before, _ = scene([([1], 1, 1, 4, 4), ([2], 1, 9, 4, 4), ([3], 9, 1, 4, 4)])
    after, _ = scene([([1], 1, 1, 4, 4), ([2], 10, 10, 4, 4), ([4], 9, 1, 4, 4)])
    a, b = find_areas(codes(before)), find_areas(codes(after))
    said = what_changed(a, b).about(a, b, {1: "dog", 2: "ball", 3: "cat", 4: "bowl"})

    def named(kind):
        return [(x.get("from", x)["latents"][0]["name"]) for x in said[kind]]

    assert (named("stayed"), named("moved"), named("gone"), named("came")) == (["dog"], ["ball"], ["cat"], ["bowl"])
    assert said["moved"][0]["from"]["box"] != said["moved"][0]["to"]["box"]
    json.dumps(said)


def test_a_matched_area_says_what_is_altered():
    before, _ = scene([([1, 2, 6], 2, 2, 6, 6)])
    after, _ = scene([([1, 2, 7], 2, 2, 6, 6)])
    a, b = find_areas(codes(before)), find_areas(codes(after))
    pair = what_changed(a, b).about(a, b, {6: "red", 7: "blue"})["stayed"][0]
    assert pair["less"][0]["name"] == "red" and pair["more"][0]["name"] == "blue"


def test_equal_images_differ_in_nothing_and_other_grids_are_refused():
    areas = find_areas(codes(scene([([1], 2, 2, 6, 6)])[0]))
    same = what_changed(areas, areas)
    assert not len(same.moved) and not len(same.gone) and not len(same.came) and len(same.stayed) == 1
    with pytest.raises(InputError, match=r"\(32, 32\) and \(8, 8\)"):
        what_changed(areas, find_areas(codes(np.zeros((4, 4, 32), np.float32))))
