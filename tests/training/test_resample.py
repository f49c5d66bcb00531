"""Dead latents start again where rows are reconstructed badly (sae_variants, section 1.1)."""

import pytest
import torch
from torch.nn import functional as F

from mmsae import SAE, InputError, Tokens
from mmsae.sae import (
    L1,
    AffineEncoder,
    ArchetypalDictionary,
    Dictionary,
    GatedEncoder,
    LossContext,
    Normaliser,
    PerModalityEncoder,
    PursuitEncoder,
    Reconstruction,
    ReLU,
)
from mmsae.training import LitSAE, ResampleDead
from mmsae.training.resample import check_resampling, draw, resample_
from tests.helpers.lit import Data, StopAt, trainer

D, F_ = 10, 30
DEAD = torch.tensor([2, 7, 29])


def setting(encoder=None, modalities=("image",), dictionaries=("shared",), n=50):
    """An SAE after a step of Adam, its optimiser, rows, and which latents are dead."""
    torch.manual_seed(0)
    sae = SAE(
        D, F_, modalities=modalities, encoder=encoder or AffineEncoder(), selector=ReLU(),
        dictionaries={m: Dictionary() for m in dictionaries},
    )  # fmt: skip
    x = {m: torch.randn(n, D) + 1 for m in modalities}
    sae.fit_normaliser(x)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    ctx = LossContext(sae)
    L1(on="gate")(sae(x), ctx).backward()
    Reconstruction()(sae(x), ctx).backward()
    optimizer.step()
    dead = torch.zeros(F_, dtype=torch.bool)
    dead[DEAD] = True
    return sae, optimizer, Tokens.pooled(x), dead


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("encoder", [AffineEncoder, GatedEncoder])
def test_rows_biases_and_moments_of_dead_latents_alone_are_new(encoder):
    sae, optimizer, batch, dead = setting(encoder())
    before = {n: p.detach().clone() for n, p in sae.named_parameters()}
    x = batch.x["image"]
    ids = resample_(sae, optimizer, dead, batch, 0.2, generator())
    assert ids.tolist() == DEAD.tolist()
    _, rows = draw(sae, batch, 0, generator())
    directions = F.normalize(x - sae.dictionary("image").bias)
    atoms = sae.dictionary("image").weight[DEAD]
    at = (atoms @ directions.t()).argmax(1)
    torch.testing.assert_close(atoms, directions[at])
    assert len(set(at.tolist())) == 3 and rows["image"].shape == (0, D)
    length = 0.2 * before["encoder.weight"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(sae.encoder.weight[DEAD], directions[at] * length)
    for name, p in sae.named_parameters():
        moments = [optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")]
        if len(p) != F_:  # the decoder's bias
            assert torch.equal(p, before[name]) and all(m.any() for m in moments)
            continue
        assert torch.equal(p[~dead], before[name][~dead])
        for m in moments:
            assert not m[dead].any() and m[~dead].any()
        if p.dim() == 1:
            assert not p[dead].any()


def test_rows_are_drawn_in_proportion_to_their_error_without_replacement():
    sae, _, batch, _ = setting(n=5)
    out = sae(batch)["image"]
    error = (out.target - out.recon).detach().square().sum(1)
    hits = torch.zeros(5)
    for seed in range(2000):
        _, rows = draw(sae, batch, 1, generator(seed))
        hits[(rows["image"] == out.target).all(1).nonzero()[0, 0]] += 1
    torch.testing.assert_close(hits / 2000, error / error.sum(), atol=0.04, rtol=0)
    source, rows = draw(sae, batch, 8, generator())  # more than there are rows
    assert source.tolist() == [0] * 5 + [-1] * 3 and len(rows["image"][:5].unique(dim=0)) == 5


def test_a_draw_depends_on_the_generator_alone_and_leaves_the_sae_as_it_was():
    sae, _, batch, _ = setting()
    state = {k: v.clone() for k, v in sae.state_dict().items()}
    torch.manual_seed(1)
    first = draw(sae.train(), batch, 4, generator(3))[1]["image"]
    torch.manual_seed(2)
    assert torch.equal(first, draw(sae, batch, 4, generator(3))[1]["image"]) and sae.training
    assert not torch.equal(first, draw(sae, batch, 4, generator(4))[1]["image"])
    assert all(torch.equal(v, state[k]) for k, v in sae.state_dict().items())


def test_a_modalitys_own_parts_get_the_partner_of_the_drawn_row():
    sae, optimizer, batch, dead = setting(
        PerModalityEncoder(AffineEncoder()), ("image", "text"), dictionaries=("image", "text")
    )
    resample_(sae, optimizer, dead, batch, 0.2, generator())
    at = {}
    for m, x in batch.x.items():
        directions = F.normalize(x - sae.dictionary(m).bias)
        for weight in (sae.dictionary(m).weight, F.normalize(sae.encoder.encoders[m].weight)):
            best = (weight[DEAD] @ directions.t()).max(1)
            torch.testing.assert_close(best.values, torch.ones(3))
            assert at.setdefault("row", best.indices.tolist()) == best.indices.tolist()
    apart = batch._replace(item={"image": batch.item["image"], "text": batch.item["text"].flip(0)})
    before = {m: sae.dictionary(m).weight.detach().clone() for m in batch.x}
    resample_(sae, optimizer, dead, apart, 0.2, generator(1))
    new = torch.stack([(sae.dictionary(m).weight != before[m]).any(1)[DEAD] for m in batch.x])
    assert (new.sum(0) == 1).all()  # without a partner, the other modality's part stays


def test_shared_parts_get_the_row_of_the_modality_that_it_was_drawn_from():
    sae, optimizer, batch, dead = setting(modalities=("image", "text"))
    source, rows = draw(sae, batch, 3, generator())
    resample_(sae, optimizer, dead, batch, 0.2, generator())
    want = torch.stack([list(rows.values())[int(s)][j] for j, s in enumerate(source)]) - sae.dictionary("image").bias
    torch.testing.assert_close(sae.dictionary("image").weight[DEAD], F.normalize(want))


def lit(seed=0):
    torch.manual_seed(seed)
    sae = SAE(D, 60, modalities=("image",), selector=ReLU(), normaliser=Normaliser(centre=True, scale="rms"))
    with torch.no_grad():  # latents that cannot fire
        sae.encoder.bias[:6] = -100.0
    module = LitSAE(sae, [Reconstruction(), L1(0.1)], dead_after=100)
    module.seed = 5
    return module


def test_a_run_resamples_and_resumed_equals_the_uninterrupted_one(tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    whole, callback = lit(), ResampleDead(every=5, until=0.7)
    trainer(tmp_path / "a", 30, callbacks=[callback]).fit(whole, datamodule=Data())
    assert callback.resampled == 6 and callback.step == 20  # 25 is over 0.7 of 30
    assert "step 5: 6 of 6 dead latents resampled" in caplog.text
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        trainer(tmp_path / "b", 30, callbacks=[ResampleDead(5, until=0.7), StopAt(17)]).fit(lit(), datamodule=Data())
    again, second = lit(9), ResampleDead(5, until=0.7)
    again.seed = 5
    trainer(tmp_path / "b", 30, callbacks=[second]).fit(again, datamodule=Data(), ckpt_path="last", weights_only=True)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert second.state_dict() == callback.state_dict()
    without = lit()
    trainer(tmp_path / "c", 30).fit(without, datamodule=Data())
    assert without.usage.dead(100).nonzero()[:, 0].tolist() == list(range(6)) and not whole.usage.dead(100).any()


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(InputError, match="encoder 'pursuit' has no weight of its own"):
        check_resampling(SAE(D, F_, modalities=("image",), encoder=PursuitEncoder()))
    with pytest.raises(InputError, match="the atoms of 'archetypal' are not free weights"):
        check_resampling(SAE(D, F_, selector=ReLU(), dictionaries={"shared": ArchetypalDictionary()}))
    for bad in ({"every": 0}, {"scale": 0.0}, {"until": 1.5}):
        with pytest.raises(InputError, match="every and scale must be above 0"):
            ResampleDead(**bad)
