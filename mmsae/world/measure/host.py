"""How well a CLIP-like host knows the generated world: zero-shot by attribute, and retrieval."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmsae.evaluation.zeroshot.scores import accuracy, class_embeddings
from mmsae.hosts import Host
from mmsae.metrics.pairs.retrieval import both_ways, groups_of
from mmsae.world.generator.captions import PLACES
from mmsae.world.generator.scene import BACKGROUNDS, COLOURS, OBJECT_ATTRIBUTES, SHAPES, SIZES, TEXTURES, Scenes

Embed = Callable[[list[str]], Tensor]

_NOUNS = [f"{c} {s}" for c, s in product(COLOURS, SHAPES)]
#: ``{attribute: (class names as they stand in a caption, templates)}``; the order of the classes is the scene's.
ATTRIBUTE_PROMPTS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "colour": (COLOURS, [f"a {{}} {s}" for s in SHAPES]),
    "shape": (SHAPES, [f"a {c} {{}}" for c in COLOURS]),
    "size": (SIZES, [f"a {{}} {n}" for n in _NOUNS]),
    "texture": (TEXTURES, [f"a {{}} {n}" for n in _NOUNS]),
    "background": (BACKGROUNDS, [f"a {n} on a {{}} background" for n in _NOUNS]),
    "position": (PLACES, [f"a {n} {{}}" for n in _NOUNS]),
    "colour_shape": (tuple(_NOUNS), ["a {}"]),
}


@torch.no_grad()
def embed_images(host: Host, images: np.ndarray, batch_size: int = 500) -> Tensor:
    """``(n, d)`` raw embeddings of ``(n, H, W, 3) uint8`` images, through the host's own transform."""
    transform, out = host.transform(), []
    for i in range(0, len(images), batch_size):
        out.append(host.encode_image(torch.stack([transform(Image.fromarray(x)) for x in images[i : i + batch_size]])))
    return torch.cat(out).float().cpu()


@torch.no_grad()
def embed_texts(host: Host, texts: list[str], batch_size: int = 1000) -> Tensor:
    """``(n, d)`` raw embeddings of texts."""
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([host.encode_text(host.tokenize(p)) for p in parts]).float().cpu()


def attribute_labels(scenes: Scenes) -> dict[str, Tensor]:
    """``{attribute: (n,) int64}`` of scenes of one object, the keys of :data:`ATTRIBUTE_PROMPTS`."""
    names = list(OBJECT_ATTRIBUTES)
    labels = {a: scenes.objects[:, 0, i] for i, a in enumerate(names)}
    labels |= {"background": scenes.background, "position": scenes.position}
    labels["colour_shape"] = labels["colour"].astype(int) * len(SHAPES) + labels["shape"]
    return {a: torch.from_numpy(np.asarray(v)).long() for a, v in labels.items()}


def zero_shot_attributes(image: Tensor, scenes: Scenes, embed: Embed) -> dict[str, float]:
    """Zero-shot accuracy by attribute, on the scenes of one object (of two, an attribute has two values).

    ``image (n, d)`` are embeddings of all scenes, ``embed`` gives those of texts. The keys are those of
    :data:`ATTRIBUTE_PROMPTS`; ``colour_shape`` is 30-way. Chance is one in the number of classes.
    """
    alone = np.flatnonzero(~scenes.two)
    x = torch.nn.functional.normalize(image[torch.from_numpy(alone)], dim=1)
    labels = attribute_labels(scenes.rows(alone))
    return {
        a: accuracy(x @ torch.nn.functional.normalize(class_embeddings(embed, classes, templates), dim=1).T, labels[a])
        for a, (classes, templates) in ATTRIBUTE_PROMPTS.items()
    }


def recall_at_1(image: Tensor, text: Tensor, captions: list[str]) -> dict[str, float]:
    """``{image_to_text, text_to_image}``: share of samples whose nearest partner has an equal caption."""
    both = both_ways(image, text, groups_of(captions), ks=(1,))
    return {direction: recall[1] for direction, recall in both.items()}
