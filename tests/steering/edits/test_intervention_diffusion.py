"""The same interventions in a diffusion pipeline: U-Net updates and text encoders, by branch, step and place."""

import pytest
import torch

from mmsae import SAE, InputError
from mmsae.hosts.diffusion.host import DiffusionHost
from mmsae.sae import TopK
from mmsae.steering import Edit, Intervention, active_sites, attach
from tests.helpers.diffusion import MAKE

pytestmark = pytest.mark.filterwarnings("ignore:.*dx")  # random SAEs push far
BLOCK, TEXT = "unet.up_blocks.0.attentions.1:update", "text_encoder.text_model.encoder.layers.1:out"
PROMPTS = ["a red circle", "large blue square on white background"]
CALL = {"steps": 3, "seed": [1, 2], "height": 16, "width": 16, "guidance": 3.0}


@pytest.fixture(scope="module")
def host():
    return DiffusionHost(MAKE["sd"](), "sd")


def text_site(host):
    names = dict(host.model.named_modules())
    return next(s for s in (TEXT, TEXT.replace("text_model.", "")) if s.partition(":")[0] in names)


def sae_at(host, spec):
    at = host.site(spec)
    torch.manual_seed(0)
    sae = SAE(at.width, 64, modalities=[at.modality], selector=TopK(6)).eval().requires_grad_(False)
    sae.sites = {at.modality: at}
    return sae


def push(**gate):
    return Intervention(Edit.add(3, 1.0), unit="rel_norm", **gate)


def generated(host, spec, iv, **more):
    with attach(host, {spec: (sae_at(host, spec), iv)}) as log:
        images = host.generate(PROMPTS, **{**CALL, **more})
    return images, log


def test_steps_branches_and_places_of_a_block(host):
    clean = host.generate(PROMPTS, **CALL)
    nothing, log = generated(host, BLOCK, Intervention(Edit.scale(3, 1.0), unit="raw"))
    assert torch.equal(nothing, clean) and log.share == 0 and log[0].calls == 3
    steered, log = generated(host, BLOCK, push())
    assert not torch.equal(steered, clean)
    assert [r["step"] for r in log.table()] == [0, 1, 2] and all(r["share"] == 0.5 for r in log.table())
    assert log.relative == pytest.approx(1.0, abs=1e-4)
    _, log = generated(host, BLOCK, push(steps=(1, 2), branch="all"))
    assert {r["step"]: r["share"] for r in log.table()} == {1: 1.0}
    _, log = generated(host, BLOCK, push(space=[[1.0, 0.0]], branch="sign"))
    assert log.share == pytest.approx(0.5)
    _, log = generated(host, BLOCK, push(), guidance=1.0)  # T11
    assert log.share == 1.0
    assert active_sites(host) == [] and torch.equal(host.generate(PROMPTS, **CALL), clean)  # T12


def test_edits_of_text_with_and_without_a_window(host):
    spec = text_site(host)
    clean = host.generate(PROMPTS, **CALL)
    whole, log = generated(host, spec, push(tokens="content"))
    assert not torch.equal(whole, clean) and 0 < log.share < 1
    eos, _ = generated(host, spec, push(tokens="eos"))
    always, _ = generated(host, spec, push(tokens="content", steps=(0, 3)))
    first, _ = generated(host, spec, push(tokens="content", steps=(0, 1)))
    assert torch.equal(always, whole) and not torch.equal(first, whole) and not torch.equal(first, clean)
    assert not torch.equal(eos, whole)


def test_refused(host):
    with pytest.raises(InputError, match=r"\(2, 9\).* 3 steps"):
        generated(host, BLOCK, push(steps=(2, 9)))
    with pytest.raises(InputError, match="a different signal"):
        with attach(host, {BLOCK.replace("update", "out"): (sae_at(host, BLOCK), push())}):
            raise AssertionError("attached")
    assert active_sites(host) == []
