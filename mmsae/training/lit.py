"""The LightningModule around an SAE: losses, usage tracking, projection inside the step, validation metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from mmsae.kernels.choice import described
from mmsae.kernels.precision import effective
from mmsae.metrics.validation import ValidationMetrics
from mmsae.sae import SAE, AuxK, LossContext, LossTerm, Reconstruction, UsageTracker, fit_rows, total
from mmsae.sae.latent_shard import share_latents_
from mmsae.sae.normaliser import Normaliser, all_reduce
from mmsae.sae.usage import DEAD_AFTER
from mmsae.training.adam import kept_by, with_atoms
from mmsae.training.freeze import Freeze
from mmsae.training.resume import check, recipe
from mmsae.training.schedule import Schedule
from mmsae.types import InputError, SAEOutput, SideBySide, Tokens

LOOKED_EVERY = 1000  #: Steps after which it is asked whether all was finite, where nothing is logged or saved before.


class NotFinite(InputError):
    """A training that cannot go on: rows, a loss or weights are no longer finite.

    Attributes:
        stopped: ``{name: why}`` of members, where several are trained.
        good: ``{name: step}`` after which those are kept.
    """

    stopped: Mapping[str, str] = {}
    good: Mapping[str, int] = {}


def _adam(params) -> Optimizer:
    return torch.optim.Adam(params, lr=1e-3, fused=True)


class LitSAE(pl.LightningModule):
    """Trains an SAE on batches of :class:`mmsae.types.Tokens`.

    Widths come from the datamodule: an unbuilt SAE is built in ``setup``. The normaliser is fitted in one pass before
    step 0 and never again. Dictionary constraints are part of the step: gradients are made tangent before clipping,
    atoms renormalised right after the optimiser, so every checkpoint holds valid atoms.

    Args:
        sae: The model, built or unbuilt.
        losses: Loss terms; their sum is minimised.
        optimizer: Called with the parameters.
        scheduler: Called with the optimiser; stepped once a step. ``none`` keeps the rate constant.
        normaliser_rows: Rows of each modality and rank that the normaliser is fitted on.
        dead_after: Tokens without firing on any modality after which a latent counts as dead, for loss terms like AuxK,
            in the log and in ``latents.json``. Default: what a term was given, else 1,000,000.
        freeze: Makes a control of the same recipe (arXiv 2602.14111): ``decoder``, ``soft_decoder`` or ``encoder``
            stays as random as it began (:class:`mmsae.training.freeze.Freeze`); empty: everything is trained.

    Raises:
        InputError: A term was given another ``dead_after``, or a term and the SAE do not go together.
    """

    def __init__(
        self,
        sae: SAE,
        losses: Sequence[LossTerm] | None = None,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] = _adam,
        scheduler: Callable[[Optimizer], Schedule] | None = Schedule,
        normaliser_rows: int = 32_768,
        dead_after: int | None = None,
        freeze: str = "",
    ):
        super().__init__()
        self.sae = sae.requires_grad_(True)  # loaded SAEs are frozen
        self.losses = nn.ModuleList(losses or [Reconstruction()])
        for term in self.losses:
            term.check(sae)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.normaliser_rows, self.dead_after = normaliser_rows, self._one_bound(dead_after)
        self.seed: int | None = None  # that the initial weights were drawn from, where the command line knows
        self.total_steps: int | None = None
        self.recipe: dict[str, Any] | None = None
        self.going_on: dict[str, Any] | None = None  # what a checkpoint says about its run
        self.usage: UsageTracker | None = None
        self.validation: ValidationMetrics | None = None
        self.kept = Freeze(freeze)
        self._in_step = kept_by(None)
        self.member = ""  # its name, where it is one of several that are trained on the same batches
        # of each step since the last look: its number, and sums that are not finite where something was not
        self._sums: dict[str, list[Tensor]] = {}
        self._steps: list[int] = []
        if sae.d_in:
            self._allocate()

    def each(self) -> dict[str, LitSAE]:
        """The SAEs that this module trains, by name: this one, which has none."""
        return {self.member: self}

    def _one_bound(self, dead_after: int | None) -> int:
        terms = [t for t in self.losses if hasattr(t, "dead_after")]
        given = {n for n in (dead_after, *(t.dead_after for t in terms)) if n is not None}
        if len(given) > 1:
            numbers = " and ".join(f"{n:,}" for n in sorted(given))
            raise InputError(
                f"a latent counts as dead after one number of tokens, not {numbers}: give model.dead_after, not that "
                f"of {', '.join(t.name for t in terms)}"
            )
        bound = given.pop() if given else DEAD_AFTER
        for term in terms:
            term.dead_after = bound
        return bound

    def _allocate(self) -> None:
        shard = self.sae.shard
        self.usage = UsageTracker(self.sae.d_sae, self.sae.modalities, apart=shard is not None)
        d_sae, d_in = (shard or self.sae).d_sae, self.sae.d_in
        self.validation = ValidationMetrics(self.sae.modalities, d_in, d_sae, over_ranks=shard is None)
        for term in self.losses:
            term.build(self.sae)
        self.kept.build(self.sae)

    def setup(self, stage: str) -> None:
        """Size the SAE from the datamodule, or check that it fits."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            mixed = self.trainer.precision.replace("true", "mixed")
            raise InputError(
                f"precision {self.trainer.precision} keeps the weights in half precision, where small updates are lost "
                f"and equal pre-codes make top-k arbitrary: use {mixed} or 32-true"
            )
        data = getattr(self.trainer, "datamodule", None)
        widths: dict[str, int] = {}
        if data is not None:
            given = data.d_in if isinstance(data.d_in, dict) else dict.fromkeys(self.sae.modalities, data.d_in)
            widths = {m: given[m] for m in self.sae.modalities if m in given}
        if not self.sae.d_in:
            if data is None:
                raise InputError("the SAE has no d_in and the trainer no datamodule to take it from")
            self.sae.build(widths)
            self._allocate()
        # Every buffer is the same on all ranks already: fitted or counted over all of them. DDP would send rank 0's in
        # every forward, in validation too, where ranks may have different numbers of batches: they would wait forever.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        if self.trainer.world_size > 1 and not list(self.sae.parameters()):
            raise InputError(
                f"this SAE has nothing to train, its dictionary grows from the data in one process, not "
                f"{self.trainer.world_size}: use trainer.devices 1"
            )
        if self.recipe is None:
            self.recipe = recipe(self)
        if getattr(self.trainer.strategy, "shares_latents", False) and self.sae.shard is None:
            self._share_latents(stage)
        if data is None:
            return
        for m in self.sae.modalities:
            if widths.get(m) != self.sae.d_in[m]:
                raise InputError(
                    f"the data has {m} activations of width {widths.get(m)}, the SAE takes {self.sae.d_in[m]}"
                )
        sites = {m: s for m, s in getattr(data, "sites", {}).items() if m in self.sae.modalities}
        for m, site in self.sae.sites.items():
            if m in sites and not site.same(sites[m]):
                raise InputError(f"the SAE was trained on {site}, the data holds {sites[m]}")
        self.sae.sites = self.sae.sites or sites
        self.recipe |= {f"sites.{m}": str(site) for m, site in self.sae.sites.items()}

    def _share_latents(self, stage: str) -> None:
        """Keep this rank's latents alone (:class:`mmsae.training.LatentParallel`)."""
        if stage != "fit":
            raise InputError("latents are shared among ranks in fit alone: its checkpoints are those of one device")
        if self.member:
            raise InputError("several SAEs from one pass cannot share their latents among ranks: train them one by one")
        if odd := [t.name for t in self.losses if type(t) not in (Reconstruction, AuxK)]:
            raise InputError(
                f"loss {odd[0]!r} reads whole codes: ranks that share the latents take reconstruction and auxk"
            )
        if self.kept.what:
            raise InputError(f"freeze {self.kept.what!r} does not know ranks that share the latents")
        share_latents_(self.sae)
        self._allocate()

    def latent_axes(self) -> dict[str, int]:
        """``{name in the state dict: axis}`` of what has an entry for each latent, where ranks share them."""
        own = {f"sae.{name}": axis for name, axis in self.sae.shard.axes.items()}
        return own | {"usage.since": 1, "usage.counts": 1}

    def whole(self) -> SAE | None:
        """The SAE; where ranks share its latents, rank 0 has that of all, the others None, and every rank must ask."""
        return self.sae if self.sae.shard is None else self.sae.shard.whole(self.sae)

    def whole_usage(self) -> UsageTracker | None:
        """The counts of :meth:`whole`'s latents, likewise."""
        return self.usage if self.sae.shard is None else self.sae.shard.whole_usage(self.usage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint is one of this run (see :mod:`mmsae.training.resume`), or at least of this model."""
        if members := checkpoint.get("mmsae", {}).get("members"):
            raise InputError(f"the checkpoint is of the members {', '.join(members)}, this run trains one SAE")
        own, saved = self.state_dict(), checkpoint["state_dict"]
        odd = sorted(set(own) ^ set(saved))
        if odd:
            whose = "checkpoint" if odd[0] in saved else "recipe"
            raise InputError(f"the checkpoint is of another recipe: only the {whose} has {odd[0]}")
        for name, value in saved.items():
            if own[name].shape != value.shape:
                raise InputError(
                    f"the checkpoint is of another recipe: its {name} has shape {tuple(value.shape)}, "
                    f"this run's {tuple(own[name].shape)}"
                )
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        self.going_on = checkpoint.get("mmsae", {}) | {"step": checkpoint["global_step"]}
        # checkpoints of earlier versions hold no options, but k is a buffer
        known = {"sae.selector.k": int(saved["sae.selector.k_"])} if "sae.selector.k_" in saved else {}
        check(self.going_on.get("recipe", known), self.recipe, fitting)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the run was asked for, to compare with whoever goes on with it.

        Raises:
            NotFinite: Rows, loss or weights are no longer finite: the checkpoint before stays the last one.
        """
        checkpoint["mmsae"] = {"recipe": self.recipe, "total_steps": self.total_steps}
        self.refuse_not_finite({name: p.detach().sum() for name, p in self.sae.named_parameters()})

    def transfer_batch_to_device(self, batch: Tokens | SideBySide, device: torch.device, dataloader_idx: int) -> Tokens:
        """Nothing where the activations are there already; Lightning's walk over the batch takes a tenth of a step."""
        if batch.on(device):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_fit_start(self) -> None:
        """Fit the normaliser unless a checkpoint brought it."""
        if not self.sae.normaliser.fitted:
            self.start_on(fit_rows(self.trainer.datamodule.train_dataloader(), self.normaliser_rows))

    def start_on(self, sample: Mapping[str, Tensor], like: Normaliser | None = None) -> None:
        """Fit what is fitted on ``{modality: (N, d) rows}`` before the first step; see :meth:`SAE.fit_normaliser`."""
        self.sae.fit_normaliser(sample, like)
        self.kept.start_(self.sae)

    def on_train_start(self) -> None:
        """Remember the length of the training, which ramps need."""
        self.total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        self._said = False
        like = next(iter(self.sae.dictionaries.values())).like
        product = effective(self.sae.precision, like)
        said = f"kernels: {described(like.device)}; the encoder's product is of {product}"
        self._say(said + "; one steps atoms (tangent gradient, Adam, norm)" if self._in_step.unit else said)
        if self.going_on is None:
            return
        said = f"going on after step {self.going_on['step']:,}"
        total = self.going_on.get("total_steps", self.total_steps)
        if total != self.total_steps:
            said += f"; the training has {self.total_steps:,} steps now, not {total:,}: schedule and ramps follow that"
        if "recipe" not in self.going_on:
            said += "; the checkpoint of an earlier version does not say its options: its k and optimiser are kept"
        self._say(said)

    def _say(self, text: str) -> None:
        if self.member:
            self.trainer.lightning_module.note(self.member, text)
        else:
            rank_zero_info(text)

    def _say_what_is_too_short(self, rows: dict[str, int]) -> None:
        """A run too short for the bound of dead latents, or with too few rows for them; nothing else would tell."""
        self._said = True
        shares = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
        seen = {m: n * shares["num_replicas"] * self.total_steps for m, n in rows.items()}
        tokens = max(seen.values())
        idle = [t.name for t in self.losses if hasattr(t, "dead_after") and t.coefficient]
        if self.dead_after >= tokens and idle:
            self._say(
                f"{' and '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing in this run: latents count as dead "
                f"after {self.dead_after:,} tokens, the run has about {tokens:,}; lower model.dead_after"
            )
        held = getattr(self.trainer.train_dataloader, "n_rows", {})  # of a store; a stream has no end
        m, n = max(((m, min(n, held.get(m, n))) for m, n in seen.items()), key=lambda pair: pair[1])
        d_sae = (self.sae.shard or self.sae).d_sae
        if n < d_sae:
            self._say(
                f"warning: {n:,} {m} rows to train on, fewer than the {d_sae:,} latents, which can learn them "
                "by heart: trust val/fvu, not train/fvu, and take fewer latents or more data"
            )

    def forward(self, batch: Tokens) -> dict[str, SAEOutput]:
        """Outputs for the modalities of the SAE; a store may hold others too."""
        return self.sae(batch._replace(x={m: batch.x[m] for m in self.sae.modalities}))

    def training_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        outputs = self(batch)
        step = self.global_step
        ctx = LossContext(self.sae, self.usage, step / self.total_steps, step, self.seed or 0)
        terms = {term.name: term(outputs, ctx) for term in self.losses}
        loss = total(list(terms.values()))
        if not self._said:
            self._say_what_is_too_short({m: out.codes.n for m, out in outputs.items()})
        self.usage.update({m: out.codes for m, out in outputs.items()})
        self.sae.grow_(batch, outputs)
        for m, out in outputs.items():
            self._sums.setdefault(m, []).append(out.target.detach().sum())
        self._sums.setdefault("", []).append(loss.detach())
        self._steps.append(step + 1)
        if (step + 1) % self.trainer.log_every_n_steps == 0:
            looked = {f"reconstruction of {m}": out.recon.sum() for m, out in outputs.items()}
            self.refuse_not_finite(looked | {f"loss {name}": v for name, v in terms.items()})
            self._log_training(outputs, terms, loss, next(iter(outputs.values())).codes.n)
        elif len(self._steps) == LOOKED_EVERY:
            self.refuse_not_finite()
        return loss

    @torch.no_grad()
    def refuse_not_finite(self, looked: Mapping[str, Tensor] = {}) -> None:
        """Stop all ranks where rows or a loss since the last look, or what is looked at now, are not finite.

        What steps leave for it costs them no wait; here the host waits, when something is logged or saved anyway.

        Raises:
            NotFinite: It names the step and the modality, or what diverged.
        """
        if not self._steps and not looked:
            return
        if not self._steps:  # logged in this very step, which then changed the weights
            self._steps.append(self.global_step)
        steps = torch.tensor(self._steps, device=[*self._sums.get("", ()), *looked.values()][0].device)
        never = torch.iinfo(torch.long).max
        first = {m: torch.where(torch.stack(v).isfinite(), never, steps).min() for m, v in self._sums.items()}
        now = {name: torch.where(v.detach().isfinite(), never, steps[-1]) for name, v in looked.items()}
        found = torch.stack([*first.values(), *now.values()])
        all_reduce(found, op="min")
        at = {name: n for name, n in zip([*first, *now], found.tolist(), strict=True) if n < never}
        step = self._steps[-1]
        self._sums.clear()
        self._steps.clear()
        if not at:
            return
        when = at.pop("", step)
        rows = {m: n for m, n in at.items() if m in first}
        if rows:
            which = " and ".join(f"{m} rows of step {n:,}" for m, n in rows.items())
            raise NotFinite(
                f"stopped in step {step:,}: {which} are not finite (NaN or infinite): check the host's activations"
            )
        raise NotFinite(
            f"stopped in step {step:,}: the training diverged in step {when:,}, {', '.join(at) or 'its loss'} is no "
            "longer finite though all rows are: lower the learning rate"
        )

    @torch.no_grad()
    def _log_training(self, outputs, terms, loss, rows: int) -> None:
        values = {"train/loss": loss, **{f"train/{name}": v for name, v in terms.items()}}
        self.log_dict(values, batch_size=rows)
        bar, known, shard = {}, self.usage.known(self.dead_after), self.sae.shard
        for m, out in outputs.items():
            error = (out.target - out.recon).square().sum(1).mean()
            bar[f"fvu/{m}"] = error / self.sae.normaliser.variance(m)
            bar[f"l0/{m}"] = out.codes.l0().float().mean()
            if known:
                bar[f"dead/{m}"] = self.usage.dead(self.dead_after, m).float().mean()
            if shard is not None:
                bar[f"l0/{m}"] = shard.total(bar[f"l0/{m}"])
                if known:
                    bar[f"dead/{m}"] = shard.total(bar[f"dead/{m}"]) / shard.world
        self.log_dict(bar, prog_bar=True, batch_size=rows)

    def validation_step(self, batch: Tokens, batch_idx: int) -> None:
        outputs = self(batch)
        if self.sae.shard is not None:
            outputs = {m: out._replace(codes=self.sae.shard.codes(out.codes)) for m, out in outputs.items()}
        self.validation.update(batch, outputs)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        report = {f"{stage}/{name}": float(v) for name, v in self.validation.compute().items()}
        self.validation.reset()
        # computed from states that are summed over ranks, so the value is the same everywhere
        self.log_dict(report, sync_dist=False, batch_size=1)
        said = "  ".join(f"{k} {v:.4g}" for k, v in report.items() if re.search("fvu|cosine|dead", k))
        self.print(f"{self.member}: {said}" if self.member else said)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log; one of several says its figures to the module that Lightning trains, which puts its name to them."""
        if self.member:
            self.trainer.lightning_module.log_member(self.member, dictionary, *args, **kwargs)
        else:
            super().log_dict(dictionary, *args, **kwargs)

    def predict_step(self, batch: Tokens, batch_idx: int) -> dict:
        """Codes of a batch, ``{modality: Codes}``."""
        return {m: out.codes for m, out in self(batch).items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make gradients tangent; Lightning clips after this hook."""
        self.sae.remove_parallel_grad_(self._in_step.tangent)

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, then put the dictionaries back on their constraint and let the parts' controllers act."""
        super().optimizer_step(*args, **kwargs)
        self.after_step_()

    def after_step_(self) -> None:
        """What follows a step of the optimiser."""
        self.sae.after_step_(self._in_step.unit)
        self.kept.after_step_(self.sae)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing where there is nothing to train: a growing dictionary has no parameters."""
        if loss.requires_grad:
            super().backward(loss, *args, **kwargs)

    def configure_optimizers(self):
        if not list(self.sae.parameters()):
            return None
        optimizer = self.make_optimizer(list(self.sae.parameters()))
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:  # it may leave a step out, on the device
            if self.trainer.gradient_clip_val and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise InputError(
                    f"precision {self.trainer.precision} scales gradients and a fused optimizer undoes that in its "
                    "step, after trainer.gradient_clip_val: give the optimizer fused false, or use bf16-mixed"
                )
        else:
            optimizer._step_supports_amp_scaling = False  # by which Lightning refuses to clip, also without a scaler
            optimizer = with_atoms(optimizer, self.sae, tangent=not self.trainer.gradient_clip_val)
        self._in_step = kept_by(optimizer)
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if hasattr(scheduler, "set_total_steps"):
            scheduler.set_total_steps(max(1, int(self.trainer.estimated_stepping_batches)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
