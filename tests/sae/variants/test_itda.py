"""ITDA: a dictionary that grows from the data, under the same training as every other SAE."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmsae import SAE, InputError
from mmsae.cli import main
from mmsae.metrics import dictionary_similarity
from mmsae.sae import AffineEncoder, GrowingDictionary, PursuitEncoder
from mmsae.sae.variants.itda import _hash
from mmsae.training import LitSAE, RunCheckpoint
from mmsae.types import Tokens
from tests.helpers.recipes import ROOT, atoms_rows
from tests.helpers.training import make_store
from tests.training.test_lit import Data, StopAt


def model(most=200, cosine=0.9, steps=6, d_in=16, **kw):
    dictionary = GrowingDictionary(cosine, **kw)
    encoder = PursuitEncoder(steps=steps, sign="abs")
    return SAE(d_in, most, modalities=["image"], encoder=encoder, dictionaries={"shared": dictionary})


def built(x, batch=50, **kw):
    """An SAE that has seen the rows once, and its numbers of atoms after each batch."""
    sae, sizes = model(d_in=x.shape[1], **kw).train(), []
    for rows in x.split(batch):
        tokens = Tokens.pooled({"image": rows})
        sae.grow_(tokens, sae(tokens))
        sizes.append(sae.dictionary("image").size)
    return sae.eval(), sizes


def atom_names(sae):
    return sae.dictionary("image").atom_index


X = atoms_rows(1000)


def test_the_dictionary_grows_to_the_rows_that_it_cannot_explain():
    sae, sizes = built(X)
    d = sae.dictionary("image")
    assert sizes == sorted(sizes) and 20 < sizes[0] < sizes[-1] <= 200
    names = d.atom_index[: d.size]
    assert len(names.unique(dim=0)) == d.size and (d.atom_index[d.size :] == -1).all()
    torch.testing.assert_close(d.weight[: d.size], torch.nn.functional.normalize(X[names[:, 0]]))
    assert not d.weight[d.size :].any() and not list(sae.parameters())
    codes = sae.encode(X)
    assert codes.indices[codes.values != 0].max() < d.size and (codes.values < 0).any()


def test_there_are_never_more_than_the_most():
    for sequential in (False, True):
        sae, sizes = built(X, most=30, sequential=sequential)
        assert sizes[-1] == 30 and (sae.dictionary("image").weight.norm(dim=1) - 1).abs().max() < 1e-5


def test_one_at_a_time_leaves_almost_nothing_unexplained_and_nothing_is_added_twice():
    sae, sizes = built(X, sequential=True)
    d = sae.dictionary("image")
    in_batches = built(X, batch=200)[1]
    assert sizes[-1] < in_batches[-1]
    cos = cosine_similarity(X, sae({"image": X})["image"].x_hat, dim=1)
    assert (cos < 0.9).float().mean() < 0.02
    before, index = d.size, d.atom_index[: d.size, 0].clone()
    for sequential in (False, True):
        d.sequential = sequential
        tokens = Tokens.pooled({"image": X[index]})
        sae.grow_(tokens, sae(tokens))
        assert d.size == before
    # the dictionary does not depend on where batches end
    other = built(X, batch=333, sequential=True)[0]
    assert torch.equal(atom_names(other), atom_names(sae))


def test_the_cosine_is_the_published_threshold():
    x, y = X[:100].double(), built(X[:300])[0]({"image": X[:100]})["image"].x_hat.double()
    unit = (torch.nn.functional.normalize(t, dim=1) for t in (x, y))
    error = (next(unit) - next(unit)).square().mean(1)
    torch.testing.assert_close(error, (2 - 2 * cosine_similarity(x, y, dim=1)) / 16, rtol=0, atol=1e-8)
    assert round(1 - 4e-4 * 768 / 2, 3) == GrowingDictionary().cosine


def test_names_are_compared_between_models_that_see_the_same_samples():
    q = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    sae = built(X)[0]

    def jaccard(x):
        return dictionary_similarity(atom_names(sae), atom_names(built(x)[0]), "jaccard", population=len(x))

    assert jaccard(X).value == 1
    assert jaccard(5 * X @ q).value > 0.98  # near-ties may fall otherwise in float32
    noisy = jaccard(X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(2)))
    unrelated = jaccard(torch.randn(X.shape, generator=torch.Generator().manual_seed(3)))
    assert unrelated.value < noisy.value < 0.95


def test_atoms_are_named_by_uid_and_position_where_batches_have_them():
    sae = model().train()
    item, position = torch.tensor([1, 1, 0]), torch.tensor([4, 5, 9])
    x = torch.eye(16)[:3]
    tokens = Tokens({"image": x}, {"image": item}, ["a", "b"], position={"image": position})
    sae.grow_(tokens, sae(tokens))
    assert atom_names(sae)[:3].tolist() == [[_hash("b"), 4], [_hash("b"), 5], [_hash("a"), 9]]
    assert _hash("a") != _hash("b") and 0 <= _hash("a") < 2**63


def test_rows_of_zeros_are_no_atoms():
    sae, _ = built(torch.cat([torch.zeros(10, 16), torch.eye(16)]), batch=13, sequential=True)
    assert sae.dictionary("image").size == 16 and atom_names(sae)[0, 0] == 10


def test_compositions_without_a_pursuit_are_refused():
    with pytest.raises(InputError, match="'growing' needs encoder 'pursuit', not 'affine'"):
        SAE(8, 16, encoder=AffineEncoder(), dictionaries={"shared": GrowingDictionary()})
    with pytest.raises(InputError, match="cosine must be above 0"):
        GrowingDictionary(cosine=1.5)


def test_several_processes_are_refused_before_anything_is_read(monkeypatch):
    module = LitSAE(model())
    module._trainer = SimpleNamespace(precision="32-true", world_size=2, datamodule=None)
    with pytest.raises(InputError, match="in one process, not 2: use trainer"):
        module.setup("fit")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="by one process, not 2"):
        built(X[:50])


def fit(root, steps, **kw):
    module = LitSAE(model(d_in=None, most=400, cosine=0.97, steps=2))
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", default_root_dir=str(root), logger=False,
        callbacks=[RunCheckpoint(every_n_train_steps=7, dirpath=str(root / "checkpoints")), *kw.pop("callbacks", [])],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data(), **kw)
    return trainer, module


def test_a_build_that_was_stopped_goes_on_to_the_same_dictionary(tmp_path):
    trainer, whole = fit(tmp_path / "a", 20)
    assert trainer.global_step == 20 and not trainer.optimizers[0].param_groups
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        fit(tmp_path / "b", 20, callbacks=[StopAt(8)])
    (tmp_path / "b" / "first.ckpt").write_bytes((tmp_path / "b" / "checkpoints" / "last.ckpt").read_bytes())
    _, again = fit(tmp_path / "b", 20, ckpt_path="last", weights_only=True)
    a, b = whole.state_dict(), again.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    early = torch.load(tmp_path / "b" / "first.ckpt", weights_only=True)["state_dict"]["sae.dictionaries.shared.size_"]
    assert 0 < early < whole.sae.dictionary("image").size < 400


def test_the_command_line_builds_one_and_writes_it(tmp_path):
    store, run = make_store(tmp_path / "store", n=300), tmp_path / "run"
    main(
        ["fit", "-c", str(ROOT / "configs" / "sae" / "itda.yaml"), "-c", str(ROOT / "configs" / "data" / "store.yaml"),
         "--data.store", store, "--data.batch_size", "64", "--data.uids", "true", "--trainer.accelerator", "cpu",
         "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(run), "--trainer.log_every_n_steps", "2"]
    )  # fmt: skip
    sae = SAE.from_pretrained(run / "sae")
    d = sae.dictionary("image")
    assert 0 < d.size <= 128 and not d.weight.requires_grad
    from mmsae.activations import ActivationStore

    names = {_hash(u) for u in ActivationStore(store).uids}
    assert set(d.atom_index[: d.size, 0].tolist()) <= names
