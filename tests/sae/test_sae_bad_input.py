"""Input that has no meaning is refused in one sentence, which names what does not fit, and both numbers."""

import lightning.pytorch as pl
import pytest
import torch

from mmsae import SAE, InputError, Tokens
from mmsae.sae import (
    L0,
    L1,
    ArchetypalDictionary,
    AuxK,
    BatchTopK,
    Dictionary,
    EnergyTopK,
    FeatureChoice,
    GateAux,
    GatedEncoder,
    GaussianEncoder,
    GradientTopK,
    GroupBias,
    GrowingDictionary,
    JointTopK,
    JumpReLU,
    KLGaussian,
    Normaliser,
    NormMatch,
    PairMask,
    PerModalityEncoder,
    PursuitEncoder,
    Reconstruction,
    ReLU,
    ScaledDictionary,
    TopK,
)
from mmsae.training import LitSAE
from tests.helpers.lit import Data, trainer

BOTH = ("image", "text")


def small(selector=None, d_in=8, d_sae=24, modalities=BOTH, **parts):
    parts = {k: {"shared": v} if isinstance(v, Dictionary) else v for k, v in parts.items()}
    return SAE(d_in, d_sae, modalities=modalities, selector=selector, **parts)


def rows(n=20, d=8):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def poisoned(*bad, n=20, value=float("nan")):
    x = rows(n)
    x[list(bad), 3] = value
    return x


def thresholds():
    """An SAE whose thresholds have seen a batch, in evaluation: NaN is above none of them."""
    sae = small(BatchTopK(2))
    sae.train()({m: rows() for m in BOTH})
    return sae.eval()


# Rows.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [lambda: small(TopK(2)), thresholds], ids=["topk", "thresholds"])
def test_rows_that_are_not_finite_are_not_encoded(make, value):
    sae, x = make(), poisoned(7, 11, value=value)
    for form in (x, x.numpy(), x.half(), x.double()):
        with pytest.raises(InputError, match=r"2 of 20 text rows to encode are not finite .*the first is row 7$"):
            sae.encode(form, "text")
    good = [i for i in range(20) if i not in (7, 11)]
    unasked = sae.encode(x, "text", finite=False).to_dense()[good]
    torch.testing.assert_close(unasked, sae.encode(x[good], "text").to_dense())


def test_large_rows_are_finite():
    """Their sum is not, in single precision."""
    x = torch.full((3, 8), 3e38)
    assert small(TopK(2)).encode(x, "image").n == 3


@pytest.mark.parametrize(
    ("x", "modality", "message"),
    [
        (rows(5, 9), "image", r"image activations have shape \(5, 9\); this SAE takes \(N, 8\)"),
        (rows(5)[0], "image", r"image activations have shape \(8,\); this SAE takes \(N, 8\)"),
        (rows(5)[None], "text", r"text activations have shape \(1, 5, 8\); this SAE takes \(N, 8\)"),
        (rows(5), "audio", r"modality must be one of \('image', 'text'\), not 'audio'"),
        (rows(5), None, r"modality must be one of \('image', 'text'\), not None"),
    ],
)
def test_a_wrong_width_and_an_unknown_modality(x, modality, message):
    with pytest.raises(InputError, match=message):
        small(TopK(2)).encode(x, modality)


def test_batches_without_what_the_sae_takes():
    sae = small(TopK(2))
    for tokens in ({"audio": rows()}, Tokens.pooled({"audio": rows()})):
        with pytest.raises(InputError, match=r"one of \('image', 'text'\), not 'audio'"):
            sae(tokens)
    for tokens in ({}, Tokens.pooled({})):
        with pytest.raises(InputError, match=r"no rows to code: give those of one or more of \('image', 'text'\)"):
            sae(tokens)
    with pytest.raises(InputError, match="no text rows in this batch of a training"):
        sae.train()({"image": rows(), "text": rows()[:0]})
    with pytest.raises(InputError, match=r"d_in names \['image'\], the SAE also has text"):
        small(d_in={"image": 8})
    with pytest.raises(InputError, match=r"equal widths, not \{'image': 8, 'text': 9\}"):
        small(d_in={"image": 8, "text": 9})


