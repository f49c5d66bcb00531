"""LitSAE on a loader with state: resume equals the uninterrupted run, checkpoints hold valid atoms, ranks agree."""

import json
from types import SimpleNamespace

import pytest
import torch

from mmsae import SAE, InputError, Site
from mmsae.cli import main
from mmsae.sae import AuxK, JumpReLU, PreActRevive, Reconstruction, TopK
from mmsae.training import DeadLatentReport, ExportSAE, LitSAE, Schedule
from mmsae.training.schedule import multiplier
from tests.helpers.lit import Data, Spoil, StopAt, lit, trainer
from tests.helpers.training import RECIPE, SMALL, make_store


@pytest.mark.parametrize(("stop", "centre"), [(3, True), (8, True), (17, True), (24, True), (3, False), (8, False)])
def test_a_run_stopped_anywhere_and_resumed_equals_the_uninterrupted_one(tmp_path, stop, centre):
    whole = lit(centre=centre)
    trainer(tmp_path / "a", 30).fit(whole, datamodule=Data())
    with pytest.raises(BaseException):  # noqa: B017, Lightning turns the interrupt into SystemExit
        trainer(tmp_path / "b", 30, callbacks=[StopAt(stop)]).fit(lit(centre=centre), datamodule=Data())
    again = lit(0 if stop < 7 else 99, centre=centre)  # before the first checkpoint a resume is a new run
    trainer(tmp_path / "b", 30).fit(again, datamodule=Data(), ckpt_path="last", weights_only=True)
    a, b = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_checkpoints_hold_unit_atoms_and_load_without_unpickling(tmp_path):
    trainer(tmp_path, 14).fit(lit(), datamodule=Data())
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for m in ("image", "text"):
        torch.testing.assert_close(state[f"sae.dictionaries.{m}.weight"].norm(dim=1), torch.ones(48))
    assert state["usage.since"].dtype == torch.int64 and state["sae.normaliser.mean_image"].abs().sum() > 0


@pytest.mark.parametrize("every", [7, 50])
def test_no_checkpoint_is_written_over_by_weights_that_are_not_finite(tmp_path, every):
    """Also where the step was logged, before it changed the weights."""
    with pytest.raises(InputError, match=r"stopped in step 14: the training diverged .*encoder.weight is no longer"):
        run = trainer(tmp_path, 20, callbacks=[Spoil("", 14)], log_every_n_steps=every)
        run.fit(lit(), datamodule=Data())
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 7 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_a_fused_adam_is_clipped_in_mixed_precision(tmp_path):
    """Lightning refuses it, for the sake of a scaler that there is none of in bfloat16."""

    def weights(fused, clip):
        made = lit()
        made.make_optimizer = lambda params: torch.optim.Adam(params, lr=1e-3, eps=1.0, fused=fused)  # sees sizes
        name = f"{fused} {clip}"
        t = trainer(tmp_path / name, 4, precision="bf16-mixed", gradient_clip_val=clip)
        t.fit(made, datamodule=Data())
        return torch.cat([p.detach().flatten() for p in made.sae.parameters()])

    (ours, want), free = (weights(fused, 1e-3) for fused in (True, False)), weights(True, None)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-8)
    assert (free - want).norm() > 100 * (ours - want).norm()


def test_clipping_what_a_scaler_has_scaled_needs_another_optimizer():
    made = lit()
    made.make_optimizer = lambda params: torch.optim.Adam(params, lr=1e-3, fused=True)
    made.sae.build(10)
    made._trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()), gradient_clip_val=1.0, precision="16-mixed"
    )
    with pytest.raises(InputError, match=r"16-mixed scales gradients .* give the optimizer fused false, or use bf16"):
        made.configure_optimizers()


def test_the_normaliser_is_fitted_once_before_step_0(tmp_path):
    module, data = lit(), Data()
    trainer(tmp_path, 1).fit(module, datamodule=data)
    unit = torch.nn.functional.normalize(data.x["image"])
    torch.testing.assert_close(module.sae.normaliser.mean("image"), unit.mean(0), rtol=1e-4, atol=1e-5)


def test_export_at_the_end_and_at_the_best_validation(tmp_path):
    module = lit()
    t = trainer(tmp_path, 20, callbacks=[ExportSAE()], val_check_interval=10, check_val_every_n_epoch=None)
    t.fit(module, datamodule=Data())
    assert {"val/fvu/image", "val/fvu/joint", "val/code_cosine/shuffled", "val/dead/text"} <= set(t.callback_metrics)
    final, x = SAE.from_pretrained(tmp_path / "sae"), Data().x["image"]
    assert torch.equal(final.encode(x, "image").to_dense(), module.sae.encode(x, "image").to_dense())
    best = SAE.from_pretrained(tmp_path / "sae-best")
    assert best.d_sae == 48


def test_training_learns(tmp_path):
    module, data = lit(), Data()
    trainer(tmp_path, 1).fit(module, datamodule=data)

    def error(sae):
        return sum(float((o.target - o.recon).detach().square().mean()) for o in sae(data.x).values())

    before = error(module.sae)
    t = trainer(tmp_path, 200)
    module = lit()
    t.fit(module, datamodule=data)
    assert error(module.sae) < 0.6 * before


