from itertools import permutations
from math import comb

import pytest
import torch

from mmsae.metrics.pairs.modality import CLASSES, CoActivation, modality_class, modality_index, overlap_p_value
from mmsae.types import Codes, Tokens


def test_modality_index_and_classes():
    mu = modality_index(torch.tensor([0.2, 0.0, 0.4, 0.3, 0.0]), torch.tensor([0.2, 0.1, 0.0, 0.1, 0.0]))
    assert mu[:4].tolist() == pytest.approx([0, -1, 1, 0.5]) and mu[4].isnan()
    assert [CLASSES[i] for i in modality_class(mu)] == ["shared", "text", "image", "shared", "dead"]


@pytest.mark.parametrize("n", [1, 4, 6])
def test_p_value_is_that_of_all_shuffles(n):
    for a in range(n + 1):
        for b in range(n + 1):
            for k in range(max(0, a + b - n), min(a, b) + 1):
                got = overlap_p_value(*(torch.tensor([v]) for v in (k, a, b)), n).item()
                shuffles = list(permutations(range(n)))
                hits = sum(sum(i < a and s[i] < b for i in range(n)) >= k for s in shuffles)
                assert got == pytest.approx(hits / len(shuffles), abs=1e-12), (k, a, b)


def test_p_value_of_many_items():
    n, a, b, k = 1000, 200, 150, 60
    want = sum(comb(a, j) * comb(n - a, b - j) for j in range(k, b + 1)) / comb(n, b)
    got = overlap_p_value(*(torch.tensor([v]) for v in (k, a, b)), n).item()
    assert got == pytest.approx(want, rel=1e-9)


def sparse(fires, item, d):
    """Codes of tokens with one latent each."""
    return Codes(torch.ones(len(fires), 1), fires[:, None], d)


def test_lift_of_planted_latents():
    """Latent 0 fires on both sides of the same pairs, 1 independently, 2 never together, 3 on images only."""
    g = torch.Generator().manual_seed(0)
    n, fires = 4000, {}
    for m in ("image", "text"):
        fires[m] = torch.rand(n, 4, generator=g) < 0.1
    fires["text"][:, 0] = fires["image"][:, 0]
    fires["text"][:, 2] &= ~fires["image"][:, 2]
    fires["text"][:, 3] = False
    metric = CoActivation(5, delta=0.5)
    for i in torch.arange(n).split(333):
        codes = {m: Codes(torch.nn.functional.pad(f[i].float(), (0, 1)), None, 5) for m, f in fires.items()}
        item = {m: torch.arange(len(i)) for m in fires}
        metric.update(codes, Tokens({}, item, [f"{j:032x}" for j in i]))
    got = metric.compute()
    assert got.lift[0].item() == pytest.approx(n / got.image[0].item())
    assert got.lift[1].item() == pytest.approx(1, abs=0.3) and got.lift[2] == 0
    assert got.lift[3:].isnan().all() and (got.p[2:] == 1).all()
    assert got.p[0] < 1e-100 and 1e-3 < got.p[1]
    assert got.summary(torch.tensor([True, True, False, False, False])) == {"shared": 0.4, "shared_lifted": 0.2}


def test_tokens_of_an_item_count_once_and_unpaired_items_not_at_all():
    image = sparse(torch.tensor([0, 0, 1, 0]), None, 3)
    text = sparse(torch.tensor([0, 2, 2]), None, 3)
    item = {"image": torch.tensor([0, 0, 1, 2]), "text": torch.tensor([0, 1, 1])}  # item 2 has no text
    special = {"image": torch.zeros(4, dtype=torch.bool), "text": torch.tensor([False, False, True])}
    tokens = Tokens({}, item, ["0" * 32, "1" * 32, "2" * 32], None, special)
    metric = CoActivation(3)
    metric.update({"image": image, "text": text}, tokens)
    got = metric.compute()
    assert got.items == 2
    assert [t.tolist() for t in (got.image, got.text, got.both)] == [[1, 1, 0], [1, 0, 1], [1, 0, 0]]
    again = CoActivation(3)
    again.merge(metric.part())
    again.merge(metric.part())
    assert again.compute().both.tolist() == [2, 0, 0]
