"""Detect and replace on a toy host: the mask by hand, both donors, and what the rest of the picture keeps."""

import pytest
import torch
from steer_toys import SITE, ToyDiffusion, toy_sae

from mmsae.steering.measure import locality
from mmsae.steering.replace import Detector, recording, replacing
from mmsae.types import InputError

RED = Detector(torch.tensor([0]), torch.tensor([0.5]), dilate=0)
LEFT = torch.tensor([[1, 1, 0, 0]] * 4)


def test_masks_are_thresholded_per_latent_and_grow_by_cells():
    z = torch.tensor([[1.0, 0.0], [0.4, 2.9], [0.0, 3.1], [0.0, 0.0]])
    item, position = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 7, 8])
    d = Detector(torch.tensor([4, 5]), torch.tensor([0.5, 3.0]), dilate=0)
    mask = d.mask(z, item, position, (3, 4), 2)
    assert mask.nonzero().tolist() == [[0, 0], [1, 7]]
    grown = d._replace(dilate=1).mask(z, item, position, (3, 4), 2)
    assert grown[0].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert grown[1].nonzero().flatten().tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_donor_of_the_same_noise_gives_the_picture_without_the_concept(guidance):
    host, sae, options = ToyDiffusion(), toy_sae(), {"steps": 3, "seed": [1, 2], "guidance": guidance}
    before = host.generate(["red left", "green right"], **options)
    with recording(host, SITE) as donor:
        plain = host.generate(["left", "green right"], **options)
    with replacing(host, SITE, sae, RED, donor) as log:
        after = host.generate(["red left", "green right"], **options)
    assert torch.equal(after, plain) and torch.equal(after[1], before[1])
    change = locality(before[:1], after[:1], LEFT)
    assert change.inside > 0.1 and change.outside == 0
    assert [t.step for t in log] == [0, 1, 2] and log[0].share == pytest.approx(1 / 4) and 0 < log[0].relative <= 1
    assert host.active_sites() == []


def test_the_rest_of_the_picture_as_donor():
    host, sae = ToyDiffusion(), toy_sae(k=8)  # the SAE explains all: nothing is added to the mean
    before = host.generate(["red left"], steps=1, seed=3)
    with replacing(host, SITE, sae, RED):
        after = host.generate(["red left"], steps=1, seed=3)
    right = before[0, :, :, 2:].flatten(1).mean(1)
    torch.testing.assert_close(after[0, :, :, :2], right[:, None, None].expand(3, 4, 2))
    assert torch.equal(after[0, :, :, 2:], before[0, :, :, 2:])


def test_what_the_sae_does_not_explain_stays_with_the_position():
    host, sae = ToyDiffusion(), toy_sae(k=1)  # red is explained, its noise is not
    before = host.generate(["red left"], steps=1, seed=3)
    with replacing(host, SITE, sae, RED):
        after = host.generate(["red left"], steps=1, seed=3)
    assert after[0, 1, :, :2].var() == pytest.approx(before[0, 1, :, :2].var().item(), rel=1e-4)
    assert after[0, 0, :, :2].mean() < 0.3 < before[0, 0, :, :2].mean()


def test_nothing_detected_changes_nothing_and_everything_detected_has_no_rest():
    host, sae = ToyDiffusion(), toy_sae()
    for text, detector in (("green", RED), ("red", RED._replace(dilate=5))):
        with replacing(host, SITE, sae, detector) as log:
            after = host.generate([text], seed=1)
        assert torch.equal(after, host.generate([text], seed=1))
        assert {t.share for t in log} == {float(text == "red")}


def test_bad_donors_are_refused():
    host, sae = ToyDiffusion(), toy_sae()
    with recording(host, SITE) as donor:
        host.generate(["left"], steps=2, seed=1)
    with replacing(host, SITE, sae, RED, donor), pytest.raises(InputError, match="no step 2 .* it had 2 steps"):
        host.generate(["red left"], steps=3, seed=1)
    with replacing(host, SITE, sae, RED, donor), pytest.raises(InputError, match="donor has 1 maps of 16 positions"):
        host.generate(["red left", "red right"], steps=2, seed=1)
    assert host.active_sites() == []
