"""Members of one run are the SAEs that runs of their own would give, to the bit; also resumed, clipped, accumulated."""

import json
import math
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mmsae import SAE, InputError
from mmsae.sae import AuxK, Reconstruction, TopK
from mmsae.training import ExportSAE, KAnneal, LitSAE, LitSAEs, ResampleDead
from mmsae.training.members.view import for_each_member
from tests.helpers.lit import Data, Spoil, StopAt, lit, trainer
from tests.helpers.recipes import ROOT, small_model
from tests.helpers.resumed import KINDS

STEPS = 12


def of_recipe(kind, seed=0):
    """An SAE of a recipe with every kind of state, whose parts act often."""
    recipe, options = KINDS[kind]
    torch.manual_seed(seed)
    sae, losses = small_model(ROOT / "configs" / "sae" / f"{recipe}.yaml", d_in=10)
    for part in (sae.encoder, sae.selector):
        if hasattr(part, "every"):
            part.every = 3
    made = LitSAE(sae, losses, **options)
    made.seed = seed
    return made


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


def topk(k, seed=0, **kw):
    """Unbuilt: weights are drawn in setup."""
    torch.manual_seed(seed)
    kw = {"optimizer": adam} | kw
    made = LitSAE(
        SAE(None, 48, modalities=("image",), selector=TopK(k)), [Reconstruction(), AuxK(dead_after=200)], **kw
    )
    made.seed = seed
    return made


def states(module):
    return {name: member.state_dict() for name, member in module.each().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def alone(root, make, callbacks=(), **kw):
    module = make()
    trainer(root, STEPS, callbacks=list(callbacks), **kw).fit(module, datamodule=Data())
    return module.state_dict()


def together(root, make, callbacks=(), ckpt=None, **kw):
    module = LitSAEs({name: m() for name, m in make.items()})
    callbacks = for_each_member(callbacks, make)
    trainer(root, STEPS, callbacks=callbacks, **kw).fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return states(module)


def test_every_kind_of_state_in_one_run(tmp_path):
    """Thresholds, biases, quotas, noise, growing atoms, points, frozen atoms, drawn prefixes and masks; clipped."""
    make = {name: lambda kind=name, seed=i % 2: of_recipe(kind, seed) for i, name in enumerate(KINDS)}
    found = together(tmp_path / "many", make)
    for name, one in make.items():
        assert equal(found[name], alone(tmp_path / name, one)), name


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_algorithm": "value"}],
    ids=["plain", "accumulated", "bf16", "clipped by value"],
)
def test_settings_of_the_trainer(tmp_path, options):
    """Weights drawn in setup from the member's seed, AuxK, k that falls, resampling, own rates and schedules."""
    make = {
        "a": lambda: topk(4),
        "b": lambda: topk(2, seed=3, scheduler=None),
        "c": lambda: topk(4, seed=1, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02), normaliser_rows=100),
    }
    callbacks = lambda: [KAnneal(share=0.5), ResampleDead(every=4, until=1.0)]  # noqa: E731
    found = together(tmp_path / "many", make, callbacks(), **options)
    for name, one in make.items():
        assert equal(found[name], alone(tmp_path / name, one, callbacks(), **options)), name


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    make = {name: lambda kind=name: of_recipe(kind) for name in ("vsae", "itda", "matryoshka_sampled", "gba")}
    make["topk.5"] = lambda: topk(5)
    callbacks = lambda: [*extra(), ResampleDead(every=4, until=1.0)]  # noqa: E731
    extra = list
    make.pop("itda"), make.pop("gba")  # cannot be resampled
    whole = together(tmp_path / "whole", make, callbacks())
    extra = lambda: [StopAt(9)]  # noqa: E731
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        together(tmp_path / "run", make, callbacks())
    extra = list
    again = together(tmp_path / "run", {n: lambda m=m: m() for n, m in make.items()}, callbacks(), ckpt="last")
    assert all(equal(whole[name], again[name]) for name in make)


def test_a_checkpoint_of_others_is_refused_by_name(tmp_path):
    together(tmp_path, {"a": lambda: topk(4), "b": lambda: topk(2)})
    for names, said in (
        ({"a": lambda: topk(4)}, "only the checkpoint has b"),
        ({"a": lambda: topk(4), "b": lambda: topk(2), "c": lambda: topk(3)}, "only this run has c"),
        (
            {"a": lambda: topk(4), "b": lambda: topk(3)},
            "member b: sae.selector.k is 2 in the checkpoint, 3 in this run",
        ),
    ):
        with pytest.raises(InputError, match=said):
            together(tmp_path, names, ckpt="last")
    with pytest.raises(InputError, match="the checkpoint is of the members a, b, this run trains one SAE"):
        trainer(tmp_path, 14).fit(topk(4), datamodule=Data(), ckpt_path="last", weights_only=True)
    alone(tmp_path / "one", lambda: topk(4))
    with pytest.raises(InputError, match="the checkpoint is of a run of one SAE"):
        together(tmp_path / "one", {"a": lambda: topk(4)}, ckpt="last")


