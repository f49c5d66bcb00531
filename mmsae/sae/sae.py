"""The sparse autoencoder: normalise -> encode -> select -> dictionary."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmsae import __version__
from mmsae.kernels import sparse_decode
from mmsae.kernels.precision import check_precision, no_autocast
from mmsae.remote.hub import hub_place
from mmsae.sae import folder as folder_format
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder, SAEEncoder
from mmsae.sae.normaliser import Normaliser
from mmsae.sae.part import Part
from mmsae.sae.precodes import PreCodes
from mmsae.sae.registry import composition, make_part, oddity
from mmsae.sae.saelens_fields import saelens_fields, unknown
from mmsae.sae.selector import AnyPreCodes, Pursued, SelectContext, Selector, TopK
from mmsae.sae.tensor_file import StoredTensor
from mmsae.types import Codes, InputError, SAEOutput, Site, Tokens


class SAE(nn.Module):
    """A sparse autoencoder over one or several modalities, composed of parts.

    Args:
        d_in: Width of the activations: one number, or one per modality (encoders per modality). None leaves the model
            unbuilt until :meth:`build`.
        d_sae: Number of latents.
        ratio: Instead of ``d_sae``: latents per input feature.
        modalities: Modality names; row order of buffers.
        normaliser: Input normalisation (default: none).
        encoder: Encoder (default: affine).
        selector: Selector (default: the 32 largest pre-codes of a row, or what a pursuit has chosen).
        dictionaries: ``{"shared": Dictionary}`` or one per modality (default: one shared, unit norm).
        precision: Of the encoder's product, by which latents are chosen: ``fp32``, ``tf32`` (on CUDA; elsewhere fp32)
            or ``bf16``. Default: by the device, ``tf32`` on CUDA and ``fp32`` elsewhere. It rounds the operands alone,
            so that near ties are chosen differently: weights, moments, sums, losses and the values of chosen latents
            are float32 always. Selectors that choose nothing (ReLU, JumpReLU in training) keep the product itself.

    Raises:
        InputError: Both or neither of ``d_sae`` and ``ratio``, dictionaries that do not fit the modalities, parts that
            do not go together, or a precision that there is not or that the encoder has no product for.
    """

    def __init__(
        self,
        d_in: int | dict[str, int] | None = None,
        d_sae: int | None = None,
        ratio: float | None = None,
        modalities: Sequence[str] = ("image", "text"),
        normaliser: Normaliser | None = None,
        encoder: SAEEncoder | None = None,
        selector: Selector | None = None,
        dictionaries: dict[str, Dictionary] | None = None,
        precision: str | None = None,
    ):
        super().__init__()
        self.modalities = tuple(modalities)
        self.normaliser = normaliser or Normaliser()
        self.encoder = encoder or AffineEncoder()
        self.selector = selector or (Pursued() if self.encoder.is_pursuit else TopK())
        self.dictionaries = nn.ModuleDict(dictionaries or {"shared": Dictionary()})
        keys = set(self.dictionaries)
        if keys != {"shared"} and keys != set(self.modalities):
            raise InputError(
                f"dictionaries must be 'shared' alone or one for each of {self.modalities}, not {sorted(keys)}"
            )
        if d_sae is not None and ratio is not None:
            raise InputError(f"give d_sae ({d_sae}) or ratio ({ratio}), not both")
        if self.encoder.is_pursuit and not isinstance(self.selector, Pursued):
            raise InputError(
                f"encoder {self.encoder.name!r} chooses its latents by itself: it takes no selector, and not "
                f"{self.selector.name!r}"
            )
        check_precision(precision)
        if precision not in (None, "fp32") and not self.encoder.takes_precision:
            raise InputError(f"encoder {self.encoder.name!r} computes in float32: it takes no precision {precision!r}")
        for part in self.parts().values():
            part.check(self)
        self.precision = precision
        self.d_sae, self.ratio = d_sae, ratio
        self.d_in: dict[str, int] = {}
        self.sites: dict[str, Site] = {}
        self.fresh = True  #: Whether the weights are those that build() drew, and a training has yet to begin.
        #: Where ranks share the latents: which are here, see :mod:`mmsae.sae.latent_shard`; ``d_sae`` is their number.
        self.shard: Any = None
        if d_in is not None:
            self.build(d_in)

    def build(self, d_in: int | Mapping[str, int], d_sae: int | None = None) -> SAE:
        """Size and initialise every part (draws from torch's global generator); returns self.

        ``d_in`` is one width, or one for each modality of the SAE (others are ignored); ``d_sae`` defaults to what the
        constructor was given.
        """
        widths = {m: d_in for m in self.modalities} if isinstance(d_in, int) else dict(d_in)
        if missing := set(self.modalities) - set(widths):
            raise InputError(f"d_in names {sorted(widths)}, the SAE also has {', '.join(sorted(missing))}")
        self.d_in = {m: widths[m] for m in self.modalities}
        d_sae = self.d_sae if d_sae is None else d_sae
        if d_sae is None:
            if self.ratio is None:
                raise InputError("give the number of latents: d_sae or ratio")
            d_sae = round(self.ratio * max(self.d_in.values()))
        if d_sae < 1:
            given = "" if self.ratio is None else f" (ratio {self.ratio:g} of width {max(self.d_in.values())})"
            raise InputError(f"an SAE needs at least 1 latent, not {d_sae}{given}")
        self.d_sae = d_sae
        for key, dictionary in self.dictionaries.items():
            widths = set(self.d_in.values()) if key == "shared" else {self.d_in[key]}
            if len(widths) != 1:
                raise InputError(f"a shared dictionary needs equal widths, not {self.d_in}")
            dictionary.build(widths.pop(), d_sae)
        self.normaliser.build(self.d_in)
        self.encoder.build(self.d_in, d_sae, self.dictionaries)
        self.selector.build(d_sae, self.modalities)
        self.fresh = True
        return self

    def parts(self) -> dict[str, Part]:
        """Every part by its slot; dictionaries as ``dictionaries.KEY``."""
        slots: dict[str, Part] = {n: getattr(self, n) for n in ("normaliser", "encoder", "selector")}
        return slots | {f"dictionaries.{key}": d for key, d in self.dictionaries.items()}

    def dictionary(self, modality: str) -> Dictionary:
        """The dictionary that decodes a modality."""
        return self.dictionaries["shared" if "shared" in self.dictionaries else modality]

    @property
    def signed(self) -> bool:
        """Whether code values may be negative; a latent has fired where its value is not 0, with either sign."""
        return self.selector.signed or getattr(self.encoder, "signed", False)

    def _modality(self, modality: str | None) -> str:
        if modality is None and len(self.modalities) == 1:
            return self.modalities[0]
        if modality not in self.modalities:
            raise InputError(f"modality must be one of {self.modalities}, not {modality!r}")
        return modality

    def _pre(self, x: Tensor, modality: str, grad: Tensor | None = None) -> tuple[AnyPreCodes, SelectContext, Any]:
        """Pre-codes of raw rows, what a selector may look at beside them, and what the normaliser divided by."""
        if x.dim() != 2 or x.shape[1] != self.d_in[modality]:
            raise InputError(
                f"{modality} activations have shape {tuple(x.shape)}; this SAE takes (N, {self.d_in[modality]})"
            )
        dictionary = self.dictionary(modality)
        target, info = self.normaliser(x.to(dictionary.like.dtype), modality)
        if grad is not None:
            grad = self.normaliser.gradient(grad.to(target.dtype), modality, info)
        pre = self.encoder(target, dictionary, modality)
        if isinstance(pre, PreCodes):
            pre.precision = self.precision
            if self.shard is not None and pre.centre is not None:
                pre.centre = self.shard.copied(pre.centre)
        return pre, SelectContext(modality, dictionary, target, grad), info

    def _encode(self, x: Mapping[str, Tensor], grad: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """``{modality: (normalised rows, pre-codes, codes)}`` of raw rows of every modality."""
        # half precision makes ties, and ties lose members of the top-k: select in the weights' own precision
        with no_autocast(next(iter(x.values()))):
            found = {m: self._pre(v, m, (grad or {}).get(m)) for m, v in x.items()}
            pres, rows = ({m: f[i] for m, f in found.items()} for i in (0, 1))
            selects = self.selector.select if self.shard is None else partial(self.shard.select, self.selector)
            chosen = selects(pres, rows)
        codes = {m: Codes(*chosen[m], self.d_sae, m, found[m][2]) for m in found}
        return {m: (rows[m].target, pres[m], codes[m]) for m in found}

    def encode(self, x: Tensor | np.ndarray, modality: str | None = None, finite: bool = True) -> Codes:
        """Codes of raw activations ``x (N, d_in)``, tensor or numpy.

        Args:
            x: The rows.
            modality: Which rows they are.
            finite: Whether rows that are not finite are refused: compared with thresholds they would have empty codes.
                Without it they are for the caller to find.

        Raises:
            InputError: A wrong width, no modality where the SAE has several, or rows that are not finite.
        """
        self._refuse_part()
        m = self._modality(modality)
        if isinstance(x, np.ndarray):  # copied only where torch cannot share it: a reversed view, a read-only map
            x = torch.from_numpy(np.require(x, requirements=["C", "W"]))
        if finite and not torch.isfinite(x.detach().sum(dtype=torch.float32)):  # far cheaper than asking every number
            bad = (~torch.isfinite(x).reshape(len(x), -1).all(1)).nonzero()[:, 0]
            if len(bad):
                raise InputError(
                    f"{len(bad):,} of {len(x):,} {m} rows to encode are not finite (NaN or infinite), the first is row "
                    f"{int(bad[0]):,}"
                )
        return self._encode({m: x.to(self.dictionary(m).like.device)})[m][2]

    def decode(self, codes: Codes, modality: str | None = None) -> Tensor:
        """``(N, d)`` reconstruction in the units of x, by the dictionary of ``modality`` (default: the codes' own).

        Raises:
            InputError: A per-row normaliser and codes without ``info``.
        """
        self._refuse_part()
        m = self._modality(modality or codes.modality)
        return self.normaliser.invert(self._decode(codes, m), m, codes.info)

    def _decode(self, codes: Codes, modality: str) -> Tensor:
        dictionary = self.dictionary(modality)
        with no_autocast(codes.values):
            if self.shard is None and codes.indices is not None:
                return sparse_decode(codes.values, codes.indices, dictionary.rows(), dictionary.bias)
            out = codes.decode_with(dictionary.rows())
            out = out if self.shard is None else self.shard.summed(out)
            return out if dictionary.bias is None else out + dictionary.bias

    def forward(self, tokens: Tokens | Mapping[str, Tensor]) -> dict[str, SAEOutput]:
        """Outputs for every modality in ``{modality: (N, d)}``, or for those of the SAE in a batch of a store.

        Raises:
            InputError: A modality that the SAE has not, tokens of none that it has, or in training one without rows.
        """
        grad = None
        if isinstance(tokens, Tokens):  # a one-modality SAE trains on one side of a paired store
            grad = tokens.grad
            tokens = {m: x for m, x in tokens.x.items() if m in self.modalities} or tokens.x
        if not tokens:
            raise InputError(f"no rows to code: give those of one or more of {self.modalities}")
        if self.training and (empty := [m for m, x in tokens.items() if not len(x)]):
            raise InputError(f"there are no {empty[0]} rows in this batch of a training: means over it do not exist")
        given = {self._modality(m): x for m, x in tokens.items()}
        # one modality after the other where they need not be chosen together: gradients then add up in that order
        like = next(iter(self.dictionaries.values())).like
        together = type(self.selector).select is not Selector.select or self.selector.in_one_pass(like)
        outputs = {}
        for part in [given] if together else [{m: x} for m, x in given.items()]:
            for m, (target, pre, codes) in self._encode(part, grad).items():
                recon = self._decode(codes, m)
                outputs[m] = SAEOutput(self.normaliser.invert(recon, m, codes.info), codes, target, recon, pre)
        return outputs

    def fit_normaliser(self, sample: Mapping[str, Tensor], like: Normaliser | None = None) -> None:
        """Fit the normaliser's statistics on ``{modality: (N, d) raw activations}``; once, before the first step.

        Where nothing centres, the decoders of an SAE that is not trained yet start at the mean (:meth:`start_at_`);
        parts that start from data see the normalised rows.

        Args:
            sample: The rows.
            like: An equal normaliser that was fitted on these very rows; its statistics are taken.
        """
        if like is None:
            self.normaliser.fit(sample)
        else:
            self.normaliser.load_state_dict(like.state_dict())
        if not self.fresh:
            return
        rows = {m: self.normaliser(sample[m].to(self.normaliser.mean(m)), m)[0] for m in self.modalities}
        for key, dictionary in self.dictionaries.items():  # first: encoders may start as they do
            dictionary.fit_(rows if key == "shared" else {key: rows[key]})
        if any(dictionary.from_rows for dictionary in self.dictionaries.values()):
            self.encoder.tie_(self.dictionaries)
        if not self.normaliser.centre:
            self.start_at_({m: self.normaliser.mean(m) for m in self.modalities})
        for part in (self.encoder, self.selector):
            part.fit_(rows)

    @torch.no_grad()
    def start_at_(self, means: Mapping[str, Tensor]) -> None:
        """Put decoders' biases at ``{modality: (d,) mean of the normalised rows}`` and have the encoder code the rest.

        With a bias of 0 and a large mean, latents whose atoms point away from the mean can never fire, nor can AuxK
        revive them, and those that point along it fire on every row.
        """
        means = {m: mean for m, mean in means.items() if self.dictionary(m).bias is not None}
        for key, dictionary in self.dictionaries.items():
            if own := [mean for m, mean in means.items() if key in ("shared", m)]:
                dictionary.bias.copy_(torch.stack(own).mean(0))
        if means:
            self.encoder.centre_(means)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fresh = False

    def project_(self) -> None:
        """Put every dictionary back on its constraint; after each optimiser step."""
        for d in self.dictionaries.values():
            d.project_()

    def after_step_(self, done: Container[Part] = ()) -> None:
        """What follows an optimiser step: dictionaries' constraints (:meth:`project_`) and the parts' controllers.

        Args:
            done: Dictionaries that the step itself kept on their constraint.
        """
        for part in self.parts().values():
            if part not in done:
                part.after_step_()

    def grow_(self, tokens: Tokens, outputs: Mapping[str, SAEOutput]) -> None:
        """Let dictionaries that take their atoms from the data see a training batch; others do nothing."""
        for m, out in outputs.items():
            if self.dictionary(m).grows:
                self.dictionary(m).grow_(tokens, out, m, self.encoder)

    def remove_parallel_grad_(self, left: Container[Part] = ()) -> None:
        """Keep gradients of constrained dictionaries tangent; after backward, before clipping.

        Args:
            left: Dictionaries whose gradients the optimiser makes tangent.
        """
        for d in self.dictionaries.values():
            if d not in left:
                d.remove_parallel_grad_()

    def attach(self, host: Any, allow_other_site: bool = False) -> list[Site]:
        """The sites at which ``host`` feeds this SAE, checked.

        An SAE without sites (imported from elsewhere) gets the host's default sites: the first attach names them.

        Raises:
            InputError: The SAE was trained on another host or on another width, unless ``allow_other_site`` (which
                does not excuse a width).
        """
        sites = self.sites or {m: s for m, s in host.default_sites().items() if m in self.modalities}
        for m, site in sites.items():
            if not allow_other_site:
                site.refuse_other(replace(site, host=host.fingerprint))
            if site.width != self.d_in[m]:
                raise InputError(f"site {site} does not fit this SAE, which takes width {self.d_in[m]} for {m}")
        if not self.sites:
            self.sites = dict(sites)
        return list(sites.values())

    def _refuse_part(self) -> None:
        if self.shard is not None:
            raise InputError(
                f"{self.shard.world} ranks share the {self.shard.d_sae:,} latents of this SAE while it is trained, and "
                f"{self.d_sae:,} are here: ask for the whole SAE (LatentShard.whole)"
            )

    # Files.

    def named_weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        """``{SAELens name: (weight, whether files hold it transposed)}``, modalities as suffixes (``W_dec.image``)."""
        out = self.encoder.weights()
        for key, dictionary in self.dictionaries.items():
            suffix = "" if key == "shared" else f".{key}"
            out |= {name + suffix: w for name, w in dictionary.weights().items()}
        return out

    def named_state(self) -> dict[str, Tensor]:
        """Buffers that change results, and what a selector has learned, by their names in the file."""
        state = {f"{slot}.{name}": b for slot, part in self.parts().items() for name, b in part.named_buffers()}
        return state | {f"selector.{name}": p for name, p in self.selector.named_parameters()}

    def config(self, training: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Contents of ``cfg.json``; its top level is a configuration of SAELens where that has the same model."""
        found = saelens_fields(self)
        top = found[0] if found else unknown(max(self.d_in.values()), self.d_sae)
        own = {"format": folder_format.FORMAT, "version": __version__, **composition(self)}
        own["precision"] = self.precision  # also None, which is by the device: a file without it means fp32
        own |= {"sites": {m: s.to_dict() for m, s in self.sites.items()}, "training": dict(training or {})}
        return top | {"mmsae": own}

    def save_pretrained(self, folder: str | Path, training: Mapping[str, Any] | None = None) -> Path:
        """Write configuration, weights, state and a model card; an existing SAE folder is replaced as a whole.

        Args:
            folder: Folder to write; see :mod:`mmsae.sae.folder`.
            training: JSON-able facts about the training data and run, kept in ``cfg.json``.

        Raises:
            InputError: The folder holds something else, which would be lost.
        """
        self._refuse_part()
        weights: dict[str, tuple[Tensor, bool]] = dict(self.named_weights())
        weights |= {name: (t, False) for name, t in found[1].items()} if (found := saelens_fields(self)) else {}
        return folder_format.write(folder, self.config(training), weights, self.named_state())

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "cpu", revision: str | None = None, subfolder: str | None = None
    ) -> SAE:
        """Load a folder that :meth:`save_pretrained` wrote; see :mod:`mmsae.sae.folder`.

        The SAE is frozen and in eval mode, so that its outputs are plain tensors; ``requires_grad_()`` trains it on.
        Weights are read block by block into the memory that they stay in.

        Args:
            path: A folder; a place on the hub, ``OWNER/NAME``, ``OWNER/NAME@REVISION/FOLDER`` or
                ``hf://OWNER/NAME/FOLDER``; or the URL of a folder, as ``s3://BUCKET/FOLDER``.
            device: Where to.
            revision: Branch, tag or commit of a hub id.
            subfolder: Folder within it.

        Raises:
            InputError: No SAE there, a newer format, an unknown part, or tensors that do not fit the config.
        """
        folder, block = folder_format.read_config(path, revision, subfolder)
        parts = [(slot, block[slot]) for slot in ("normaliser", "encoder", "selector")]
        parts += [("dictionary", d) for d in block["dictionaries"].values()]
        if odd := [f"{slot}: {odd}" for slot, config in parts if (odd := oddity(slot, config))]:
            raise InputError(f"{folder / folder_format.CFG} is not what mmsae writes: {odd[0]}")
        sae = cls(
            modalities=block["modalities"],
            normaliser=make_part("normaliser", block["normaliser"]),
            encoder=make_part("encoder", block["encoder"]),
            selector=make_part("selector", block["selector"]),
            dictionaries={k: make_part("dictionary", d) for k, d in block["dictionaries"].items()},
            precision=block.get("precision", "fp32"),
        )
        with torch.device("meta"):  # sizes alone: nothing is drawn, and every weight is in memory once
            sae.build(block["d_in"], block["d_sae"])
        sae.sites = {m: Site(**s) for m, s in block["sites"].items()}
        sae.to_empty(device=device)
        sae.fill_(folder_format.tensors_of(folder, block), folder / folder_format.WEIGHTS)
        return sae.eval().requires_grad_(False)

    @torch.no_grad()
    def fill_(self, tensors: Mapping[str, Tensor] | Mapping[str, StoredTensor], source: Any) -> None:
        """Set all weights and state of a built SAE from tensors by their names in files.

        Raises:
            InputError: Missing, superfluous or differently shaped tensors; ``source`` is where they are from.
        """
        targets = self.named_weights() | {n: (b, False) for n, b in self.named_state().items()}
        if set(targets) != set(tensors):
            odd = sorted(set(targets) ^ set(tensors))
            raise InputError(f"{source} and {folder_format.CFG} disagree about tensors {odd}")
        for name, (target, turned) in targets.items():
            value, view = tensors[name], target.t() if turned else target
            if tuple(value.shape) != tuple(view.shape):
                raise InputError(
                    f"{name} in {source} has shape {tuple(value.shape)}, {folder_format.CFG} says {tuple(view.shape)}"
                )
            if isinstance(value, Tensor):
                view.copy_(value)
            else:
                value.copy_to(view)
        for part in self.parts().values():
            part.loaded_()
        self.fresh = False

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Save to a temporary folder and upload it to the hub; returns the repository's address.

        ``mmsae push`` uploads a folder that is saved, with the figures of an evaluation in its card.

        Args:
            repo_id: ``OWNER/NAME``; it is made if it is not there.
            private: Whether a repository that is made is private.
            token: Default: huggingface_hub's own.
            revision: Branch; it is made if it is not there.
            subfolder: Folder in the repository.

        Raises:
            InputError: No name of a repository, or a hub that does not take it.
        """
        place = hub_place(repo_id, revision, subfolder)
        if place is None:
            raise InputError(f"{repo_id!r} is no name of a repository on the hub, which is OWNER/NAME")
        with tempfile.TemporaryDirectory() as temp:
            folder = self.save_pretrained(Path(temp) / "sae")
            return folder_format.push(folder, place, private=private, token=token)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, modalities={self.modalities}"


def fit_rows(batches: Iterable[Tokens], rows: int) -> dict[str, Tensor]:
    """The first ``rows`` rows of every modality of a stream (bounded memory), for :meth:`SAE.fit_normaliser`."""
    parts: dict[str, list[Tensor]] = {}
    have: dict[str, int] = {}
    for tokens in batches:
        for m, x in tokens.x.items():
            parts.setdefault(m, []).append(x[: max(0, rows - have.get(m, 0))].detach())
            have[m] = have.get(m, 0) + len(parts[m][-1])
        if have and min(have.values()) >= rows:
            break
    return {m: torch.cat(p) for m, p in parts.items()}
