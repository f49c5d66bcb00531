"""Counts of what a look found, by hand."""

import numpy as np

from mmsae.look.summary import one_class, sentence, summary
from tests.helpers.evidence import write_evidence


def test_a_latent_is_of_one_class_where_five_of_its_nine_strongest_are():
    label = np.array([0] * 5 + [1] * 5 + [-1] * 9)
    top = np.array(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8],  # five and four
            [0, 1, 2, 3, 5, 6, 7, 8, 10],  # four, four, none
            [5, 6, 7, 8, 9, 10, 11, 12, 13],  # five
            [10, 11, 12, 13, 14, 15, 16, 17, 18],  # without classes
            [0, 1, 2, 3, 4, 5, 6, 7, -1],  # too few
        ]
    )
    assert one_class(top, label) == (2, 2)
    assert one_class(top[:, :8], label) == (0, 0)


def test_figures_of_random_weights_stand_in_brackets(tmp_path):
    z = np.zeros((40, 1, 2), np.float32)
    z[:20, 0, 0], z[:, 0, 1] = np.arange(20) + 1, np.arange(40) + 1
    labels = ["cat"] * 20 + ["dog", "cow"] * 10
    found = summary(write_evidence(tmp_path / "evidence", {"image": z}, labels=labels, n_top=9))
    assert found == {"latents": 2, "images": 40, "one_class": 2, "classes": 2, "of_classes": 3}
    said = sentence(found | {"named": 1}, found | {"named": 0, "one_class": 0, "classes": 0})
    assert "1 (0) have a name" in said and "of 2 (0) at least 5 of the 9" in said and "2 (0) of 3 folders" in said
    assert "(" not in sentence(found, None)
