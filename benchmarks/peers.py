"""The training steps and codes of other libraries, each by its own functions; one that is absent or broken says so.

    pip install "mmsae[peers]"

Models start from the same weights, and are asked for the same formula where they have options for it. A library's own
constraint on its dictionary is part of its step; clipping, schedules, and counting outside of its loss are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.measure import first_line
from benchmarks.methods import AUXK, PREFIXES, Contender, Problem, Rows

LONG_AGO = 10_000_000  # tokens, after which dictionary-learning counts a latent as dead


@contextmanager
def _what_matplotlib_dropped() -> Iterator[None]:
    """What overcomplete 0.3.0 asks for when it is imported: ``matplotlib.cm.get_cmap``, which is gone since 3.9."""
    from matplotlib import cm, colormaps

    missing = not hasattr(cm, "get_cmap")
    if missing:
        cm.get_cmap = colormaps.get_cmap
    try:
        yield
    finally:
        if missing:
            del cm.get_cmap


def load(module: str) -> Any:
    """A peer's module.

    Raises:
        ImportError: It is absent, or does not go with what is installed beside it; it says which.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    if not torch.cuda.is_available():  # sparsify's decoder is Triton's wherever that is installed, also on a CPU
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    try:
        with _what_matplotlib_dropped():
            return import_module(module)
    except Exception as error:  # a library that does not go with this torch may fail in any way
        raise ImportError(first_line(error)) from error


class Peer(Contender):
    """Base of other libraries' contenders."""

    precision = "tf32"  # what their users set on a GPU; on a CPU it is fp32
    methods: ClassVar[tuple[str, ...]] = ()

    def one(self, x: Rows) -> Tensor:
        """The rows of the one modality that they know."""
        (rows,) = x.values()
        return rows

    def auxk_coefficient(self, x: Tensor) -> float:
        """Of the dead latents' summed squared error, mean over rows, which the formula divides by a variance."""
        if "auxk" not in self.problem.method:
            return 0.0
        w = self.problem.weights(self.device)
        with torch.no_grad():
            top = (x @ w["W_enc"].T + w["b_enc"]).topk(self.problem.k)
            recon = torch.stack([v @ w["W_dec"][i] for v, i in zip(top.values.relu(), top.indices, strict=True)])
            residual = x - recon
            return float(AUXK / (residual - residual.mean(0)).square().sum(1).mean())


class Sparsify(Peer):
    """EleutherAI's, with its trainer's step and fused Adam; its forward pass is under bf16 autocast on CUDA."""

    name = "sparsify"
    methods = ("topk", "topk_auxk")

    def build(self) -> None:
        load("sparsify")
        coder, config = import_module("sparsify.sparse_coder"), import_module("sparsify.config")
        p = self.problem
        cfg = config.SparseCoderConfig(num_latents=p.d_sae, k=p.k)
        self.model = coder.SparseCoder(p.d, cfg, self.device, dtype=torch.float32)
        self.coefficient = self.auxk_coefficient(self.one(p.rows(self.device, min(256, p.batch))))

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        m = self.model
        found = {"W_enc": m.encoder.weight, "b_enc": m.encoder.bias, "W_dec": m.W_dec, "b_dec": m.b_dec}
        return {name: (w, False) for name, w in found.items()}

    def unit(self, x: Rows) -> float:
        v = self.one(x)
        return float((v - v.mean(0)).pow(2).sum() / len(v))

    def loss(self, x: Rows) -> Tensor:
        v = self.one(x)
        self.model.set_decoder_norm_to_unit_norm()
        if not self.coefficient:
            return self.model(v).fvu
        out = self.model(v, dead_mask=self.dead)
        return out.fvu + self.coefficient * out.auxk_loss

    def tangent(self) -> None:
        self.model.remove_gradient_parallel_to_decoder_directions()

    def encode(self, x: Tensor) -> Any:
        return self.model.encode(x)

    def decode(self, codes: Any) -> Tensor:
        return self.model.decode(codes.top_acts, codes.top_indices)

    def dense(self, codes: Any) -> Tensor:
        return torch.zeros_like(codes.pre_acts).scatter(1, codes.top_indices, codes.top_acts)


