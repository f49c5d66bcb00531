"""SAEs of words: multimodal_saes, section 8."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from mmsae import SAE, InputError
from mmsae.hosts import load_host
from mmsae.sae import PursuitEncoder, splice, word_atoms
from tests.helpers.encoders import MODELS, WORDS, save_local


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return load_host(save_local(tmp_path_factory.mktemp("host") / "vit", MODELS["vit"]))


@pytest.fixture(scope="module")
def rows(host):
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [f"a {a} {b}" for a in ("red", "green", "blue", "small", "large") for b in ("circle", "square")]
    return {"image": host.encode_image(images), "text": host.encode_text(host.tokenize(texts))}


def test_atoms_are_centred_text_embeddings_and_rows_are_centred_by_their_own_mean(host, rows):
    sae = splice(host, WORDS, rows)
    text = normalize(host.encode_text(host.tokenize(WORDS)), dim=1)
    torch.testing.assert_close(sae.dictionary("image").rows(), normalize(text - text.mean(0), dim=1))
    assert sae.dictionary("text").names == WORDS and sae.d_sae == len(WORDS)
    assert sae.sites["text"].module == "text.embed" and not sae.fresh
    for m, x in rows.items():
        unit = normalize(x, dim=1)
        target = sae.normaliser(x, m)[0]
        torch.testing.assert_close(target, normalize(unit - unit.mean(0), dim=1), atol=1e-5, rtol=1e-4)
        recon = sae.decode(sae.encode(x, m), m)  # recomposed: the mean comes back, and the norm of the row
        assert (cosine_similarity(recon, x) > cosine_similarity(unit.mean(0)[None], x)).float().mean() > 0.9


def test_a_word_is_coded_by_itself_where_its_mean_is_that_of_the_words(host):
    words = host.encode_text(host.tokenize(WORDS))
    for encoder in (None, PursuitEncoder("omp", 1)):
        sae = splice(host, WORDS, {"text": words}, encoder)
        codes = sae.encode(words, "text").to_dense()
        assert torch.equal(codes.argmax(1), torch.arange(len(WORDS)))


def test_it_is_an_sae_like_any_other(host, rows, tmp_path):
    sae = splice(host, WORDS, rows["image"])
    again = SAE.from_pretrained(sae.save_pretrained(tmp_path / "sae"))
    assert torch.equal(again.encode(rows["image"]).to_dense(), sae.encode(rows["image"]).to_dense())
    assert again.attach(host) == sae.attach(host)


def test_words_must_be_names(host, rows):
    for words in (["red", "red"], ["red"], ["red", ""]):
        with pytest.raises(InputError, match="distinct and at least two"):
            splice(host, words, rows)

    class Images:
        modalities, hint = ("image",), "eyes"

    with pytest.raises(InputError, match="host with text, which eyes has not"):
        word_atoms(Images(), WORDS)