def test_a_member_that_diverges_is_stopped_and_named(tmp_path):
    make = {"a": lambda: topk(4), "b": lambda: topk(2), "c": lambda: topk(4, seed=1)}
    module = LitSAEs({name: m() for name, m in make.items()})
    run = trainer(tmp_path / "many", STEPS, callbacks=[Spoil("b", 5)], log_every_n_steps=2)
    with pytest.raises(InputError, match="1 of 3 members have no result: b stopped in step 6: the training diverged"):
        run.fit(module, datamodule=Data())
    assert run.global_step == STEPS and set(module.running()) == {"a", "c"}
    for name in ("a", "c"):
        assert equal(module.each()[name].state_dict(), alone(tmp_path / name, make[name], log_every_n_steps=2))
    saved = torch.load(tmp_path / "many/checkpoints/last.ckpt", weights_only=True)
    assert list(saved["mmsae"]["stopped"]) == ["b"]
    # a resumed run remembers
    again = LitSAEs({name: m() for name, m in make.items()})
    longer = trainer(tmp_path / "many", STEPS + 2, log_every_n_steps=2)
    with pytest.raises(InputError, match="b stopped in step 6"):
        longer.fit(again, datamodule=Data(), ckpt_path="last", weights_only=True)
    assert longer.global_step == STEPS + 2


class CopyCheckpoint(pl.Callback):
    """Copies the run's last checkpoint after a step that follows it."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            shutil.copy(folder / "last.ckpt", folder / "copy.ckpt")


def part(file, name):
    """All that a checkpoint holds of a member: weights and buffers, its optimiser, its schedule."""
    saved = torch.load(file, weights_only=True)
    own = {k.removeprefix(f"saes.{name}."): v for k, v in saved["state_dict"].items() if k.startswith(f"saes.{name}.")}
    return own, *(saved[key][0]["members"][name] for key in ("optimizer_states", "lr_schedulers"))


def same_part(file, kept):
    """Whether a checkpoint holds the same of member b: its optimiser's moments and steps, its rate and its schedule."""
    found, (weights, moments, schedule) = part(file, "b"), kept
    assert equal(found[0], weights) and found[2] == schedule
    assert found[1]["param_groups"] == moments["param_groups"] and found[1]["state"].keys() == moments["state"].keys()
    assert all(equal(found[1]["state"][i], s) for i, s in moments["state"].items())
    return True


