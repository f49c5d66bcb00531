"""What vectors phrases have where the encoder has no text tower: the rows of its classifier, by the classes' names."""

import numpy as np
import pytest
import torch

from mmsae.errors import InputError
from mmsae.interpret.embedder import Embedder, imagenet_names, known_vectors


class Classifies:
    modalities = ("image",)

    def __init__(self, classes=1000):
        rows = torch.randn(classes, 6, generator=torch.Generator().manual_seed(0)) + 5
        self.classifier = rows, torch.zeros(classes)


def embedder(host):
    made = Embedder("test")
    made.__dict__["host"] = host
    return made


def test_imagenets_classes_have_a_name_each():
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench" and {"crane", "crane (n03126707)"} <= set(names)


def test_a_class_is_its_row_of_the_classifier_about_the_mean_of_all():
    host = Classifies()
    made = embedder(host)
    assert made.knows_words and not made.reads_text
    rows = (host.classifier[0] - host.classifier[0].double().mean(0)).numpy()
    found = made.phrases(["goldfish", "tench"], ["a photo of a {}"])
    assert np.allclose(found, (rows / np.linalg.norm(rows, axis=1, keepdims=True))[[1, 0]], atol=1e-6)


def test_words_that_are_no_class_are_refused_and_other_classifiers_know_none():
    with pytest.raises(InputError, match="'unicorn' is no class that it knows"):
        embedder(Classifies()).phrases(["goldfish", "unicorn"], ["{}"])
    assert not embedder(Classifies(10)).knows_words


def test_where_words_are_no_class_there_is_no_vector():
    made = embedder(Classifies())
    found = known_vectors(made, ["unicorn", "tench"], ["{}"])
    assert np.isnan(found[0]).all() and np.allclose(found[1], made.classes["tench"])
    assert np.isnan(known_vectors(made, ["unicorn"], ["{}"])).all()
