"""k falls from many to the recipe's own, the same in a resumed run."""

import pytest
import torch
from lightning.pytorch import Callback

from mmsae import SAE, InputError
from mmsae.sae import BatchTopK, Reconstruction, ReLU, TopK
from mmsae.training import KAnneal, LitSAE
from tests.helpers.lit import Data, StopAt, trainer


class Seen(Callback):
    def __init__(self):
        self.k = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.k.append(module.sae.selector.k)


def lit(selector=None, seed=0):
    torch.manual_seed(seed)
    return LitSAE(SAE(None, 48, modalities=("image",), selector=selector or TopK(4)), [Reconstruction()])


def test_k_falls_linearly_and_stays(tmp_path):
    seen = Seen()
    trainer(tmp_path, 20, callbacks=[KAnneal(share=0.5), seen]).fit(lit(), datamodule=Data())
    assert seen.k == [round(10 - 6 * step / 10) for step in range(10)] + [4] * 10  # from the width, 10
    seen = Seen()
    trainer(tmp_path / "b", 4, callbacks=[KAnneal(8, share=1.0), seen]).fit(lit(BatchTopK(2.5)), datamodule=Data())
    assert seen.k == [8.0, 6.625, 5.25, 3.875]


def test_a_resumed_run_goes_on_with_the_same_k(tmp_path):
    whole, again = Seen(), Seen()
    trainer(tmp_path / "a", 20, callbacks=[KAnneal(share=0.8), whole]).fit(a := lit(), datamodule=Data())
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        trainer(tmp_path / "b", 20, callbacks=[KAnneal(share=0.8), StopAt(9)]).fit(lit(), datamodule=Data())
    t = trainer(tmp_path / "b", 20, callbacks=[KAnneal(share=0.8), again])
    t.fit(b := lit(seed=9), datamodule=Data(), ckpt_path="last", weights_only=True)
    assert again.k == whole.k[7:]
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_what_cannot_be_annealed_is_refused(tmp_path):
    with pytest.raises(InputError, match="selector 'relu' has none"):
        trainer(tmp_path, 2, callbacks=[KAnneal()]).fit(lit(ReLU()), datamodule=Data())
    with pytest.raises(InputError, match="from many to few, not from 2 to 4"):
        trainer(tmp_path, 2, callbacks=[KAnneal(2)]).fit(lit(), datamodule=Data())
    with pytest.raises(InputError, match="share must be above 0"):
        KAnneal(share=0.0)
