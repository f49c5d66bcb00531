"""Cross-modal weight of every latent: are its strongest text tokens and its strongest image tokens alike?

SAE-V (arXiv 2502.17514), Algorithm 1 stages 1-2. One streaming pass: a table of the strongest tokens per latent and
modality, and a pool with the hidden vectors that the tables refer to, so memory is linear in latents times ``n_side``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from mmsae.metrics.concepts.evidence import lexsort, pack_uids, places, run_starts
from mmsae.metrics.pairs.item_codes import check_rows, content_rows, entries
from mmsae.types import IMAGE, TEXT, Codes, InputError, Tokens

MODES = ("all_pairs", "rank_matched", "centroid")
SELECTIONS = ("pooled", "per_modality")
SIDES = (IMAGE, TEXT)
_BINS = 1 << 15  # a positive float32 without its lower 16 bits: steps of at most 0.8 %


def pair_weight(text: Tensor, image: Tensor, mode: str = "all_pairs") -> Tensor:
    """Similarity of two sets of hidden vectors.

    Args:
        text: ``(..., n, d)``, strongest first.
        image: ``(..., n, d)``.
        mode: ``all_pairs``: mean cosine of all n * n pairs, which is the product of the two mean unit vectors;
            ``rank_matched``: mean cosine of the n pairs of equal rank; ``centroid``: cosine of the two mean unit
            vectors, systematically larger.

    Returns:
        ``(...)`` in [-1, 1]; vectors of norm 0 count as cosine 0.
    """
    a, b = (normalize(v.double(), dim=-1) for v in (text, image))
    if mode == "rank_matched":
        return (a * b).sum(-1).mean(-1)
    a, b = a.mean(-2), b.mean(-2)
    return torch.cosine_similarity(a, b, dim=-1) if mode == "centroid" else (a * b).sum(-1)


class CrossModal(NamedTuple):
    """What :class:`CrossModalWeights` computes."""

    weights: Tensor  #: ``(d_sae,)`` float64; NaN for latents without enough evidence
    #: ``{modality: (d_sae,)}`` int64 tokens that the selection found, at most ``n_side`` of each modality
    #: (``per_modality``) or ``n_pool`` of both together (``pooled``)
    evidence: dict[str, Tensor]
    delta: float  #: Activations had to be larger than this
    coverage: float  #: Share of the latents that were active at all that have a weight
    tokens: dict[str, int]  #: ``{modality: content tokens seen}``
    fired: dict[str, Tensor]  #: ``{modality: (d_sae,)}`` int64 content tokens on which each latent fired
    energy: dict[str, Tensor]  #: ``{modality: (d_sae,)}`` float64 sum of its activations over them


class CrossModalWeights(Metric):
    """Streaming cross-modal weights.

    The result depends on the set of tokens alone, not on batches, their order or ranks; equal activations go by uid and
    position, and a token that is seen twice counts once.

    Args:
        d_sae: Number of latents.
        width: Width d of the hidden vectors.
        mode: See :func:`pair_weight`.
        selection: ``pooled``: the top ``n_pool`` tokens of both modalities together must hold ``n_side`` of each (the
            published code; coverage then depends on how many image tokens there are per text token).
            ``per_modality``: the top ``n_side`` of each (the published algorithm).
        n_pool: See ``selection``.
        n_side: Tokens of each modality that are compared.
        delta: Activations up to this one are no evidence; in the units of the codes.
        delta_quantile: Instead of ``delta``: this quantile of the positive activations of content tokens (rounded
            down by less than 0.8 %), so that it means the same in every code.
        center: Take the mean of all content tokens off the hidden vectors first, which a few massive dimensions
            dominate.
    """

    full_state_update = False

    def __init__(
        self,
        d_sae: int,
        width: int,
        mode: str = "all_pairs",
        selection: str = "pooled",
        n_pool: int = 30,
        n_side: int = 5,
        delta: float = 0.0,
        delta_quantile: float | None = None,
        center: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value, known in (("mode", mode, MODES), ("selection", selection, SELECTIONS)):
            if value not in known:
                raise InputError(f"{name} of cross-modal weights must be one of {', '.join(known)}, not {value!r}")
        if n_side < 1:
            raise InputError(f"n_side is {n_side}; it must be at least 1")
        if selection == "pooled" and n_pool < 2 * n_side:
            raise InputError(f"n_pool is {n_pool}, but two sides of n_side {n_side} need at least {2 * n_side}")
        if delta_quantile is not None and not 0 <= delta_quantile < 1:
            raise InputError(f"delta_quantile must be in [0, 1), not {delta_quantile}")
        self.d_sae, self.width, self.mode, self.selection = d_sae, width, mode, selection
        self.n_pool, self.n_side, self.delta, self.delta_quantile = n_pool, n_side, delta, delta_quantile
        self.center = center
        n = n_pool if selection == "pooled" else n_side
        self.add_state("values", torch.zeros(2, d_sae, n), dist_reduce_fx=None)
        self.add_state("ids", torch.zeros(2, d_sae, n, 3, dtype=torch.long), dist_reduce_fx=None)  # uid words, position
        self.add_state("slots", torch.full((2, d_sae, n_side), -1), dist_reduce_fx=None)
        self.add_state("vectors", [], dist_reduce_fx="cat")
        self.add_state("pool", torch.zeros((), dtype=torch.long), dist_reduce_fx=None)
        self.add_state("seen", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("fired", torch.zeros(2, d_sae, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(2, d_sae, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("histogram", torch.zeros(_BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.vectors = [torch.zeros(0, self.width, device=self.values.device)]  # never an empty list: ranks exchange it

    def config(self) -> dict:
        """Arguments of the definition, for the file of weights."""
        names = ("mode", "selection", "n_pool", "n_side", "delta", "delta_quantile", "center")
        return {n: getattr(self, n) for n in names}

    @torch.no_grad()
    def update(self, codes: Mapping[str, Codes], tokens: Tokens) -> None:
        """Add one batch, which may lack a modality; rows that ``tokens.special`` marks are left out."""
        uids = pack_uids(tokens.uids).to(self.values.device)
        for side, m in enumerate(SIDES):
            if m not in codes:
                continue
            check_rows(codes[m], tokens, m)
            rows = content_rows(tokens, m).nonzero()[:, 0]
            x = tokens.x[m][rows].float()
            position = torch.zeros_like(rows) if tokens.position is None else tokens.position[m][rows]
            ids = torch.cat([uids[tokens.item[m][rows]], position[:, None]], 1)
            row, latent, value = entries(codes[m].rows(rows))
            value = value.float()
            self.seen[side] += len(rows)
            self.fired[side].scatter_add_(0, latent, torch.ones_like(latent))
            self.total[side].scatter_add_(0, latent, value.double())
            self.sum += x.double().sum(0)
            self.histogram += torch.bincount(value.view(torch.int32) >> 16, minlength=_BINS)
            # only what can still enter: at least the last place of its latent (equal values may win by uid)
            on = (value >= self.values[side, latent, -1]) & (value > 0)
            self._insert(side, latent[on], value[on], ids[row[on]], x, row[on])

    def _insert(self, side: int, latent: Tensor, value: Tensor, ids: Tensor, x: Tensor, row: Tensor) -> None:
        """Put tokens into a table; ``row`` points into their vectors ``x``, -1 for one that needs none."""
        n, old = self.values.shape[2], self.vectors[0]
        touched = latent.unique()
        lost = self.slots.new_full((len(touched), n - self.n_side), -1)  # only the first n_side places keep a vector
        value = torch.cat([self.values[side, touched].flatten(), value])
        latent = torch.cat([touched.repeat_interleave(n), latent])
        ids = torch.cat([self.ids[side, touched].flatten(0, 1), ids])
        slot = torch.cat([torch.cat([self.slots[side, touched], lost], 1).flatten(), torch.full_like(row, -1)])
        row = torch.cat([torch.full_like(slot[: len(slot) - len(row)], -1), row])
        keep = (value > 0).nonzero()[:, 0]
        keep = keep[lexsort(latent[keep], -value[keep], *ids[keep].unbind(1))]
        keep = keep[run_starts(latent[keep], value[keep], *ids[keep].unbind(1))]  # a token that is there already
        latent = latent[keep]
        place = places(latent)
        top = place < n
        keep, latent, place = keep[top], latent[top], place[top]
        self.values[side, touched] = 0
        self.values[side, latent, place] = value[keep]
        self.ids[side, latent, place] = ids[keep]
        first = place < self.n_side
        keep, latent, place = keep[first], latent[first], place[first]
        self.slots[side, touched] = -1
        self.slots[side, latent, place] = slot[keep]
        fresh = row[keep] >= 0
        needed, which = row[keep[fresh]].unique(return_inverse=True)
        used = torch.zeros(len(old), dtype=torch.bool, device=old.device)
        used[self.slots[self.slots >= 0]] = True
        free = (~used).nonzero()[:, 0]
        if len(free) < len(needed):  # grow by half, so that copying costs little in the long run
            more = max(len(needed) - len(free), len(old) // 2)
            free = torch.cat([free, torch.arange(len(old), len(old) + more, device=old.device)])
            self.vectors = [torch.cat([old, old.new_zeros(more, self.width)])]
            self.pool.fill_(len(self.vectors[0]))
        self.vectors[0][free[: len(needed)]] = x[needed]
        self.slots[side, latent[fresh], place[fresh]] = free[which]

    def part(self) -> dict[str, Tensor]:
        """What was seen, compact, for a file; :meth:`merge` takes it."""
        side, latent, place = (self.values > 0).nonzero(as_tuple=True)
        kept = torch.nn.functional.pad(self.slots, (0, self.values.shape[2] - self.n_side), value=-1)[
            side, latent, place
        ]
        rows, which = kept.unique(return_inverse=True)
        lead = int((rows < 0).sum())  # at most one: the entries without a vector
        counts = {n: getattr(self, n).clone() for n in ("seen", "fired", "total", "sum", "histogram")}
        at = {"side": side, "latent": latent, "row": which - lead}
        table = {"value": self.values[side, latent, place], "id": self.ids[side, latent, place]}
        return {**counts, **at, **table, "x": self.vectors[0][rows[lead:]]}

    def merge(self, part: Mapping[str, Tensor]) -> None:
        """Add what another metric of the same sizes has seen (:meth:`part`)."""
        self._update_count += 1
        for name in ("seen", "fired", "total", "sum", "histogram"):
            getattr(self, name).add_(part[name].to(self.values.device))
        p = {k: part[k].to(self.values.device) for k in ("side", "latent", "value", "id", "x", "row")}
        for side in range(2):
            on = p["side"] == side
            self._insert(side, p["latent"][on], p["value"][on], p["id"][on], p["x"], p["row"][on])

    def _gathered(self) -> CrossModalWeights:
        """The tables of all ranks in one; this metric itself where there is one rank."""
        if self.values.dim() == 3:
            return self
        whole = CrossModalWeights(self.d_sae, self.width, **self.config()).to(self.values.device)
        starts = torch.nn.functional.pad(self.pool.cumsum(0), (1, 0)).tolist()
        for r in range(len(self.values)):
            rank = CrossModalWeights(self.d_sae, self.width, **self.config()).to(self.values.device)
            rank.values, rank.ids, rank.slots = self.values[r], self.ids[r], self.slots[r]
            rank.vectors = [self.vectors[starts[r] : starts[r + 1]]]
            whole.merge(rank.part())
        for name in ("seen", "fired", "total", "sum", "histogram"):
            setattr(whole, name, getattr(self, name))
        return whole

    def threshold(self) -> float:
        """Delta: as given, or its quantile of what was seen (over the ranks that are gathered)."""
        if self.delta_quantile is None:
            return self.delta
        cum = self.histogram.cumsum(0)
        if not cum[-1]:
            return 0.0
        at = torch.searchsorted(cum, (self.delta_quantile * cum[-1].double()).long(), right=True)
        return (at.to(torch.int32) << 16).view(torch.float32).item() if self.delta_quantile else 0.0

    def evidence(self, delta: float) -> Tensor:
        """``(2, d_sae)`` number of tokens of each modality in the selection."""
        on = self.values > delta
        if self.selection == "per_modality":
            return on.sum(2)
        side, latent, place = on.nonzero(as_tuple=True)
        order = lexsort(latent, -self.values[side, latent, place], *self.ids[side, latent, place].unbind(1))
        side, latent = side[order], latent[order]
        top = places(latent) < self.n_pool
        out = torch.zeros(2, self.d_sae, dtype=torch.long, device=on.device)
        return out.index_put_((side[top], latent[top]), torch.ones_like(latent[top]), accumulate=True)

    def compute(self, chunk: int = 1024) -> CrossModal:
        """The weights over everything that all ranks have seen; ``chunk`` latents at a time."""
        g = self._gathered()
        delta = g.threshold()
        found = g.evidence(delta)
        weights = torch.full((self.d_sae,), torch.nan, dtype=torch.float64, device=g.values.device)
        mean = (g.sum / g.seen.sum().clamp(min=1)) if self.center else 0.0
        for ids in (found >= self.n_side).all(0).nonzero()[:, 0].split(chunk):
            image, text = (g.vectors[0][g.slots[side, ids]].double() - mean for side in range(2))
            weights[ids] = pair_weight(text, image, self.mode)
        alive = int((g.fired.sum(0) > 0).sum())
        covered = int(weights.isfinite().sum())
        per_side = ({m: t[side] for side, m in enumerate(SIDES)} for t in (found, g.fired, g.total))
        evidence, fired, energy = per_side
        tokens = dict(zip(SIDES, g.seen.tolist(), strict=True))
        return CrossModal(weights, evidence, delta, covered / max(alive, 1), tokens, fired, energy)
