import numpy as np

from mmsae.interpret.browser.vectors import latent_vectors
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.evidence import write_evidence


def numbers(packed):
    import base64

    return np.frombuffer(base64.b64decode(packed["d"]), np.int8).reshape(packed["s"]).astype(float)


def test_a_word_is_nearest_to_the_latent_of_its_concept(tmp_path):
    rng = np.random.default_rng(0)
    concept = np.arange(120) % 6
    z = np.eye(6)[concept][:, None]
    e = rng.normal(size=(6, 16))[concept] + 0.3 * rng.normal(size=(120, 16)) + 5  # away from the origin
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    said = [f"the {'red blue cat dog tree car'.split()[c]} of number {i}" for i, c in enumerate(concept)]
    write_evidence(tmp_path, {"image": z, "text": z}, captions=said, embeddings={"image": e, "text": e})
    found = latent_vectors(Evidence(tmp_path), None)
    assert found["of"] == "items" and "the" not in found["words"]["text"]
    cosine = numbers(found["words"]["vectors"]) @ numbers(found["latents"]).T
    place = {w: cosine[i].argmax() for i, w in enumerate(found["words"]["text"])}
    assert [place[w] for w in "red blue cat dog tree car".split()] == list(range(6))


def test_without_embeddings_latents_are_their_atoms(tmp_path):
    write_evidence(tmp_path, {"image": np.ones((5, 1, 4))})
    atoms = np.random.default_rng(1).normal(size=(4, 7))
    found = latent_vectors(Evidence(tmp_path), atoms)
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    assert (
        found["of"] == "atoms"
        and np.abs(numbers(found["latents"]) @ numbers(found["latents"]).T / 127**2 - unit @ unit.T).max() < 0.03
    )
    assert latent_vectors(Evidence(tmp_path), None) is None
