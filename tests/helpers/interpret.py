"""A toy corpus with planted concepts, its evidence, and a toy encoder that knows the words, for tests of interpret."""

import numpy as np

from tests.helpers.evidence import write_evidence

WORDS = "red green blue circle square ring striped large".split()
OTHER = "table cloud music river".split()  # words of the vocabulary that nothing shows


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ToyEmbedder:
    """Words are axes, a text is the sum of its words, an image that of what it shows: both with noise and a gap."""

    name, reads_text, knows_words = "toy", True, True

    class host:
        fingerprint = "another"

    def __init__(self):
        self.axes = {w: np.eye(16)[i] for i, w in enumerate(WORDS + OTHER)}

    def phrases(self, phrases, templates=("{}",)):
        gap = np.eye(16)[15]
        return unit(np.stack([sum((self.axes.get(w, 0) for w in p.split()), 0 * gap) - gap for p in phrases])).astype(
            np.float32
        )

    def embed(self, facts, rng):
        x = facts @ np.stack([self.axes[w] for w in WORDS]) + np.eye(16)[15] + rng.normal(0, 0.02, (len(facts), 16))
        return unit(x).astype(np.float32)


def planted(folder, n=600, seed=0, real=True, random=32, modality="image", captions=True, places=1, texts=False,
            **more):  # fmt: skip
    """Evidence of eight latents that are each one word (or none of them, for ``real=False``), ``random`` that fire
    whatever is shown, and one that never fires, or for ``texts`` on texts alone.
    """
    rng = np.random.default_rng(seed)
    facts = rng.random((n, 8)) < 0.3
    said = [" ".join(["a", *(w for w, f in zip(WORDS, row, strict=True) if f), "thing"]) for row in facts]
    on = np.concatenate([facts if real else rng.random((n, 8)) < 0.3, rng.random((n, random)) < 0.3], 1)
    z = np.zeros((n, places, 8 + random + 1), np.float32)
    where = rng.integers(0, places, (n, 8 + random))
    np.put_along_axis(z[:, :, :-1], where[:, None], (on * rng.uniform(0.5, 1.5, on.shape))[:, None], 1)
    more.setdefault("embeddings", {modality: ToyEmbedder().embed(facts, rng)})
    tokens = {modality: z}
    if texts:
        tokens["text"] = np.zeros((n, 1, z.shape[2]), np.float32)
        tokens["text"][:, 0, -1] = facts[:, 0] * rng.uniform(0.5, 1.5, n)
    return write_evidence(folder, tokens, captions=said if captions else None, quantiles=5, each=10, seed=seed, **more)
