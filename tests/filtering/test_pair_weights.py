"""What a filter fits on pairs: reasons, labels, the calibrator, and the file that holds them."""

import pytest
import torch
from torch.nn.functional import normalize

from mmsae.filtering.calibrate import Calibrator, fit_calibrator, near_misses
from mmsae.filtering.pair_weights import FitSample, PairWeights, fit_weights, shared_words
from mmsae.filtering.scorers.base import only
from mmsae.metrics.concepts.names import LatentName
from mmsae.metrics.statistics import auroc
from mmsae.types import Codes, InputError

F, K, N = 20, 4, 400
WORDS = [f"w{j}" for j in range(F)]


def world(n=N, seed=0):
    """Pairs that share four latents; a fifth one fires on all texts and on no image."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(F - 1, generator=g)[:K] for _ in range(n)])
    image = Codes(torch.rand(n, K, generator=g) + 0.5, ids, F)
    always = torch.full((n, 1), F - 1)
    text = Codes(
        torch.cat([torch.rand(n, K, generator=g) + 0.5, torch.rand(n, 1, generator=g) + 5], 1),
        torch.cat([ids, always], 1), F,
    )  # fmt: skip
    x = {m: c.to_dense()[:, : F - 1] + 0.3 * torch.randn(n, F - 1, generator=g) for m, c in
         (("image", image), ("text", text))}  # fmt: skip
    captions = [" ".join(WORDS[j] for j in sorted(row)) for row in ids.tolist()]
    return FitSample({"image": image, "text": text}, x, [f"{i:032x}" for i in range(n)], captions)


ABOUT = {"sae": "s", "host": "h", "sites": {"image": "i", "text": "t"}}


@pytest.fixture(scope="module")
def fitted():
    return fit_weights(world(), ABOUT, calibrate=True, seed=0)


def test_reasons_are_concepts_of_one_side_strongest_first(fitted):
    w = fitted.scorer.weights
    assert w[F - 1] == 0 and w[: F - 1].min() > 0.5  # what only texts have says nothing about a pair
    s = world(50, 1)
    image, text = s.codes["image"], s.codes["text"].rows(torch.arange(50).roll(1))
    sparse, dense = only(text, image, w), only(
        text._replace(values=text.to_dense(), indices=None), image._replace(values=image.to_dense(), indices=None), w
    )  # fmt: skip
    torch.testing.assert_close(sparse.strengths, dense.strengths)
    turned = only(text._replace(values=-text.values), image, w)  # of signed codes, sizes count
    assert torch.equal(turned.strengths, sparse.strengths) and torch.equal(turned.latents, sparse.latents)
    on = sparse.strengths > 0
    assert torch.equal(sparse.latents[on], dense.latents[on])
    has, lacks = text.to_dense(), image.to_dense()
    for i in range(50):
        named = sparse.latents[i][on[i]].tolist()
        assert set(named) == {j for j in range(F - 1) if has[i, j] > 0 and lacks[i, j] == 0}
        assert sparse.strengths[i].tolist() == sorted(sparse.strengths[i].tolist(), reverse=True)
    assert not only(s.codes["text"], s.codes["image"], w).strengths.any()  # a true pair lacks nothing here
    row = sparse.strengths[0, 0]
    assert row == pytest.approx((has[0] * w * (lacks[0] == 0)).max().item() / has[0].norm().item(), rel=1e-5)


def test_concepts_are_called_by_what_their_captions_share(fitted):
    assert all(fitted.concepts[j].label.split()[0] == WORDS[j] for j in range(F - 1))
    assert fitted.label(3) == f"#3 {fitted.concepts[3].label}" and fitted.label(999) == "#999"
    named = fit_weights(
        world(), ABOUT, calibrate=False, seed=0, names={3: LatentName("cat", "wpmi", auroc=0.9), 4: LatentName(None)}
    )
    assert named.label(3) == "#3 cat" and named.calibrator is None and named.concepts[3].by == "wpmi, AUROC 0.90"
    assert named.label(4) == fitted.label(4) and named.concepts[4].by == ""
    common = {"a": 100, "red": 10, "circle": 30}
    assert shared_words(["a red circle", "a red circle on it"], common | {"on": 50, "it": 50}, 100) == "red circle"
    assert shared_words(["the cat", "the cat"], {"the": 10, "cat": 10}, 100) == "cat"  # says what, not how
    assert shared_words(["a thing"], {"a": 100, "thing": 100}, 100) == "a thing"


def test_near_misses_are_wrong_and_as_long():
    captions = ["a b", "b a", "a b c", "c b a", "a c b", "long long long long caption"]
    x = normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    for rows in near_misses(x, captions, 0):
        for i, j in enumerate(rows.tolist()):
            assert captions[i] != captions[j]
            assert i == 5 or len(captions[i].split()) == len(captions[j].split())
    nearest = near_misses(x, captions, 0)[0]
    cosine = x @ x.T
    assert nearest[2] == (3 if cosine[2, 3] > cosine[2, 4] else 4)
    with pytest.raises(InputError, match="all equal"):
        near_misses(x, ["a"] * 6, 0)


def test_the_calibrator_is_its_formula_and_separates(fitted):
    s = world(100, 2)
    text = s.codes["text"].rows(torch.arange(100).roll(1))
    cosines = fitted.scorer.embeddings(s.x["image"], s.x["text"].roll(1, 0))
    a, b = (normalize(c.to_dense(), dim=1) for c in (s.codes["image"], text))
    c = fitted.calibrator
    want = (a * b) @ c.product + (a - b).abs() @ c.difference + c.bias
    want += torch.stack([cosines["clip"], cosines["clip_centred"]], 1) @ c.cosines
    wrong = c(s.codes["image"], text, cosines)
    torch.testing.assert_close(wrong, want, rtol=1e-4, atol=1e-4)
    dense = [z._replace(values=z.to_dense(), indices=None) for z in (s.codes["image"], text)]
    torch.testing.assert_close(c(*dense, cosines), want, rtol=1e-4, atol=1e-4)
    right = c(s.codes["image"], s.codes["text"], fitted.scorer.embeddings(s.x["image"], s.x["text"]))
    assert auroc(right, wrong) > 0.99


def test_fit_is_better_than_its_start():
    s = world(200)
    scorer = PairWeights(fit_weights(s, {}, calibrate=False, seed=0).scorer, {}, {}).scorer
    weights = fit_calibrator(
        s.codes["image"], s.codes["text"], scorer.embeddings, s.x["image"], s.x["text"], s.captions, 0
    )
    assert isinstance(weights, Calibrator) and weights.product.abs().max() > 0.1


def test_the_file_round_trips_and_knows_whose_it_is(fitted, tmp_path):
    again = PairWeights.load(fitted.save(tmp_path / "w.safetensors"))
    for a, b in zip([*fitted.scorer, *fitted.calibrator], [*again.scorer, *again.calibrator], strict=True):
        assert torch.equal(a, b)
    assert again.concepts == fitted.concepts and again.about == fitted.about and again.about["pairs"] == N
    again.check("w", ABOUT)
    for field in ABOUT:
        with pytest.raises(InputError, match=f"was fitted for {field}"):
            again.check("w", {**ABOUT, field: "x"})
    text = (tmp_path / "w.json").read_text()
    (tmp_path / "w.json").write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match="format 99; this version reads up to 1"):
        PairWeights.load(tmp_path / "w.safetensors")


def test_a_sample_in_parts_is_the_sample(tmp_path):
    s, paths = world(30), []
    for lo in (0, 10, 20):
        rows = slice(lo, lo + 10)
        part = FitSample(
            {m: c.rows(rows) for m, c in s.codes.items()},
            {m: x[rows] for m, x in s.x.items()}, s.uids[rows], s.captions[rows],
        )  # fmt: skip
        paths.append(tmp_path / f"{lo}")
        paths[-1].write_bytes(part.to_bytes({"seen": 10}))
    again, faults = FitSample.read(paths)
    assert faults == [{"seen": 10}] * 3 and again.uids == s.uids and again.captions == s.captions
    assert torch.equal(again.codes["text"].to_dense(), s.codes["text"].to_dense())
    assert torch.equal(again.x["image"], s.x["image"])
