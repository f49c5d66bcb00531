"""Tables of concepts at random, and the generated world's truth as codes."""

import numpy as np
from scipy.sparse import csc_matrix

from mmsae.interpret.scenarios.concepts import Concepts
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.world.generator.captions import mentions
from mmsae.world.generator.data import generate
from mmsae.world.generator.scene import CONCEPTS
from tests.helpers.evidence import write_evidence


def concepts_of(table, names=()):
    """A dense table of bits as :class:`Concepts`."""
    f = table.shape[1]
    return Concepts(csc_matrix(table.astype(bool)), np.arange(f), list(names) or [f"c{j}" for j in range(f)])


def independent(n, f, seed, share=(0.02, 0.2)):
    """``(n, f) bool``: concepts that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    return rng.random((n, f)) < rng.uniform(*share, f)


def oracle_world(folder, n=600, seed=0, swap=()):
    """Evidence whose latents are the world's 26 concepts, of images as they are drawn and of captions as they say.

    ``swap`` are items that get the caption of the item before them.
    """
    data = generate(n, seed)
    captions = list(data.full)
    for i in swap:
        captions[i] = data.full[i - 1]
    rng = np.random.default_rng(seed)
    codes = {}
    for m, truth in (("image", data.concepts), ("text", mentions(captions))):
        codes[m] = (truth * rng.uniform(0.5, 1.5, truth.shape))[:, None].astype(np.float32)
    write_evidence(folder, codes, captions=captions, images=data.images, each=40)
    names = {j: LatentName(c, auroc=1.0) for j, c in enumerate(CONCEPTS)}
    (folder / "names").mkdir()
    write_names(folder / "names" / "names.json", names, "s" * 32)
    return data, captions
