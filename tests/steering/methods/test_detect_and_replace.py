"""Detect and replace on a toy host: the mask by hand, both donors, and what the rest of the picture keeps."""

import pytest
import torch

from mmsae.steering.edits.attach import attach
from mmsae.steering.measure.images import locality
from mmsae.steering.methods.detect_and_replace import from_prompts, replacement
from mmsae.types import InputError
from tests.helpers.steer_toys import SITE, ToyDiffusion, toy_sae

LEFT = torch.tensor([[1, 1, 0, 0]] * 4)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_donor_of_the_same_noise_gives_the_picture_without_the_concept(guidance):
    host, sae, options = ToyDiffusion(), toy_sae(), {"steps": 3, "guidance": guidance}
    prompts, seeds = ["red left", "green right"], [1, 2]
    before = host.generate(prompts, seed=seeds, **options)
    plain = host.generate(["left", "green right"], seed=seeds, **options)
    way = from_prompts(host, SITE, sae, [0], 0.5, lambda p: p.replace("red ", ""), dilate=0, **options)
    with way(prompts, seeds) as log:
        after = host.generate(prompts, seed=seeds, **options)
    torch.testing.assert_close(after, plain)
    assert torch.equal(after[1], before[1])
    change = locality(before[:1], after[:1], LEFT)
    assert change.inside > 0.1 and change.outside == 0
    # half of one of two pictures, in the conditional branch only
    assert log.share == pytest.approx(1 / 4 / (2 if guidance > 1 else 1)) and 0 < log.relative <= 1
    assert host.active_sites() == []


def test_the_mask_grows_by_cells_and_knows_its_threshold():
    host, sae = ToyDiffusion(), toy_sae()
    for tau, dilate, share in ((0.5, 0, 1 / 2), (0.5, 1, 3 / 4), (2.0, 1, 0)):
        with attach(host, {SITE: (sae, replacement([0], tau, dilate=dilate))}) as log:
            host.generate(["red left"], steps=2, seed=1)
        assert log.share == pytest.approx(share)


def test_the_rest_of_the_picture_as_donor():
    host, sae = ToyDiffusion(), toy_sae(k=8)  # the SAE explains all: nothing is added to the mean
    before = host.generate(["red left"], steps=1, seed=3)
    with attach(host, {SITE: (sae, replacement([0], 0.5, dilate=0))}):
        after = host.generate(["red left"], steps=1, seed=3)
    right = before[0, :, :, 2:].flatten(1).mean(1)
    torch.testing.assert_close(after[0, :, :, :2], right[:, None, None].expand(3, 4, 2))
    assert torch.equal(after[0, :, :, 2:], before[0, :, :, 2:])


def test_what_the_sae_does_not_explain_stays_with_the_position():
    host, sae = ToyDiffusion(), toy_sae(k=1)  # red is explained, its noise is not
    before = host.generate(["red left"], steps=1, seed=3)
    with attach(host, {SITE: (sae, replacement([0], 0.5, dilate=0))}):
        after = host.generate(["red left"], steps=1, seed=3)
    assert after[0, 1, :, :2].var() == pytest.approx(before[0, 1, :, :2].var().item(), rel=1e-4)
    assert after[0, 0, :, :2].mean() < 0.3 < before[0, 0, :, :2].mean()


def test_nothing_detected_changes_nothing_and_everything_detected_has_no_rest():
    host, sae = ToyDiffusion(), toy_sae()
    for text, dilate in (("green", 0), ("red", 5)):
        with attach(host, {SITE: (sae, replacement([0], 0.5, dilate=dilate))}):
            after = host.generate([text], seed=1)
        assert torch.equal(after, host.generate([text], seed=1))


def test_a_donor_of_other_steps_is_refused():
    host, sae = ToyDiffusion(), toy_sae()
    way = from_prompts(host, SITE, sae, [0], 0.5, lambda p: "left", steps=2)
    with way(["red left"], [1]), pytest.raises(InputError, match="no rows were recorded for step 2"):
        host.generate(["red left"], steps=3, seed=[1])
    assert host.active_sites() == []
