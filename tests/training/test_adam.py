"""Trainings whose atoms are stepped by kernel: those of torch.optim.Adam, and either goes on with the other's."""

import copy

import pytest
import torch

from mmsae.kernels import use
from mmsae.training import LitSAE, plain
from mmsae.training.adam import AtomAdam, kept_by, with_atoms
from mmsae.training.members import LitSAEs
from tests.helpers.backends import TRITON, place
from tests.helpers.lit import Data, Loader, trainer
from tests.helpers.recipes import ROOT, batch, small_model

FAMILIES = ["topk", "paired_topk", "vl_sae"]  # the last one's atoms are free
pytestmark = pytest.mark.parametrize("backend", [TRITON])


class Few(Data):
    """Batches of so few rows that the interpreter is done with them soon."""

    def train_dataloader(self):
        return Loader(self.x, 4, 0)


def module(name="topk", **kw):
    torch.manual_seed(0)
    return LitSAE(*small_model(ROOT / "configs" / "sae" / f"{name}.yaml", d_in=10, d_sae=24, k=3), **kw)


def fit(root, backend, made, steps, **kw):
    """Train with a backend; the trainer."""
    t = trainer(root, steps, accelerator="gpu" if place(backend) == "cuda" else "cpu", limit_val_batches=0, **kw)
    with use(backend):
        t.fit(made, datamodule=Few())
    return t


def close(found, want, rel=1e-6):
    assert found.keys() == want.keys()
    for name, b in want.items():
        a, b = found[name].double().cpu(), b.double().cpu()
        assert (a - b).norm() <= rel * b.norm(), (name, float((a - b).norm() / b.norm()))


def weights(made):
    return dict(made.named_parameters())


def moments(t):
    states = t.optimizers[0].state_dict()["state"]
    return {f"{name} {i}": s[name] for i, s in states.items() for name in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_those_of_torch(tmp_path, caplog, backend, name, clip):
    caplog.set_level("INFO")
    made = {b: module(name) for b in ("torch", backend)}
    t = {b: fit(tmp_path / b, b, made[b], 3, gradient_clip_val=clip) for b in made}
    a, b = (t[x].optimizers[0] for x in made)
    assert type(a) is torch.optim.Adam and type(b) is (torch.optim.Adam if name == "vl_sae" else AtomAdam)
    assert len(kept_by(b).tangent) == (len(made[backend].sae.dictionaries) if name != "vl_sae" and not clip else 0)
    close(weights(made[backend]), weights(made["torch"]))
    close(moments(t[backend]), moments(t["torch"]), 1e-5)
    assert caplog.text.count("one steps atoms (tangent gradient, Adam, norm)") == (name != "vl_sae")


@pytest.mark.parametrize("first_by_kernel", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_either_goes_on_with_the_others_checkpoint(tmp_path, backend, name, first_by_kernel):
    order = [backend, "torch"] if first_by_kernel else ["torch", backend]
    made = {tuple(order): module(name), ("torch", "torch"): module(name)}
    t = {}
    for (first, second), m in made.items():
        root = tmp_path / f"{first} {second}"
        fit(root, first, copy.deepcopy(m), 2).save_checkpoint(root / "2.ckpt")
        t[first, second] = trainer(
            root, 4, accelerator="gpu" if place(second) == "cuda" else "cpu", limit_val_batches=0
        )
        with use(second):
            t[first, second].fit(m, datamodule=Few(), ckpt_path=str(root / "2.ckpt"), weights_only=True)
    (mixed, plain_), (a, b) = made.values(), t.values()
    assert isinstance(a.optimizers[0], AtomAdam) == (name != "vl_sae" and not first_by_kernel)
    close(weights(mixed), weights(plain_), 2e-6)
    close(moments(a), moments(b), 1e-5)


@pytest.mark.parametrize("freeze", ["decoder", "soft_decoder", "encoder"])
def test_what_is_kept_is_kept(tmp_path, backend, freeze):
    made = {b: module(freeze=freeze) for b in ("torch", backend)}
    t = {b: fit(tmp_path / b, b, made[b], 3, gradient_clip_val=None) for b in made}
    assert isinstance(t[backend].optimizers[0], AtomAdam) == (freeze != "decoder")
    close(weights(made[backend]), weights(made["torch"]))


def test_members_are_stepped_as_alone(tmp_path, caplog, backend):
    def optimizer(p):
        return torch.optim.AdamW(p, 1e-3)

    def members():
        return {"topk": module(), "vl": module("vl_sae"), "decayed": module(optimizer=optimizer)}

    caplog.set_level("INFO")
    fit(tmp_path / "all", backend, together := LitSAEs(members()), 2)
    assert caplog.text.count("one steps atoms") == 1
    for name, alone in members().items():
        fit(tmp_path / name, backend, alone, 2)
        want, found = alone.state_dict(), together.each()[name].state_dict()
        assert all(torch.equal(found[k], v) for k, v in want.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_loop(backend, name):
    device, found = place(backend), {}
    for b in ("torch", backend):
        made = module(name)
        made.sae.fit_normaliser(batch(made.sae, 64).x)
        batches = ({m: x.to(device) for m, x in batch(made.sae, 4, seed=s).x.items()} for s in range(3))
        with use(b):
            plain.train(made.sae.to(device), list(made.losses), batches, 3)
        found[b] = weights(made.sae)
    close(found[backend], found["torch"])


def test_only_plain_adam_and_unit_atoms(backend):
    sae = module("paired_topk").sae.to(place(backend))
    make = [
        lambda p: torch.optim.SGD(p, 1e-3),
        lambda p: torch.optim.AdamW(p, 1e-3),
        lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-3),
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
        lambda p: torch.optim.Adam(p, torch.tensor(1e-3)),
    ]
    with use(backend):
        for one in make:
            made = one(sae.parameters())
            assert with_atoms(made, sae, True) is made and kept_by(made) == ([], [])
        atoms = list(sae.dictionaries.values())
        assert kept_by(with_atoms(torch.optim.Adam(sae.parameters()), sae, False)) == ([], atoms)
        encoder = torch.optim.Adam(sae.encoder.parameters())
        assert with_atoms(encoder, sae, True) is encoder
        atoms[0].norm = "ball"
        assert kept_by(with_atoms(torch.optim.Adam(sae.parameters()), sae, True)) == (atoms[1:], atoms[1:])
    with use("torch"):
        made = torch.optim.Adam(sae.parameters())
        assert with_atoms(made, sae, True) is made


def test_gradients_stay_hooks_come_once_and_no_gradient_is_no_step(backend):
    device = place(backend)
    sae, calls = module().sae.to(device), []
    with use(backend):
        optimizer = with_atoms(torch.optim.Adam(sae.parameters(), 0.1), sae, True)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    (dictionary,) = sae.dictionaries.values()
    dictionary.weight.data.mul_(2)
    optimizer.step()
    torch.testing.assert_close(dictionary.weight.norm(dim=1), torch.ones(24, device=device))
    assert not optimizer.state and calls == [1]
    before = dictionary.weight.detach().clone()

    def closure():
        dictionary.weight.grad = grad
        return 7

    grad = torch.randn(10, 24, device=device).t()  # columns are apart
    assert optimizer.step(closure) == 7 and dictionary.weight.grad is grad
    assert not torch.equal(dictionary.weight, before) and set(optimizer.state) == {dictionary.weight}
    assert optimizer.state[dictionary.weight]["step"].device.type == "cpu"
