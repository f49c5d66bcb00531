import math

import pytest
import torch

from mmsae.hosts.lvlm.host import recovered
from mmsae.lvlm.recovered import ce_recovered
from mmsae.sae import SAE, TopK
from tests.helpers.lvlm_jobs import QUESTIONS, make_host, make_sae, sample


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return make_host(tmp_path_factory.mktemp("recovered"))


def batches(host, image="one"):
    collate = host.collator("question+answer")
    return [collate([sample(i, QUESTIONS[i], image, {"answer": "yes"}) for i in part]) for part in ((0, 1), (2, 3))]


def perfect(host, site="layers.2:out"):
    """Every latent is a basis vector or its negative, and all of them are kept."""
    d = host.hidden_size
    sae = SAE(d, 2 * d, selector=TopK(2 * d)).eval()
    with torch.no_grad():
        for part in (sae.encoder.weight, sae.dictionary("text").weight):
            part.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    sae.sites = host.sites(site)
    return sae


@pytest.mark.parametrize("image", ["one", None])
def test_a_perfect_sae_recovers_everything(host, image):
    got = ce_recovered(host, perfect(host), batches(host, image), special=True)
    assert got.reconstructed == pytest.approx(got.original, abs=1e-5) and got.recovered == pytest.approx(1, abs=1e-4)
    assert got.tokens == sum(len(host.loss(b).ce) for b in batches(host, image))


def test_zeroed_states_say_nothing(host):
    """Zeros after the last block are zero logits: the cross-entropy of any token is that of a guess."""
    got = ce_recovered(host, perfect(host), batches(host))
    assert got.zeroed == pytest.approx(math.log(host.model.config.get_text_config().vocab_size), abs=1e-4)


def test_an_untrained_sae_changes_the_loss_and_leaves_special_tokens(host):
    """Whether it recovers less is chance on a host without training, which zeros can better."""
    sae = make_sae(host, site="layers.1:out")
    content, every = (ce_recovered(host, sae, batches(host), special=s) for s in (False, True))
    assert abs(content.recovered - 1) > 1e-3 and content.reconstructed != every.reconstructed
    assert content.original == every.original


def test_answers_alone(host):
    """The answer of every sample is one word."""
    got = ce_recovered(host, perfect(host), batches(host), targets="answer", special=True)
    assert got.tokens == 4 and got.recovered == pytest.approx(1, abs=1e-4)
    loss = host.loss(batches(host)[0])
    last = [loss.ce[loss.item == i][-1] for i in (0, 1)]
    alone = ce_recovered(host, perfect(host), batches(host)[:1], targets="answer")
    assert alone.original == pytest.approx(torch.stack(last).mean().item(), abs=1e-6)


def test_published_figures():
    assert recovered(2.610, 2.776, 10.375) == pytest.approx(0.97862, abs=1e-4)
    assert recovered(2.045, 2.867, 10.375) == pytest.approx(0.90136, abs=1e-4)
    assert recovered(2.610, 7.340, 10.375) == pytest.approx(0.39087, abs=1e-4)
    assert recovered(2.464, 6.798, 10.375) == pytest.approx(0.45213, abs=1e-4)
