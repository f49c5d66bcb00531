"""SyntheticDictionary in a training run: an ordinary SAE recovers the dictionary."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import normalize

from datamodules import SyntheticDictionary
from mmsae import SAE
from mmsae.sae import TopK
from mmsae.training import LitSAE


def test_batches():
    data = SyntheticDictionary(d_in=12, n_atoms=20, k=2, pairs=1000, val_pairs=300, batch_size=100)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert len(train) == 10 and len(val) == 3 and data.d_in == 12 and data.modalities == ("image", "text")
    first, second = list(train), list(train)
    assert first[0].x["image"].shape == (100, 12) and not torch.equal(first[0].x["image"], second[0].x["image"])
    a, b = list(val), list(val)
    assert torch.equal(a[1].x["text"], b[1].x["text"])
    assert not torch.equal(a[0].x["image"], first[0].x["image"])
    assert data.sites == {}


def matched_cosine(true, found):
    """Of every true atom with the nearest found one."""
    return (normalize(true, dim=1) @ normalize(found, dim=1).T).max(1).values


@pytest.mark.filterwarnings("ignore")
def test_an_sae_finds_the_true_atoms(tmp_path):
    data = SyntheticDictionary(d_in=32, n_atoms=24, k=2, modalities=["image"], noise=0.01, batch_size=256, pairs=25600)
    torch.manual_seed(0)
    sae = SAE(None, 64, modalities=("image",), selector=TopK(2))
    module = LitSAE(sae, optimizer=lambda p: torch.optim.Adam(p, 3e-3))
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", default_root_dir=tmp_path, limit_val_batches=0, **off)
    trainer.fit(module, data)
    true = data.truth.atoms["image"]
    found = matched_cosine(true, sae.dictionary("image").weight.detach()).mean()
    assert found > 0.9 > 0.6 > matched_cosine(true, torch.randn(64, 32)).mean()
