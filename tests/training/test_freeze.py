"""Trained controls: what stays as it began does, the rest learns, a resumed run goes on exactly."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from mmsae import SAE, InputError
from mmsae.sae import ArchetypalDictionary, BatchTopK, GroupBias, ReLU, ScaledDictionary, TopK
from mmsae.training import ExportSAE, LitSAE, RunCheckpoint
from mmsae.training.freeze import Freeze
from tests.helpers.lit import Data


def module(freeze, selector=None, seed=0):
    torch.manual_seed(seed)
    sae = SAE(ratio=4, selector=selector or TopK(4))
    return LitSAE(sae, optimizer=lambda p: torch.optim.Adam(p, lr=0.05), scheduler=None, freeze=freeze)


def fit(root, lit, steps, ckpt=None):
    trainer = pl.Trainer(
        default_root_dir=root, max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[RunCheckpoint(10), ExportSAE(str(root / "sae"))],
    )  # fmt: skip
    trainer.fit(lit, datamodule=Data(), ckpt_path=ckpt)
    return lit.sae


def atoms(sae):
    return sae.dictionaries["shared"].weight.detach().clone()


def error(sae):
    x = Data().x
    with torch.no_grad():
        return sum(float((o.target - o.recon).square().mean()) for o in sae.eval()(x).values())


@pytest.mark.parametrize("freeze", ["", "decoder", "soft_decoder", "encoder"])
def test_what_is_kept_is_kept_and_the_rest_learns(tmp_path, freeze):
    first = module(freeze)
    first.sae.build(10)
    begun, encoder, before = atoms(first.sae), first.sae.encoder.weight.detach().clone(), error(first.sae)
    lit = module(freeze)  # built by the training, from the same seed
    sae = fit(tmp_path, lit, 25)
    cosine, norms = cosine_similarity(atoms(sae), begun), atoms(sae).norm(dim=1)
    assert torch.equal(atoms(sae), begun) == (freeze == "decoder")
    assert torch.equal(sae.encoder.weight.detach(), encoder) == (freeze == "encoder")
    assert (cosine.min() >= 0.8 - 1e-5) == (freeze in ("decoder", "soft_decoder"))
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert sae.dictionaries["shared"].bias.any() and sae.encoder.bias.any()
    assert error(sae) < 0.9 * before
    saved = SAE.from_pretrained(tmp_path / "sae")
    assert torch.equal(atoms(saved), atoms(sae))


@pytest.mark.parametrize("freeze", ["soft_decoder", "encoder"])
def test_a_resumed_control_is_the_uninterrupted_one(tmp_path, freeze):
    whole = fit(tmp_path / "whole", module(freeze), 25)
    fit(tmp_path / "two", module(freeze), 12)
    again = fit(tmp_path / "two", module(freeze, seed=5), 25, "last")  # another start, which the checkpoint's replaces
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_another_control_is_not_resumed(tmp_path):
    fit(tmp_path, module("decoder"), 10)
    with pytest.raises(InputError, match="freeze is decoder in the checkpoint, encoder in this run"):
        fit(tmp_path, module("encoder"), 20, "last")


def test_an_atom_is_turned_to_the_bound_in_its_plane_and_keeps_its_norm():
    torch.manual_seed(0)
    sae, kept = SAE(6, 12, modalities=["image"], selector=TopK(2)), Freeze("soft_decoder")
    kept.build(sae)
    start, weight = atoms(sae), sae.dictionaries["shared"].weight
    with torch.no_grad():
        weight.copy_(2 * normalize(start + torch.linspace(0, 2, 12)[:, None] * torch.randn(12, 6)))
        weight[11] = -start[11]  # has no plane with its start
        moved = weight.clone()
    kept.after_step_(sae)
    was, now = cosine_similarity(moved, start), cosine_similarity(weight.detach(), start)
    assert torch.equal(weight.detach()[was >= 0.8], moved[was >= 0.8]) and (was < 0.8).sum() > 3
    torch.testing.assert_close(now[:11][was[:11] < 0.8], torch.full((int((was[:11] < 0.8).sum()),), 0.8))
    assert now[11] == pytest.approx(1)
    torch.testing.assert_close(weight.detach().norm(dim=1), moved.norm(dim=1))
    i = int((was < 0.8).nonzero()[0, 0])
    plane = torch.stack([start[i], moved[i], weight.detach()[i]])
    assert torch.linalg.svdvals(plane)[2] < 1e-5


def test_it_goes_with_any_selector_and_says_where_there_is_nothing_to_keep(tmp_path):
    sae = fit(tmp_path, module("decoder", BatchTopK(4)), 10)
    assert sae.encode(Data().x["image"], "image").l0().float().mean() > 1
    gba = {"encoder": GroupBias(2), "dictionaries": {"shared": ScaledDictionary()}}
    with pytest.raises(InputError, match="freeze 'encoder' has nothing to keep: 'gba' has no weights"):
        LitSAE(SAE(4, 8, selector=ReLU(), **gba), freeze="encoder")
    with pytest.raises(
        InputError, match="'soft_decoder' needs atoms that are weights; dictionary 'archetypal' has none"
    ):
        LitSAE(SAE(4, 8, selector=TopK(2), dictionaries={"shared": ArchetypalDictionary()}), freeze="soft_decoder")
    with pytest.raises(InputError, match="freeze must be one of decoder, soft_decoder, encoder or empty, not 'atoms'"):
        Freeze("atoms")


def test_the_folder_says_that_it_is_a_control(tmp_path):
    fit(tmp_path, module("decoder"), 5)
    fit(tmp_path / "free", module(""), 5)
    said = [
        json.loads((p / "sae" / "cfg.json").read_text())["mmsae"]["training"] for p in (tmp_path, tmp_path / "free")
    ]
    assert said[0]["freeze"] == "decoder" and "freeze" not in said[1]