# A training.


class Poison(pl.Callback):
    """Makes a row of one batch what it should not be."""

    def __init__(self, step, modality="text", value=float("nan")):
        self.step, self.modality, self.value = step, modality, value

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.last = trainer.global_step
        if trainer.global_step == self.step:
            batch.x[self.modality][3, 2] = self.value


def run(root, poison, lr=1e-3, steps=30):
    module = LitSAE(SAE(10, 48, selector=TopK(4)), [Reconstruction(), AuxK()], lambda p: torch.optim.Adam(p, lr))
    trainer(root, steps, log_every_n_steps=5, callbacks=[poison]).fit(module, datamodule=Data())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("step", "stops"), [(4, 5), (5, 7)], ids=["a logged step", "before a saved one"])
def test_a_training_stops_soon_after_rows_that_are_not_finite(tmp_path, step, stops, value):
    poison = Poison(step, value=value)
    with pytest.raises(InputError, match=f"stopped in step {stops}: text rows of step {step + 1} are not finite"):
        run(tmp_path, poison)
    assert poison.last == stops - 1


def test_a_training_that_diverged_stops_and_does_not_blame_its_rows(tmp_path):
    with pytest.raises(InputError, match=r"stopped in step 5: the training diverged in step [23], reconstruction of "
                       r"image, .* loss reconstruction.* is no longer finite though all rows are"):  # fmt: skip
        run(tmp_path, Poison(-1), lr=1e30)


@pytest.mark.parametrize("poison", [Poison(7), Poison(-1)], ids=["rows", "diverged"])
def test_nothing_is_saved_over_a_good_checkpoint(tmp_path, poison):
    """Between two steps that are logged: step 7 is saved, and 14 would be, with what step 8 spoiled."""
    good, kept = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "kept.ckpt"

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 7:
                kept.write_bytes(good.read_bytes())
                if poison.step < 0:
                    trainer.optimizers[0].param_groups[0]["lr"] = 1e30

    module = LitSAE(SAE(10, 48, selector=TopK(4)), [Reconstruction()], lambda p: torch.optim.Adam(p, 1e-3), None)
    what = "text rows of step 8 are not" if poison.step > 0 else "the training diverged in step .* no longer"
    with pytest.raises(InputError, match=f"stopped in step 14: {what} finite"):
        trainer(tmp_path, 30, log_every_n_steps=1000, callbacks=[Keep(), poison]).fit(module, datamodule=Data())
    assert good.read_bytes() == kept.read_bytes() and poison.last == 13


def test_a_finite_training_goes_on(tmp_path):
    poison = Poison(6, value=9.0)
    run(tmp_path, poison, steps=12)
    assert poison.last == 11


# Sizes.


@pytest.mark.parametrize(
    "selector", [TopK, BatchTopK, FeatureChoice, GradientTopK, JointTopK, PairMask], ids=lambda s: s.name
)
def test_more_latents_a_row_than_there_are(selector):
    with pytest.raises(InputError, match="k = 25 does not fit d_sae = 24"):
        small(selector(25))
    small(selector(24))


def test_a_batch_smaller_than_its_quotas():
    sae = small(FeatureChoice(2)).train()
    with pytest.raises(InputError, match=r"a batch of 11 rows has 22 entries .* fewer than the 24 latents.*12 rows"):
        sae({m: rows(11) for m in BOTH})
    sae({m: rows(12) for m in BOTH})


