"""Items by which names are judged: of the test half, of all strengths, with their values."""

import numpy as np
import pytest

from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.names.unseen import _first_silent, unseen
from tests.helpers.interpret import planted


def test_they_are_of_the_test_half_with_their_values(tmp_path):
    ev = Evidence(planted(tmp_path / "e", n=400))
    z, latents = ev.codes("image").matrix().toarray(), np.array([3, 0, 40])  # 40 never fires
    test = (ev.items.half == "test") & (ev.items.copy_of < 0)
    found = unseen(ev, "image", latents)
    for row, j in enumerate(latents):
        on, off = found.positive[row], found.negative[row]
        on, weight = on[on >= 0], found.weight[row, : (on >= 0).sum()]
        assert set(on) == set(np.flatnonzero(test & (z[:, j] != 0)))
        assert set(off[off >= 0]) == set(np.flatnonzero(test & (z[:, j] == 0)))
        assert np.allclose(weight, z[on, j]) and (np.diff(weight) <= 0).all()
    assert (found.positive[2] == -1).all() and (found.weight[2] == 0).all()


def test_of_many_some_are_taken_from_all_strengths(tmp_path):
    ev = Evidence(planted(tmp_path / "e", n=800))
    every, some = (unseen(ev, "image", np.arange(8), most=m) for m in (10_000, 20))
    assert some.positive.shape == some.negative.shape == (8, 20) and (some.positive >= 0).all()
    for j in range(8):
        own = every.weight[j][every.positive[j] >= 0]
        assert some.weight[j, 0] == own[0] and abs(some.weight[j].mean() - own.mean()) < 0.1
        assert set(some.negative[j]) <= set(every.negative[j])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97, 1.0])
def test_the_first_silent_items_are_those_of_a_look_at_all(share):
    """Also where a latent fires on nearly all items, or on all, so that the first few will not do."""
    rng = np.random.default_rng(0)
    pool, fires = rng.permutation(5000)[:3000], rng.random(5000) < share
    for most in (1, 7, 500, 4000):
        assert (_first_silent(pool, fires, most) == pool[~fires[pool]][:most]).all()
        assert len(_first_silent(pool, fires, most)) == min(most, (~fires[pool]).sum())