def test_widths_and_sites_that_disagree_are_refused(tmp_path):
    with pytest.raises(InputError, match="image activations of width 10, the SAE takes 12"):
        trainer(tmp_path, 1).fit(lit(d_in=12), datamodule=Data())
    module = lit(d_in=10)
    module.sae.sites = {"image": Site("a" * 32, "image.embed", width=10)}
    with pytest.raises(InputError, match=r"was trained on .*aaaaaaaaaaaa, the data holds .*bbbbbbbbbbbb"):
        trainer(tmp_path, 1).fit(module, datamodule=Data(sites={"image": Site("b" * 32, "image.embed", width=10)}))


def test_published_learning_rate_multipliers():
    """Effective multipliers of the VL-SAE script: 10 epochs, warm-up 2."""
    want = [0.5, 1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381, 0.0]
    for steps_per_epoch in (1, 7):
        got = [multiplier("paper", e * steps_per_epoch, 10 * steps_per_epoch, 0.2, 0.3, 0.01, 10) for e in range(10)]
        assert got == pytest.approx(want, abs=1e-4)


def test_schedules_warm_up_stay_and_fall():
    lr = [multiplier("linear", s, 100, 10, 0.3, 0.01, 0) for s in range(100)]
    assert lr[0] == pytest.approx(1 / 11) and lr[10] == lr[69] == 1.0 and lr[85] == pytest.approx(0.5)
    cos = [multiplier("cosine", s, 100, 0.1, 0.3, 0.01, 0) for s in range(101)]
    assert cos[10] == 1.0 and cos[100] == pytest.approx(0.01) and min(cos[10:]) >= 0.01
    with pytest.raises(InputError, match="schedule kind"):
        Schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1), kind="step")


def test_the_schedule_takes_its_length_from_the_trainer(tmp_path):
    module = lit(scheduler=lambda o: Schedule(o, warmup=0.5))
    t = trainer(tmp_path, 20)
    t.fit(module, datamodule=Data())
    assert t.lr_scheduler_configs[0].scheduler.total_steps == 20


def test_an_sae_of_one_modality_trains_on_pairs(tmp_path):
    module, data = LitSAE(SAE(ratio=4, modalities=["image"], selector=TopK(4))), Data()
    data.d_in = {"image": 10, "text": 8}
    data.x["text"] = data.x["text"][:, :8]
    t = trainer(tmp_path, 12, val_check_interval=10, check_val_every_n_epoch=None)
    t.fit(module, datamodule=data)
    assert {"val/fvu/image", "val/l0/image"} <= set(t.callback_metrics)
    assert not any("text" in k or "cosine/pair" in k for k in t.callback_metrics)
    assert module.usage.tokens.tolist() == [12 * 40]


def test_one_bound_says_when_a_latent_is_dead():
    assert lit().dead_after == 200 and lit(dead_after=200).dead_after == 200
    sae = SAE(8, 32, modalities=["image"])
    term = AuxK()
    assert LitSAE(sae, [Reconstruction(), term], dead_after=300).dead_after == 300 and term.dead_after == 300
    assert LitSAE(sae, [Reconstruction(), AuxK()]).dead_after == 1_000_000
    with pytest.raises(InputError, match=r"not 200 and 1,000: give model\.dead_after, not that of auxk"):
        lit(dead_after=1000)
    revive = PreActRevive()  # whatever acts on dead latents has the same bound
    sae = SAE(8, 32, modalities=["image"], selector=JumpReLU())
    assert LitSAE(sae, [AuxK(dead_after=70), revive]).dead_after == revive.dead_after == 70


@pytest.mark.parametrize(("steps", "known"), [(4, False), (8, True)])  # 40 rows a step
def test_a_run_shorter_than_the_bound_does_not_know_its_dead_latents(tmp_path, capsys, steps, known):
    module = lit()
    with torch.no_grad():  # a latent that cannot fire
        module.sae.build(10).encoder.bias[3] = -1e4
    module._allocate()
    trainer(tmp_path, steps, callbacks=[DeadLatentReport()], limit_val_batches=2).fit(module, datamodule=Data())
    report, said = json.loads((tmp_path / "latents.json").read_text()), capsys.readouterr().out
    assert report["dead_after"] == 200
    if known:
        assert 3 in report["dead"] and "dead latents (none of the last 200 tokens)" in said
    else:
        assert report["dead"] is None and "dead latents not known: 160 tokens were seen" in said


def test_the_share_that_never_fires_on_the_validation_rows_is_said(tmp_path, capsys):
    t = trainer(tmp_path, 10, callbacks=[DeadLatentReport()], val_check_interval=10, check_val_every_n_epoch=None)
    t.fit(lit(), datamodule=Data())
    share, said = float(t.callback_metrics["val/dead/text"]), capsys.readouterr().out
    assert f"{share:.1%} never fired on the text rows of the last validation" in said and "val/dead/image" in said


def test_fewer_rows_than_latents_are_said(tmp_path, capfd):
    args = ["fit", *SMALL, "--trainer.max_steps", "3", "--data.store", make_store(tmp_path / "store", n=50)]
    main([*args, "-c", RECIPE, "--trainer.default_root_dir", str(tmp_path / "few")])
    assert "45 image rows to train on, fewer than the 48 latents" in capfd.readouterr().out
    args[-1] = make_store(tmp_path / "more", n=60)
    main([*args, "-c", RECIPE, "--trainer.default_root_dir", str(tmp_path / "enough")])
    assert "fewer than" not in capfd.readouterr().out