# when b goes bad and when that is seen: with what is logged, with what is saved, with what is both
@pytest.mark.parametrize(("bad", "every", "seen"), [(9, 2, 10), (9, 50, 14), (14, 7, 14)])
def test_a_member_that_diverges_is_kept_as_it_was(tmp_path, capsys, bad, every, seen):
    make = {"a": lambda: topk(4), "b": lambda: topk(2), "c": lambda: topk(4, seed=1)}

    def fit(callbacks, **kw):
        module = LitSAEs({name: m() for name, m in make.items()})
        callbacks = [*callbacks, *for_each_member([ExportSAE()], make)]
        run = trainer(tmp_path / "many", 20, callbacks=callbacks, log_every_n_steps=every)
        try:
            run.fit(module, datamodule=Data(), **kw)
        except BaseException as e:
            return module, e
        return module, None

    # killed after a checkpoint that knows it
    fit([Spoil("b", bad), CopyCheckpoint(8), StopAt(16)])
    folder = tmp_path / "many/b/sae-last-good"
    kept, written = (
        part(tmp_path / "many/checkpoints/copy.ckpt", "b"),
        (folder / "sae_weights.safetensors").read_bytes(),
    )
    saved = torch.load(tmp_path / "many/checkpoints/last.ckpt", weights_only=True)
    assert (
        saved["global_step"] == 14 and saved["mmsae"]["good"] == {"b": 7} and list(saved["mmsae"]["stopped"]) == ["b"]
    )
    steps = {int(s["step"]) for s in kept[1]["state"].values()}
    assert steps == {7} and kept[2]["last_epoch"] == 7 and same_part(tmp_path / "many/checkpoints/last.ckpt", kept)

    module, error = fit([], ckpt_path="last", weights_only=True)
    assert f"1 of 3 members have no result: b stopped in step {seen}" in str(error)
    assert error.good == {"b": 7} and list(error.stopped) == ["b"]
    assert equal(module.each()["b"].state_dict(), kept[0])
    assert same_part(tmp_path / "many/checkpoints/last.ckpt", kept)
    own = LitSAE(SAE.from_pretrained(folder))
    assert all(torch.equal(v, kept[0][f"sae.{k}"]) for k, v in own.sae.state_dict().items())
    facts = json.loads((folder / "cfg.json").read_text())["mmsae"]["training"]
    assert facts["steps"] == 7 and facts["diverged"].startswith(f"stopped in step {seen}")
    assert facts["tokens"] == {"image": 7 * 40} and (folder / "sae_weights.safetensors").read_bytes() == written
    assert not (tmp_path / "many/b/sae").exists() and (tmp_path / "many/a/sae").exists()

    # the others: as if b had not been there
    without = LitSAEs({name: make[name]() for name in ("a", "c")})
    callbacks = for_each_member([ExportSAE()], ("a", "c"))
    trainer(tmp_path / "two", 20, callbacks=callbacks, log_every_n_steps=every).fit(without, datamodule=Data())
    for name in ("a", "c"):
        assert equal(module.each()[name].state_dict(), without.each()[name].state_dict())
        file = f"{name}/sae/sae_weights.safetensors"
        assert (tmp_path / "many" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_member_that_diverged_after_the_last_checkpoint_is_trained_again(tmp_path):
    make = {"a": lambda: topk(4), "b": lambda: topk(2)}
    export = lambda: [ExportSAE()]  # noqa: E731
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        many = LitSAEs({name: m() for name, m in make.items()})
        callbacks = [Spoil("b", 9), StopAt(11), *for_each_member(export(), make)]
        trainer(tmp_path, STEPS, callbacks=callbacks, log_every_n_steps=2).fit(many, datamodule=Data())
    assert (tmp_path / "b/sae-last-good/cfg.json").exists()
    found = together(tmp_path, make, export(), ckpt="last", log_every_n_steps=2)
    assert equal(found["b"], alone(tmp_path / "alone", make["b"], log_every_n_steps=2))
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["sae", "sae-best"]


def test_where_all_diverge_the_run_stops(tmp_path):
    data = Data()
    data.x["image"][:] = math.nan
    module = LitSAEs({"a": topk(4), "b": topk(2)})
    for member in module.each().values():  # rows are looked at when the normaliser is fitted, too
        member.sae.build(10)
        member.sae.fit_normaliser(Data().x)
        member._allocate()
    with pytest.raises(InputError, match=r"2 of 2 members have no result: a, b stopped in step 4: image rows of"):
        trainer(tmp_path, STEPS, log_every_n_steps=4).fit(module, datamodule=data)


def test_figures_are_logged_by_member_and_the_bar_shows_one(tmp_path):
    module = LitSAEs({"a": topk(4), "b": lit(seed=1)})
    module.each()["b"].seed = 1
    run = trainer(tmp_path, STEPS, log_every_n_steps=4, val_check_interval=STEPS, check_val_every_n_epoch=None)
    run.fit(module, datamodule=Data())
    names = set(run.callback_metrics)
    assert {"train/a/loss", "train/b/auxk", "train/a/fvu/image", "train/b/l0/text", "val/a/fvu/image"} <= names
    assert "train/a/fvu/text" not in names and "val/b/fvu/joint" in names
    assert {n for n in run.progress_bar_metrics if n.startswith("train")} >= {"train/a/fvu/image"}
    assert not [n for n in run.progress_bar_metrics if n.startswith("train/b")]
    [result] = run.validate(module, datamodule=Data(), verbose=False)
    assert result["val/a/fvu/image"] == pytest.approx(float(run.callback_metrics["val/a/fvu/image"]))
    assert {n.split("/")[1] for n in result} == {"a", "b"}


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no member"):
        LitSAEs({})
    with pytest.raises(InputError, match="'a/b' cannot name a member"):
        LitSAEs({"a/b": topk(2)})
    with pytest.raises(InputError, match="member b: the data has image activations of width 10, the SAE takes 12"):
        odd = LitSAE(SAE(12, 40, modalities=("image",)))
        trainer(tmp_path, 2).fit(LitSAEs({"a": topk(2), "b": odd}), datamodule=Data())
    module = LitSAEs({"a": topk(2), "b": topk(3)})
    module.trainer = type("Trainer", (), {"precision": "16-mixed"})()
    with pytest.raises(InputError, match="precision 16-mixed scales the gradients of all 2 members by one factor"):
        module.setup("fit")
