import numpy as np
import pytest

from mmsae.interpret.browser.compare import match
from mmsae.interpret.evidence.folder import Evidence
from tests.helpers.evidence import write_evidence


@pytest.fixture
def two(tmp_path):
    """The second SAE has the first's latents in another order, and two of its own."""
    rng = np.random.default_rng(0)
    z = {m: rng.random((60, 1, 8)) * (rng.random((60, 1, 8)) < 0.3) for m in ("image", "text")}
    order = rng.permutation(8)
    own = {m: rng.random((60, 1, 2)) * (rng.random((60, 1, 2)) < 0.3) for m in z}
    other = {m: np.concatenate([v[..., order], own[m]], 2) for m, v in z.items()}
    write_evidence(tmp_path / "a", z)
    write_evidence(tmp_path / "b", other)
    atoms = rng.normal(size=(8, 5))
    return z, other, order, Evidence(tmp_path / "a"), Evidence(tmp_path / "b"), atoms, rng.normal(size=(2, 5))


def test_a_permuted_sae_is_found_by_activations_and_by_atoms(two):
    _, _, order, a, b, atoms, own = two
    found = match(a, b, (atoms, np.concatenate([atoms[order], own])))
    where = np.argsort(order)
    for place, value in (found.cosine, found.correlation):
        assert (place == where).all() and np.allclose(value, 1, atol=1e-5)
    assert (found.cosine_back[0][:8] == order).all() and (found.correlation_back[0][:8] == order).all()
    assert found.items == 60


def test_correlations_are_pearson_over_items_and_modalities(two):
    z, other, _, a, b, _, _ = two
    x, y = (np.concatenate([v["image"][:, 0], v["text"][:, 0]]) for v in (z, other))
    r = np.corrcoef(x.T, y.T)[:8, 8:]
    place, value = match(a, b, (None, None)).correlation_back
    assert (place == r.argmax(0)).all() and np.allclose(value, r.max(0), atol=1e-5)


def test_without_items_in_common(tmp_path, two):
    *_, a, _, atoms, _ = two
    write_evidence(tmp_path / "few", {"image": np.ones((10, 1, 4))})
    found = match(a, Evidence(tmp_path / "few"), (atoms, None))
    assert found.cosine is None and found.correlation is None and found.items == 10