class DictionaryLearning(Peer):
    """Its trainers' losses, projection of gradients and renormalisation, with fused Adam."""

    name = "dictionary-learning"
    methods = ("topk", "topk_auxk", "batch_topk", "matryoshka")
    trainers: ClassVar[dict[str, tuple[str, str]]] = {
        "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    }

    def build(self) -> None:
        load("dictionary_learning")
        p = self.problem
        module, name = self.trainers.get(p.method, ("top_k", "TopKTrainer"))
        more: dict[str, Any] = {}
        if p.method == "matryoshka":
            ends = (0.0, *PREFIXES, 1.0)
            shares = [b - a for a, b in pairwise(ends)]
            more = {"group_fractions": shares, "group_weights": [1.0] * len(shares)}
        self.own = import_module(f"dictionary_learning.trainers.{module}")
        self.trainer = getattr(self.own, name)(
            steps=10_000,
            activation_dim=p.d,
            dict_size=p.d_sae,
            k=p.k,
            layer=0,
            lm_name="none",
            auxk_alpha=AUXK if p.method == "topk_auxk" else 0.0,
            device=self.device,
            **more,
        )
        self.model = self.trainer.ae
        self.since = LONG_AGO * self.dead.long() * (p.method == "topk_auxk")

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        m = self.model
        if self.problem.method == "matryoshka":
            found = {"W_enc": (m.W_enc, True), "b_enc": (m.b_enc, False), "W_dec": (m.W_dec, False)}
        else:
            found = {"W_enc": (m.encoder.weight, False), "b_enc": (m.encoder.bias, False)}
            found["W_dec"] = (m.decoder.weight, True)
        return found | {"b_dec": (m.b_dec, False)}

    def loss(self, x: Rows) -> Tensor:
        self.trainer.num_tokens_since_fired = self.since.clone()
        return self.trainer.loss(self.one(x), step=0)

    @torch.no_grad()
    def tangent(self) -> None:
        w, transposed = self.weights()["W_dec"]
        p, remove = self.problem, self.own.remove_gradient_parallel_to_decoder_directions
        if transposed:  # a linear layer's
            w.grad = remove(w, w.grad, p.d, p.d_sae)
        else:
            w.grad = remove(w.T, w.grad.T, p.d, p.d_sae).T

    @torch.no_grad()
    def project(self) -> None:
        w, transposed = self.weights()["W_dec"]
        p, unit = self.problem, self.own.set_decoder_norm_to_unit_norm
        w.data = unit(w, p.d, p.d_sae) if transposed else unit(w.T, p.d, p.d_sae).T

    def encode(self, x: Tensor) -> Tensor:
        return self.model.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


class SAELens(Peer):
    """Its training forward pass, with fused Adam; it has no constraint on the decoder."""

    name = "sae-lens"
    methods = ("topk", "topk_auxk", "batch_topk", "matryoshka", "mp")
    sparse = False
    kinds: ClassVar[dict[str, tuple[str, str]]] = {
        "batch_topk": ("batchtopk_sae", "BatchTopK"),
        "matryoshka": ("matryoshka_batchtopk_sae", "MatryoshkaBatchTopK"),
        "mp": ("matching_pursuit_sae", "MatchingPursuit"),
    }

    def build(self) -> None:
        load("sae_lens")
        p = self.problem
        module, kind = self.kinds.get(p.method, ("topk_sae", "TopK"))
        own = import_module(f"sae_lens.saes.{module}")
        sizes = {"d_in": p.d, "d_sae": p.d_sae, "device": self.device}
        if p.method == "mp":
            more = {"max_iterations": p.k, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
            more["decoder_init_norm"] = 1.0
        else:
            coefficient = self.auxk_coefficient(self.one(p.rows(self.device, min(256, p.batch))))
            more = {"k": p.k, "aux_loss_coefficient": coefficient, "use_sparse_activations": self.sparse}
            more["rescale_acts_by_decoder_norm"] = False
        if p.method == "matryoshka":
            more["matryoshka_widths"] = [round(s * p.d_sae) for s in (*PREFIXES, 1.0)]
        self.model = getattr(own, f"{kind}TrainingSAE")(getattr(own, f"{kind}TrainingSAEConfig")(**sizes, **more))
        self.input = import_module("sae_lens.saes.sae").TrainStepInput

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        m = self.model
        found = {"W_dec": (m.W_dec, False), "b_dec": (m.b_dec, False)}
        return found if self.problem.method == "mp" else found | {"W_enc": (m.W_enc, True), "b_enc": (m.b_enc, False)}

    def unit(self, x: Rows) -> float:
        return 1 / (len(PREFIXES) + 1) if self.problem.method == "matryoshka" else 1.0

    def loss(self, x: Rows) -> Tensor:
        dead = self.dead if self.problem.method == "topk_auxk" else None
        return self.model.training_forward_pass(self.input(self.one(x), {}, dead, 0, False)).loss

    def encode(self, x: Tensor) -> Tensor:
        return self.model.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)

    def dense(self, codes: Tensor) -> Tensor:
        return codes.to_dense() if codes.is_sparse else codes


class SAELensSparse(SAELens):
    """The same with its option of sparse activations."""

    name = "sae-lens, sparse"
    methods = ("topk", "topk_auxk")
    precision = "fp32"  # its own warning: not under autocast
    sparse = True


class Overcomplete(Peer):
    """Its models and the mean squared error, with fused Adam; it has no decoder bias and no AuxK of dead latents."""

    name = "overcomplete"
    methods = ("topk", "batch_topk", "mp")

    def build(self) -> None:
        sae = load("overcomplete.sae")
        p = self.problem
        if p.method == "mp":
            self.model = sae.MpSAE(p.d, p.d_sae, k=p.k, device=self.device)
        else:
            kind = sae.BatchTopKSAE if p.method == "batch_topk" else sae.TopKSAE
            self.model = kind(p.d, p.d_sae, top_k=p.k, device=self.device).untied(bias=True)
        self.model.train()

    def weights(self) -> dict[str, tuple[nn.Parameter, bool]]:
        found = {"W_dec": (self.model.dictionary._weights, False)}
        if self.problem.method == "mp":
            return found
        return found | {"W_enc": (self.model.encoder.weight, False), "b_enc": (self.model.encoder.bias, False)}

    def unit(self, x: Rows) -> float:
        return float(self.problem.d)

    def loss(self, x: Rows) -> Tensor:
        v = self.one(x)
        if self.problem.method == "batch_topk":
            self.model.top_k = self.problem.k * len(v)
        _, _, x_hat = self.model(v)
        return (v - x_hat).square().mean()

    def encode(self, x: Tensor) -> Tensor:
        return self.model.encode(x)[1]

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


ALL: tuple[type[Peer], ...] = (Sparsify, DictionaryLearning, SAELens, SAELensSparse, Overcomplete)


def peers(problem: Problem) -> list[type[Peer]]:
    """Those that have the method."""
    return [peer for peer in ALL if problem.method in peer.methods]
