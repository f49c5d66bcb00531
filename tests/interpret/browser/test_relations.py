import numpy as np
import pytest

from mmsae.interpret.browser.relations import (
    agreement,
    bridges,
    coactive,
    label_lift,
    modality_index,
    nearest_rows,
    sample_rows,
    similar_samples,
)
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.evidence import write_evidence


@pytest.fixture
def evidence(tmp_path):
    rng = np.random.default_rng(0)
    z = {m: rng.random((40, 3, 12)) * (rng.random((40, 3, 12)) < 0.15) for m in ("image", "text")}
    z["image"][..., 11] = z["text"][..., 10] = 0
    write_evidence(tmp_path, z, labels=["cat" if i % 4 else "dog" for i in range(40)])
    return Evidence(tmp_path), {m: v.max(1) for m, v in z.items()}


def test_nearest_rows_by_brute_force():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(30, 5)), rng.normal(size=(17, 5))
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    place, value = nearest_rows(a, b, 3)
    assert (place == np.argsort(-cosine, 1)[:, :3]).all()
    assert np.allclose(value, -np.sort(-cosine, 1)[:, :3], atol=1e-6)
    own, _ = nearest_rows(a, a, 29, same=True)
    assert all(i not in row and len(set(row)) == 29 for i, row in enumerate(own))
    allowed = np.arange(17) < 2
    place, _ = nearest_rows(a, b, 3, allowed=allowed)
    assert (place[:, 2] == -1).all() and set(place[:, :2].ravel()) == {0, 1}


def test_coactive_is_jaccard(evidence):
    e, z = evidence
    on = z["image"] > 0
    latent, share = coactive(e.codes("image").matrix(), 11)
    for j in range(12):
        for k, v in zip(latent[j], share[j], strict=True):
            if k >= 0:
                both = (on[:, j] & on[:, k]).sum()
                assert k != j and both >= 3 and np.isclose(v, both / (on[:, j] | on[:, k]).sum())
    found = {(j, k) for j in range(12) for k in latent[j] if k >= 0}
    assert found == {(j, k) for j in range(12) for k in range(12) if j != k and (on[:, j] & on[:, k]).sum() >= 3}


def test_bridges_are_products_over_pairs_by_cosine(evidence):
    e, z = evidence
    atoms = np.random.default_rng(2).normal(size=(12, 6))
    unit = atoms / np.linalg.norm(atoms, axis=1, keepdims=True)
    naive = (z["image"].T @ z["text"]) * np.maximum(unit @ unit.T, 0)
    naive = naive / np.maximum(naive.sum(1, keepdims=True), 1e-30)
    latent, share = bridges(e.codes("image").matrix(), e.codes("text").matrix(), atoms, 12)
    out = np.zeros((12, 12))
    rows = np.broadcast_to(np.arange(12)[:, None], latent.shape)
    out[rows[latent >= 0], latent[latent >= 0]] = share[latent >= 0]
    assert np.allclose(out, naive, atol=1e-6)


def test_orthogonal_atoms_have_no_bridge_to_others(evidence):
    e, _ = evidence
    latent, _ = bridges(e.codes("image").matrix(), e.codes("text").matrix(), np.eye(12), 12)
    assert all(set(row) <= {-1, j} for j, row in enumerate(latent))


def test_similar_samples_by_weighted_cosine(evidence):
    e, z = evidence
    x = z["image"] * np.log(40 / np.maximum((z["image"] > 0).sum(0), 1))
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosine = x @ x.T
    np.fill_diagonal(cosine, 0)
    place, value = similar_samples(e.codes("image").matrix(), 5)
    assert np.allclose(value, np.maximum(-np.sort(-cosine, 1)[:, :5], 0), atol=1e-5)
    assert all(i not in row for i, row in enumerate(place))


def test_commonest_latents_are_left_out_where_products_pass_the_budget(evidence):
    e, z = evidence
    count = (z["image"] > 0).sum(0)
    rarest = np.argsort(count, kind="stable")[:3]
    _, value = similar_samples(e.codes("image").matrix(), 5, budget=float((count[rarest] ** 2).sum()))
    fires = (z["image"][:, rarest] > 0).any(1)
    assert (value[~fires] == 0).all() and value[fires].any()


def test_agreement_is_the_correlation_of_firing(evidence):
    e, z = evidence
    phi = agreement(e, block=5)
    for j in range(10):
        assert np.isclose(phi[j], np.corrcoef(z["image"][:, j] > 0, z["text"][:, j] > 0)[0, 1])
    assert np.isnan(phi[10]) and np.isnan(phi[11])


def test_modality_index_is_a_share(evidence):
    e, z = evidence
    share = modality_index(e)
    a, b = z["image"].mean(0), z["text"].mean(0)
    assert np.allclose(share, a / (a + b), atol=1e-6)
    assert share[10] == 1 and share[11] == 0


def test_lift_by_hand(evidence):
    e, z = evidence
    label = np.array([0 if i % 4 else 1 for i in range(40)])
    lift = label_lift(e.lists("image"), slice(2, 5), label, ["cat", "dog"])
    for row, j in enumerate((2, 3, 4)):
        on = z["image"][:, j] > 0
        for k in range(2):
            if (c := lift["label"][row, k]) >= 0:
                share = (on & (label == c)).sum() / on.sum()
                assert np.isclose(lift["share"][row, k], share) and share > (label == c).mean()
                assert np.isclose(lift["lift"][row, k], share / (label == c).mean())


def test_the_sample_stays_within_its_budget(evidence):
    e, _ = evidence
    codes = e.codes("image")
    size = np.diff(np.asarray(codes.start))
    assert len(sample_rows(codes, 0)) == 40
    some = sample_rows(codes, 0, budget=30)
    assert 0 < len(some) < 40 and (size[some] ** 2).sum() <= 30
    assert (some == sample_rows(codes, 0, budget=30)).all()
