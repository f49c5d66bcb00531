"""One colour for another: which latents, by hand-computed numbers, and that only they move, where they should."""

import numpy as np
import pytest
import torch

from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.sae import SAE, AffineEncoder, Dictionary, Normaliser, TopK
from mmsae.types import InputError
from mmsae.world.generator.render import GROUND, PALETTE
from mmsae.world.generator.shards import write_world
from mmsae.world.measure.probe import WorldProbe
from mmsae.world.models.command import pretrain_diffusion
from mmsae.world.models.diffusion.evaluate import (
    SITE,
    Contrast,
    colour_contrast,
    draw_prompts,
    draw_with,
    outcome,
    substitution,
    tune,
)


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    root = tmp_path_factory.mktemp("edit")
    write_world(root / "s", 64, seed=5, progress=False)
    small = dict(steps=2, batch_size=8, channels=(16, 32), text_width=32, text_layers=1, progress=False)
    call(pretrain_diffusion, shards=str(root / "s"), out=str(root / "d"), **small)
    torch.manual_seed(0)
    parts = dict(normaliser=Normaliser(), encoder=AffineEncoder(), selector=TopK(4))
    sae = SAE(modalities=["text"], d_sae=48, dictionaries={"shared": Dictionary()}, **parts).build(32)
    return load_host(f"diffusers:{root / 'd'}"), sae.eval()


def test_the_latents_of_largest_difference_are_exchanged():
    contrast = Contrast(torch.tensor([5.0, 1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 4.0, 1.0, 3.0]))
    iv = substitution(contrast, 2, strength=2.0)
    assert iv.edit.ids == (0, 2, 3, 4), "0 and 3 lose most, 2 and 4 gain most"
    z = torch.tensor([[5.0, 0.0, 2.0, 1.0]])
    assert iv.raw().apply(z).tolist() == [[-10.0, 8.0, -4.0, 7.0]]
    assert iv.active == (0.0, torch.inf, 0.0, torch.inf), "where a source latent fires, whatever the target's do"
    assert substitution(contrast, 9).edit.ids == (0, 2, 3, 4), "latents without a difference stay"


def test_contrast_reads_the_tokens_that_know_the_colour(steered):
    host, sae = steered
    prompts = draw_prompts(6, 0, "red")
    contrast = colour_contrast(host, sae, prompts, "blue")
    rows = [next(host.stream(p.texts, SITE, batch_size=6)).x["text"] for p in (prompts, prompts.recoloured("blue"))]
    n = len(rows[0]) // 6
    for mean, x in zip(contrast, rows, strict=True):
        late = x.view(6, n, -1)[:, 2:].flatten(0, 1)  # "a large" come before the colour and are the same in both
        assert torch.allclose(mean, sae.encode(late, "text").to_dense().mean(0), atol=1e-5)


def test_an_edit_changes_pictures_and_none_changes_nothing(steered):
    host, sae = steered
    prompts = draw_prompts(4, 0, "red")
    plain, zero = draw_with(host, sae, None, prompts.texts, steps=2)
    again, size = draw_with(
        host, sae, substitution(Contrast(torch.zeros(48), torch.zeros(48)), 2), prompts.texts, steps=2
    )
    assert zero == size == 0 and torch.equal(plain, again)
    edit = substitution(colour_contrast(host, sae, prompts, "blue"), 4, 2.0)
    changed, size = draw_with(host, sae, edit, prompts.texts, steps=2)
    assert size > 0 and not torch.equal(plain, changed)


def test_tuning_tries_everything_and_prefers_the_gentle(steered):
    host, sae = steered
    prompts = draw_prompts(2, 0, "red")
    contrast = colour_contrast(host, sae, prompts, "blue")
    args = (host, sae, contrast, prompts, 2, WorldProbe().eval())
    k, strength, tried = tune(*args, ks=(1, 2), strengths=(1.0, 2.0), steps=1)
    assert len(tried) == 4 and {"source", "target", "background", "size", "k", "strength"} == set(tried[0])
    best = max(t["target"] + t["background"] + t["size"] for t in tried)
    same = [(t["strength"], t["k"]) for t in tried if t["target"] + t["background"] + t["size"] == best]
    assert (strength, k) == min(same)


def test_outcome_counts_pictures():
    prompts = draw_prompts(3, 0, "red")
    x = torch.from_numpy(np.broadcast_to(GROUND[prompts.wanted["background"]][:, :, None, None], (3, 3, 32, 32)).copy())
    x[0, :, 8:24, 8:24] = torch.from_numpy(PALETTE[0])[:, None, None]
    x[1, :, 8:24, 8:24] = torch.from_numpy(PALETTE[2])[:, None, None]
    found = outcome(x / 255, prompts, 2, WorldProbe().eval())
    assert found[:3] == (pytest.approx(1 / 3), pytest.approx(1 / 3), 1.0)


def test_prompts_of_other_lengths_are_refused(steered, monkeypatch):
    host, sae = steered
    prompts = draw_prompts(2, 0, "red")
    monkeypatch.setattr(type(prompts), "recoloured", lambda self, colour: self._replace(texts=["a circle"] * 2))
    with pytest.raises(InputError, match="tokens"):
        colour_contrast(host, sae, prompts, "blue")
