"""The generated world in memory: images, two captions each, and the truth about them."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from mmsae.world.generator.captions import full_captions, partial_captions
from mmsae.world.generator.render import render
from mmsae.world.generator.scene import (
    BACKGROUNDS,
    CONCEPTS,
    OBJECT_ATTRIBUTES,
    POSITIONS,
    RELATIONS,
    Scenes,
    concept_matrix,
    sample_scenes,
)


class WorldData(NamedTuple):
    """``n`` generated samples."""

    images: np.ndarray  #: ``(n, 32, 32, 3) uint8``
    scenes: Scenes  #: What was drawn
    concepts: np.ndarray  #: ``(n, 26) bool``, columns as in :data:`mmsae.world.generator.scene.CONCEPTS`
    full: list[str]  #: ``n`` captions that tell every attribute
    partial: list[str]  #: ``n`` captions that leave attributes out
    uids: list[str]  #: ``n`` sample ids of 32 hex digits, the same wherever the same arguments were given

    def meta(self, i: int) -> dict[str, Any]:
        """What sample ``i`` carries as JSON: uid, captions, sibling number, attributes, the concepts that are true.

        ``class`` is colour and shape of a lone object ("red circle"), None where there are two.
        """
        s = self.scenes
        objects = [
            {name: values[v] for (name, values), v in zip(OBJECT_ATTRIBUTES.items(), row, strict=True)}
            for row in s.objects[i].tolist()
            if row[0] >= 0
        ]
        return {
            "uid": self.uids[i],
            "caption": self.full[i],
            "captions": [self.full[i], self.partial[i]],
            "pair": int(s.pair[i]),
            "objects": objects,
            "class": "{colour} {shape}".format(**objects[0]) if len(objects) == 1 else None,
            "background": BACKGROUNDS[s.background[i]],
            "position": POSITIONS[s.position[i]] if s.position[i] >= 0 else None,
            "relation": RELATIONS[s.relation[i]] if s.relation[i] >= 0 else None,
            "concepts": [CONCEPTS[c] for c in np.flatnonzero(self.concepts[i])],
        }


def generate(n: int, seed: int, *, siblings: bool = True) -> WorldData:
    """``n`` samples, a function of the arguments; with ``siblings`` rows 2i and 2i+1 differ in one attribute."""
    scenes = sample_scenes(n, seed, siblings=siblings)
    uids = [hashlib.blake2b(f"{seed}:{n}:{siblings}:{i}".encode(), digest_size=16).hexdigest() for i in range(n)]
    return WorldData(
        images=render(scenes, seed),
        scenes=scenes,
        concepts=concept_matrix(scenes),
        full=full_captions(scenes),
        partial=partial_captions(scenes, seed),
        uids=uids,
    )
