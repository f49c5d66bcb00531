"""An SAE whose latents are shared among the ranks of a process group: tensor parallelism over latents.

All ranks code the same rows. Each has the encoder's rows and the atoms of its own latents, their gradients and
moments; what is exchanged is ``(N, k)`` candidates of every rank and the sum of ``(N, d)`` reconstructions. A
dictionary's bias is on every rank. One process with all latents computes the same, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.kernels import backend_for, sparse_decode
from mmsae.kernels.ids import distinct
from mmsae.sae.dictionary import Dictionary
from mmsae.sae.encoder import AffineEncoder, DistanceEncoder, PerModalityEncoder
from mmsae.sae.latents import latent_axes
from mmsae.sae.precodes import PreCodes
from mmsae.sae.registry import make_part, part_config
from mmsae.sae.sae import SAE
from mmsae.sae.selector import SelectContext, Selected, Selector, TopK
from mmsae.sae.usage import UsageTracker
from mmsae.sae.variants.batch_topk import BatchTopK
from mmsae.types import Codes, InputError

ENCODERS, SELECTORS, DICTIONARIES = (AffineEncoder, DistanceEncoder), (TopK, BatchTopK), (Dictionary,)


class LatentShard:
    """Which latents this rank has, and what ranks tell each other; every method is for all ranks to call.

    Args:
        d_sae: Latents of all ranks together.
        axes: ``{name in the SAE's state dict: axis}`` of tensors that have an entry for each latent.

    Attributes:
        rank: This process.
        world: Number of ranks; rank r has the latents ``r * size`` to ``(r + 1) * size``.
        size: Latents of a rank.

    Raises:
        InputError: There is no process group, or its ranks cannot share the latents evenly.
    """

    def __init__(self, d_sae: int, axes: Mapping[str, int]) -> None:
        if not torch.distributed.is_initialized():
            raise InputError("latents are shared among the ranks of a process group, and there is none")
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if d_sae % self.world:
            raise InputError(f"{d_sae:,} latents cannot be shared evenly among {self.world} ranks")
        self.d_sae, self.size, self.axes = d_sae, d_sae // self.world, dict(axes)

    def mine(self, tensor: Tensor, axis: int) -> Tensor:
        """This rank's part of a tensor with an entry for each latent."""
        return tensor.narrow(axis, self.rank * self.size, self.size)

    def gathered(self, tensor: Tensor, axis: int) -> Tensor | None:
        """A tensor of all latents in rank 0's main memory, part by part; None on the others."""
        if self.rank:
            torch.distributed.send(tensor.detach().contiguous(), dst=0)
            return None
        shape = list(tensor.shape)
        shape[axis] = self.d_sae
        whole, part = (
            torch.empty(shape, dtype=tensor.dtype),
            torch.empty_like(tensor, memory_format=torch.contiguous_format),
        )
        for rank in range(self.world):
            if rank:
                torch.distributed.recv(part, src=rank)
            whole.narrow(axis, rank * self.size, self.size).copy_(part if rank else tensor.detach())
        return whole

    def total(self, number: Tensor) -> Tensor:
        """The sum of a tensor over ranks, without gradients."""
        number = number.detach().clone()
        torch.distributed.all_reduce(number)
        return number

    def summed(self, part: Tensor) -> Tensor:
        """The sum of ``(N, d)`` reconstructions over ranks; each rank's own has the gradient of the sum."""
        return _Summed.apply(part)

    def copied(self, weight: Tensor) -> Tensor:
        """A weight that all ranks have, whose gradient is the sum of those that the ranks' latents give."""
        return _Copied.apply(weight)

    # ---------------------------------------------------------------------------------------------------- selection
    def select(
        self, selector: Selector, pres: Mapping[str, PreCodes], rows: Mapping[str, SelectContext]
    ) -> dict[str, Selected]:
        """The codes of every modality: of what all ranks together select, this rank's latents."""
        return {m: self._select(selector, pre, rows[m]) for m, pre in pres.items()}

    def _select(self, selector: Selector, pre: PreCodes, rows: SelectContext) -> Selected:
        if isinstance(selector, BatchTopK) and not selector.training:
            return selector(pre, rows)  # a threshold asks no other latent
        with torch.no_grad():
            if isinstance(selector, BatchTopK):
                linear, indices, on = self._largest_of_batch(selector, pre, rows)
            else:
                linear, indices = pre.topk(min(selector.k, self.size))
                indices, order = indices.sort(dim=1)  # of equal entries the first latent is taken
                linear = linear.gather(1, order)
                on = self._largest(linear, selector.k)
            width = max(1, int(on.sum(1).max())) if len(on) else 1
            first = (~on).byte().argsort(dim=1, stable=True)[:, :width]
            linear, indices, on = (None if t is None else t.gather(1, first) for t in (linear, indices, on))
        return selector.keep(pre, indices, linear) * on, indices

    def _largest(self, scores: Tensor, k: int) -> Tensor:
        """``(N, K)`` bool: which of this rank's candidates are among the k largest of a row over all ranks.

        Ranks' candidates have the order of latents, so that of equal ones the first latents are taken.
        """
        every = torch.cat(self._of_all(scores), dim=1)
        cut = every.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        on, equal = every > cut, every == cut
        on |= equal & (equal.cumsum(1) <= k - on.sum(1, keepdim=True))
        return on[:, self.rank * scores.shape[1] :][:, : scores.shape[1]]

    def _largest_of_batch(
        self, selector: BatchTopK, pre: PreCodes, rows: SelectContext
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Linear parts, ids and which count of what a batch keeps; of equal scores those of the first ranks."""
        linear, indices, on, _ = selector._choose(pre, rows)  # this rank's candidates
        value = torch.where(on, pre.at(indices, linear), -torch.inf).reshape(-1)
        budget = int(selector.k * len(rows.target))
        own = value.new_full((budget,), -torch.inf)
        best = value.topk(min(budget, len(value)))
        own[: len(best.values)] = best.values
        every = torch.cat(self._of_all(own))
        every = torch.where(every > 0, every, -torch.inf)
        cut = every.topk(budget, sorted=False).values.amin() if budget else value.new_tensor(torch.inf)
        kept, equal = every > cut, (every == cut) & (every > 0)
        kept |= equal & (equal.cumsum(0) <= budget - kept.sum())
        mine = kept[self.rank * budget :][: len(best.values)]  # of budget, and of what is filled up nothing is kept
        chosen = torch.zeros_like(value, dtype=torch.bool).scatter_(0, best.indices, mine)
        least = torch.where(kept, every, torch.inf).min() if budget else value.new_tensor(torch.inf)
        selector._observe(rows.modality, least.reshape(1))
        return linear, indices, chosen.view_as(on)

    def decode_largest(self, pre: Tensor, k: int, atoms: Tensor, signed: bool) -> Tensor:
        """:func:`mmsae.kernels.decode_largest` of ``pre (N, n)``, with n other latents on each rank."""
        n = pre.shape[1]
        ranked = pre.detach().abs() if signed else pre.detach()
        width = torch.tensor(min(n, k), device=pre.device)
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX)
        scores = ranked.new_full((len(pre), int(width)), -torch.inf)
        if n:
            indices = backend_for(atoms).topk(ranked, min(n, k))[1].sort(dim=1).values
            scores[:, : indices.shape[1]] = ranked.gather(1, indices)
        on = self._largest(scores, k)
        if not n:
            return self.summed(atoms.new_zeros(len(pre), atoms.shape[1]))
        values = (pre if signed else pre.relu()).gather(1, indices) * on[:, : indices.shape[1]]
        return self.summed(sparse_decode(values, indices, atoms))

    def _of_all(self, tensor: Tensor) -> list[Tensor]:
        out = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
        torch.distributed.all_gather(out, tensor.contiguous())
        return out

    # -------------------------------------------------------------------------------------------------------- wholes
    def codes(self, codes: Codes) -> Codes:
        """The codes of all latents, on every rank, without gradients."""
        values, indices = codes.values.detach(), codes.indices
        most = torch.tensor(values.shape[1], device=values.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        missing = int(most) - values.shape[1]
        values, used = (
            nn.functional.pad(t, (0, missing)) for t in (values, torch.ones_like(indices, dtype=torch.bool))
        )
        indices = distinct(nn.functional.pad(indices, (0, missing)), used) + self.rank * self.size
        values, indices = (torch.cat(self._of_all(t), dim=1) for t in (values, indices))
        return codes._replace(values=values, indices=indices, d_sae=self.d_sae)

    @torch.no_grad()
    def whole(self, sae: SAE) -> SAE | None:
        """The SAE with all its latents in rank 0's main memory, frozen and in eval mode; None on the others."""
        new = None
        if self.rank == 0:
            new = _unbuilt(sae, self.d_sae)
            with torch.device("meta"):
                new.build(sae.d_in)
            new = new.to_empty(device="cpu")
            new.sites, new.fresh = dict(sae.sites), False
        own = {} if new is None else new.state_dict()
        for name, tensor in sae.state_dict().items():
            found = self.gathered(tensor, self.axes[name]) if name in self.axes else tensor
            if name in own:
                own[name].copy_(found)
        if new is None:
            return None
        for part in new.parts().values():
            part.loaded_()
        return new.eval().requires_grad_(False)

    @torch.no_grad()
    def whole_usage(self, usage: UsageTracker) -> UsageTracker | None:
        """The counts of all latents in rank 0's main memory; None on the others."""
        found = {name: self.gathered(getattr(usage, name), 1) for name in ("since", "counts")}
        if self.rank:
            return None
        new = UsageTracker(self.d_sae, usage.modalities)
        new.load_state_dict({**found, "tokens": usage.tokens})
        return new


def share_latents_(sae: SAE) -> SAE:
    """Cut a built SAE, equal on all ranks of the default process group, to this rank's share of the latents.

    From then on every rank gives it the same rows. What it says of its latents is said of this rank's; it is trained by
    any loop, and coded, decoded and saved as a whole (:meth:`LatentShard.whole`).

    Args:
        sae: An SAE that selects by ``topk`` or ``batch_topk``, with affine or distance encoders.

    Raises:
        InputError: A part that does not know how, more latents than k on all ranks, or latents that cannot be shared.
    """
    _refuse_parts(sae)
    small = _unbuilt(sae, int(sae.selector.k) + 1)
    with torch.random.fork_rng(devices=[]):
        axes = {name: found[0] for name, found in latent_axes(small.build(sae.d_in)).items()}
    shard = LatentShard(sae.d_sae, axes)
    for name, axis in axes.items():
        path, _, attribute = name.rpartition(".")
        module = sae.get_submodule(path)
        own = getattr(module, attribute)
        part = shard.mine(own.detach(), axis).clone()
        setattr(module, attribute, nn.Parameter(part, own.requires_grad) if isinstance(own, nn.Parameter) else part)
    sae.d_sae, sae.shard = shard.size, shard
    return sae


def _refuse_parts(sae: SAE) -> None:
    encoders = list(sae.encoder.encoders.values()) if isinstance(sae.encoder, PerModalityEncoder) else [sae.encoder]
    known = {"encoder": ENCODERS, "selector": SELECTORS, "dictionary": DICTIONARIES}
    parts = [("encoder", e) for e in encoders] + [("selector", sae.selector)]
    parts += [("dictionary", d) for d in sae.dictionaries.values()]
    for slot, part in parts:
        if type(part) not in known[slot]:
            names = ", ".join(c.name for c in known[slot])
            raise InputError(f"{slot} {part.name!r} cannot share its latents among ranks, as {names} can")
    if sae.selector.score_name != "value" or getattr(sae.selector, "strict", False):
        odd = "strict" if sae.selector.score_name == "value" else f"score {sae.selector.score_name!r}"
        raise InputError(f"selector {sae.selector.name!r} with {odd} cannot share its latents among ranks")


def _unbuilt(sae: SAE, d_sae: int) -> SAE:
    """An SAE of the same parts and another size, which has no weights yet."""
    return SAE(
        d_sae=d_sae,
        modalities=sae.modalities,
        normaliser=make_part("normaliser", part_config(sae.normaliser)),
        encoder=make_part("encoder", part_config(sae.encoder)),
        selector=make_part("selector", part_config(sae.selector)),
        dictionaries={k: make_part("dictionary", part_config(d)) for k, d in sae.dictionaries.items()},
        precision=sae.precision,
    )


class _Summed(torch.autograd.Function):
    """The sum over ranks, all of which compute the same loss from it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        torch.distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Copied(torch.autograd.Function):
    """A weight that every rank uses for its own latents."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad
