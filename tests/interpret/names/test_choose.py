"""When a name holds: by a fixed AUROC, or by what latents of random weights reach."""

import numpy as np
import pytest

from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.choose import least_auroc, names_of
from mmsae.interpret.names.options import Holding
from mmsae.types import InputError


def chosen(auroc, z=5.0):
    """Candidates of one latent each."""
    n = len(auroc)
    texts = {"modality": "image", "method": "captions", "phrase": "red", "judge": "words"}
    columns = {k: np.zeros(n) for k in Candidates._fields} | {k: np.full(n, v, object) for k, v in texts.items()}
    columns |= {"latent": np.arange(n), "chosen": np.ones(n, bool), "auroc": np.array(auroc, float)}
    return Candidates(**columns | {"z": np.broadcast_to(np.float64(z), n)})


def named(auroc, least=None, items=20, **holding):
    return names_of(chosen([auroc]), {"image": np.array([items])}, Holding(**holding), {}, least)[0]


def test_a_name_holds_from_an_auroc_on():
    assert named(0.82).name == "red" and "AUROC 0.700 is below 0.81" in named(0.7).note and named(0.7).name is None
    assert named(0.7, {"image": 0.65}).name == "red" and named(0.7, {"text": 0.65}).name is None
    said = named(0.7, {"image": 0.75}, false_names=0.1).note
    assert "AUROC 0.700 is below 0.750, which 10% of latents of random weights reach" in said
    assert "fires on 3 unseen items" in named(0.9, items=3).note


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_the_stated_share_of_a_control_reaches_it_and_of_the_next_as_well(rate):
    """The share of names among latents of the same kind that the threshold has not seen is at most that stated."""
    rng, items, shares = np.random.default_rng(0), np.full(100, 20), []
    for _ in range(1000):
        null, fresh = rng.beta(6, 4, (2, 100))
        least = least_auroc(chosen(null), "image", 100, items, Holding(min_z=0), rate)
        assert (null >= least).sum() == int(rate * 101 + 1e-9) - 1
        shares.append((fresh >= least).mean())
    assert rate - 0.02 < np.mean(shares) < rate + 0.006  # the standard error is .0016


def test_latents_of_a_control_without_a_name_count():
    items, h = np.full(20, 20), Holding()
    aurocs = np.linspace(0.6, 0.9, 20)
    assert least_auroc(chosen(aurocs), "image", 20, items, h, 0.15) == pytest.approx(aurocs[-3])
    assert least_auroc(chosen(aurocs), "image", 40, items, h, 0.15) == pytest.approx(aurocs[-6])
    assert least_auroc(chosen(aurocs, z=1.0), "image", 20, items, h, 0.15) == 0.5  # none holds for its z
    with pytest.raises(InputError, match=r"a share of 0\.01 of false names takes a control of 99 latents or more"):
        least_auroc(chosen(aurocs), "image", 20, items, h, 0.01)
