import numpy as np
import torch

from mmsae.world.generator.captions import mentions
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import CONCEPTS, GROUP_COLUMNS, RELATIONS, SHAPES
from mmsae.world.measure.host import (
    ATTRIBUTE_PROMPTS,
    attribute_labels,
    embed_images,
    embed_texts,
    recall_at_1,
    zero_shot_attributes,
)


class Oracle:
    """Embeds a picture by its true concepts and a text by those it mentions; knows nothing of ``blind`` groups."""

    def __init__(self, data, blind=()):
        self.truth = {x.tobytes(): c for x, c in zip(data.images, data.concepts, strict=True)}
        self.texts = {}
        self.seen = torch.ones(len(CONCEPTS))
        for group in blind:
            self.seen[list(GROUP_COLUMNS[group])] = 0

    def transform(self, train=False):
        return lambda image: torch.from_numpy(self.truth[np.asarray(image).tobytes()]).float()

    def tokenize(self, texts):
        return torch.from_numpy(mentions(texts)).float()

    def encode_image(self, x):
        return x * self.seen

    encode_text = encode_image


def zero_shot(host, data):
    return zero_shot_attributes(embed_images(host, data.images), data.scenes, lambda t: embed_texts(host, t))


def test_a_host_that_knows_the_truth_is_always_right():
    data = generate(300, 2, siblings=False)
    lone = ~data.scenes.two
    host = Oracle(data)
    assert zero_shot(host, data) == dict.fromkeys(ATTRIBUTE_PROMPTS, 1.0) and lone.sum() > 100
    # which of two objects is red is lost in a bag of concepts; everything else is told apart
    captions = data.full[:100]
    assert (
        recall_at_1(embed_images(host, data.images[:100]), embed_texts(host, captions), captions)["image_to_text"] > 0.9
    )


def test_a_host_blind_for_one_attribute_fails_there_only():
    data = generate(600, 3)
    result = zero_shot(Oracle(data, blind=("shape",)), data)
    assert result.pop("shape") < 0.3 and result.pop("colour_shape") < 0.3
    assert set(result.values()) == {1.0}


def test_prompts_mention_their_class_and_labels_agree_with_the_truth():
    data = generate(200, 4)
    alone = np.flatnonzero(~data.scenes.two)
    labels = attribute_labels(data.scenes.rows(alone))
    for group, (classes, templates) in ATTRIBUTE_PROMPTS.items():
        if group == "colour_shape":
            assert labels[group].max() < 30 and len(classes) == 30
            assert classes[7].split()[1] == SHAPES[7 % len(SHAPES)]
            continue
        columns = list(GROUP_COLUMNS[group])
        assert np.array_equal(data.concepts[alone][:, columns].argmax(1), labels[group].numpy())
        for i, name in enumerate(classes):
            told = mentions([t.replace("{}", name) for t in templates])[:, columns]
            assert told[:, i].all() and told.sum() == len(templates)
    assert RELATIONS == ("left of", "above")
