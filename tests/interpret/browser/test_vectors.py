import numpy as np
import pytest

from mmsae.interpret.browser import vectors as module
from mmsae.interpret.browser.vectors import latent_vectors
from mmsae.interpret.evidence.folder import Evidence
from mmsae.types import InputError
from tests.helpers.evidence import write_evidence
from tests.helpers.interpret import OTHER, WORDS, ToyEmbedder, planted


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


def listed(tmp_path, words):
    (tmp_path / "words.txt").write_text("\n".join(words))
    return str(tmp_path / "words.txt")


def nearest(found):
    """``{word: latent}``."""
    cosine = numbers(found["words"]["vectors"]) @ numbers(found["latents"]).T
    return {w: int(cosine[i].argmax()) for i, w in enumerate(found["words"]["text"])}


def test_words_that_no_caption_has_are_found_by_the_hosts_vectors(tmp_path, monkeypatch):
    ev = Evidence(planted(tmp_path / "e", captions=False, random=0))
    monkeypatch.setattr(module.Embedder, "of", lambda *args, **options: ToyEmbedder())
    found = latent_vectors(ev, None, listed(tmp_path, [*WORDS, *OTHER, "Red"]), ["red circle", "green"])
    assert found["words"]["of"] == "toy" and found["words"]["note"] == ""
    assert found["words"]["text"] == [*WORDS, *OTHER, "red circle"]  # each once, in any case
    place = nearest(found)
    assert [place[w] for w in WORDS] == list(range(8)) and place["red circle"] in (0, 3)


def test_of_many_words_those_nearest_to_latents_are_kept(tmp_path, monkeypatch):
    ev = Evidence(planted(tmp_path / "e", random=0))
    monkeypatch.setattr(module.Embedder, "of", lambda *args, **options: ToyEmbedder())
    monkeypatch.setattr(module, "VOCABULARY", 8)
    found = latent_vectors(ev, None, listed(tmp_path, [*OTHER, *WORDS]))
    assert found["words"]["text"] == WORDS and numbers(found["words"]["vectors"]).shape[0] == 8


def test_captions_are_gone_by_where_the_host_reads_no_text(tmp_path, monkeypatch):
    ev = Evidence(planted(tmp_path / "e"))
    monkeypatch.setattr(module.Embedder, "of", lambda *args, **options: None)
    found = latent_vectors(ev, None)
    assert found["words"]["of"] == "captions" and "does not say whose" in found["words"]["note"]
    assert latent_vectors(ev, None, "captions")["words"] | {"note": ""} == found["words"] | {"note": ""}
    monkeypatch.undo()
    assert "test" in latent_vectors(ev, None)["words"]["note"]  # a host that there is not
    with pytest.raises(InputError, match="vocabulary nothing is no file"):
        latent_vectors(ev, None, "nothing")