def test_fewer_archetypes_than_atoms_and_fewer_rows_than_archetypes():
    with pytest.raises(InputError, match="a point for every atom: 23 points for 24 atoms"):
        small(TopK(2), dictionaries=ArchetypalDictionary(points=23))
    sae = small(TopK(2), modalities=["image"], dictionaries=ArchetypalDictionary(points=25))
    with pytest.raises(InputError, match="25 points cannot be taken from 20 rows"):
        sae.fit_normaliser({"image": rows()})


# Compositions (sae_variants, section 12.3).

MP = PursuitEncoder
GBA = {"encoder": GroupBias(2), "dictionaries": ScaledDictionary()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(TopK(2), encoder=MP()), "'pursuit' chooses its latents by itself: .* and not 'topk'"),
        (lambda: small(ReLU(), encoder=MP()), "'pursuit' chooses its latents by itself: .* and not 'relu'"),
        (lambda: small(encoder=PerModalityEncoder(MP())), "a pursuit has no weights of its own"),
        (lambda: small(encoder=MP(), dictionaries=Dictionary("ball")), "'pursuit' needs atoms of norm 1.*norm 'ball'"),
        (lambda: small(encoder=MP(), dictionaries=Dictionary("free")), "'pursuit' needs atoms of norm 1.*norm 'free'"),
        (lambda: small(encoder=MP(), dictionaries=ScaledDictionary()), "'pursuit' needs atoms of norm 1.*is 'scaled'"),
        (lambda: small(encoder=GatedEncoder(), dictionaries=GrowingDictionary()), "'growing' .* not 'gated'"),
        (lambda: small(encoder=GaussianEncoder(), dictionaries=GrowingDictionary()), "'growing' .* not 'gaussian'"),
        (lambda: small(TopK(5), **GBA), r"'gba' .*'relu', and not 'topk' \(k = 5\)"),
        (lambda: small(BatchTopK(5), **GBA), r"'gba' .*'relu', and not 'batch_topk' \(k = 5\)"),
        (lambda: small(JumpReLU(), **GBA), "'gba' .*'relu', and not 'jumprelu'"),
        (lambda: small(ReLU(), encoder=GroupBias(25)), "25 groups do not fit d_sae = 24"),
        (lambda: small(EnergyTopK(), normaliser=Normaliser(unit_in=True)), "'energy_topk' goes by .*unit_in True"),
        (lambda: small(EnergyTopK(), normaliser=Normaliser(centre=True, unit_out=True)), "centre True, unit_out True"),
        (lambda: small(dictionaries={"image": Dictionary()}), r"one for each of \('image', 'text'\), not \['image'\]"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "term", "message"),
    [
        (lambda: small(encoder=MP(steps=2)), GateAux, "gate_aux .* encoder is 'pursuit'"),
        (lambda: small(encoder=MP(steps=2)), KLGaussian, "kl_gaussian .* encoder is 'pursuit'"),
        (lambda: small(encoder=MP(steps=2)), lambda: L1(on="gate"), "l1 on 'gate' .* encoder 'pursuit' has none"),
        (lambda: small(ReLU(), **GBA), L1, "encoder 'gba' sees to how often .* loss 'l1'"),
        (lambda: small(ReLU(), encoder=PerModalityEncoder(GroupBias(2))), L1, "encoder 'per_modality' .* loss 'l1'"),
        (lambda: small(ReLU(), **GBA), L0, "l0 .* 'jumprelu', this SAE has 'relu'"),
        (lambda: small(TopK(2), normaliser=Normaliser(unit_in=True)), NormMatch, "'norm_match' goes by .*unit_in True"),
    ],
)  # fmt: skip
def test_losses_that_do_not_go_with_the_parts(make, term, message):
    with pytest.raises(InputError, match=message):
        LitSAE(make(), [Reconstruction(), term()])


def test_norms_that_differ_after_centring_are_what_afa_needs():
    sae = small(EnergyTopK(), normaliser=Normaliser(unit_in=True, centre=True))
    LitSAE(sae, [Reconstruction(), NormMatch()])
