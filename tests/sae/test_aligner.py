import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from mmsae.sae.aligner import Aligner, from_state, info_nce
from mmsae.training.aligner import LitAligner
from mmsae.types import InputError, Tokens

I2 = torch.eye(2)


@pytest.mark.parametrize(
    ("image", "text", "want", "tolerance"),
    [
        (I2, I2, math.log1p(math.exp(-1 / 0.07)), 1e-7),
        (I2, I2.flip(0), 14.2857, 1e-4),
        (torch.zeros(4, 3), torch.zeros(4, 3), math.log(4), 1e-6),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_oracles(image, text, want, tolerance, normalize):
    assert info_nce(image, text, normalize=normalize).item() == pytest.approx(want, abs=tolerance)


def test_normalised_loss_has_no_scale_and_half_precision_does_not_overflow():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 5, generator=g), torch.randn(8, 5, generator=g)
    assert info_nce(7 * a, 0.1 * b).item() == pytest.approx(info_nce(a, b).item(), abs=1e-5)
    assert info_nce(7 * a, b, normalize=False).item() != pytest.approx(info_nce(a, b, normalize=False).item(), rel=0.1)
    big = (70 * a).half()
    assert info_nce(100 * big.bfloat16(), 100 * big.bfloat16(), normalize=False).isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(big, big, normalize=False).dtype == torch.float32


def test_losses_are_the_three_terms():
    torch.manual_seed(0)
    aligner = Aligner({"image": 6, "text": 4}, width=3)
    x = {"image": torch.randn(5, 6), "text": torch.randn(5, 4)}
    terms = aligner.losses(x)
    assert set(terms) == {"contrastive", "image", "text"}
    e = aligner.align(x["image"], "image")
    assert e.shape == (5, 3) and aligner.unalign(e, "text").shape == (5, 4)
    back = aligner.unalign(e, "image")
    assert terms["image"].item() == pytest.approx((back - x["image"]).square().mean().item())
    assert aligner(x).item() == pytest.approx(sum(terms.values()).item())
    with pytest.raises(InputError, match="5 image and 4 text states are not pairs"):
        aligner.losses({**x, "text": x["text"][:4]})


def published(d_image=6, d_text=4, width=3):
    g = torch.Generator().manual_seed(1)
    shapes = {"vision_projection": (width, d_image), "text_projection": (width, d_text)}
    shapes |= {"vision_decoder": (d_image, width), "text_decoder": (d_text, width)}
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=g)
        state[f"{name}.bias"] = torch.randn(rows, generator=g)
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_file(tmp_path, wrapped):
    state = published()
    torch.save({"model_state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "llava_aux_best.pt")
    aligner = Aligner.from_pretrained(tmp_path / "llava_aux_best.pt")
    assert (aligner.normalize, aligner.width, aligner.d_in) == (False, 3, {"image": 6, "text": 4})
    x = torch.randn(2, 4)
    want = x @ state["text_projection.weight"].t() + state["text_projection.bias"]
    torch.testing.assert_close(aligner.align(x, "text"), want)
    aligner.save_pretrained(tmp_path / "aligner")
    again = Aligner.from_pretrained(tmp_path / "aligner")
    assert all(torch.equal(a, b) for a, b in zip(aligner.parameters(), again.parameters(), strict=True))
    assert again.normalize is False and again.d_in == aligner.d_in


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no aligner at"):
        Aligner.from_pretrained(tmp_path)
    (tmp_path / "a.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as a file of tensors"):
        Aligner.from_pretrained(tmp_path / "a.pt")
    with pytest.raises(InputError, match="is no aligner"):
        from_state({"encoder": torch.zeros(3)}, "file")
    with pytest.raises(InputError, match=r"text_decoder.bias in file has shape \(9,\), not \(4,\)"):
        from_state({**published(), "text_decoder.bias": torch.zeros(9)}, "file")


class Pairs(pl.LightningDataModule):
    """Image and text states that are two rotations of the same hidden factors."""

    d_in = {"image": 8, "text": 6}

    def train_dataloader(self):
        g = torch.Generator().manual_seed(0)
        factors = torch.randn(256, 4, generator=g)
        x = {m: factors @ torch.randn(4, d, generator=g) + 3 for m, d in self.d_in.items()}
        batches = [Tokens.pooled({m: v[i : i + 64] for m, v in x.items()}) for i in range(0, 256, 64)]
        return DataLoader(batches, batch_size=None)


def test_training_aligns():
    torch.manual_seed(0)
    model, data = LitAligner(Aligner(width=4), lr=5e-2), Pairs()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=120, accelerator="cpu", enable_checkpointing=False, **options)
    trainer.fit(model, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    aligned = model.aligner.tokens(batch)
    e = {m: torch.nn.functional.normalize(v, dim=1) for m, v in aligned.x.items()}
    right = ((e["image"] @ e["text"].t()).argmax(1) == torch.arange(64)).float().mean()
    assert right > 0.7 and trainer.callback_metrics["train/image"] < 1  # chance is 1/64


def test_unpaired_batches_are_refused():
    model = LitAligner(Aligner(3))
    item = {"image": torch.tensor([0, 1]), "text": torch.tensor([1, 0])}
    with pytest.raises(InputError, match="trained on pairs"):
        model.training_step(Tokens({m: torch.zeros(2, 3) for m in item}, item), 0)


def test_a_checkpoint_with_other_options_is_refused(tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **options)
    trainer.fit(LitAligner(Aligner(width=4), lr=5e-2), datamodule=Pairs())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for epochs, lr, said in ((1, 1e-3, "lr is 0.05 in the checkpoint, 0.001"), (2, 5e-2, "max_epochs is 1 in the ch")):
        with pytest.raises(InputError, match=said):
            again = pl.Trainer(max_epochs=epochs, default_root_dir=tmp_path, **options)
            again.fit(LitAligner(Aligner(width=4), lr=lr), datamodule=Pairs(), ckpt_path=tmp_path / "a.ckpt")
