"""The few shapes that everything passes around; torch is imported by those of their methods that compute.

Batches are NamedTuples of tensors and dicts of tensors: Lightning moves those between devices as they are
(it raises on frozen dataclasses). Every modality-indexed mapping uses the modality name (``image``, ``text``) as key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mmsae.errors import InputError as InputError

if TYPE_CHECKING:
    from torch import Tensor

IMAGE, TEXT = "image", "text"
#: What a token of a conversation is; ``Tokens.role`` holds places in this list.
ROLES = ("padding", "special", "template", "question", "answer", "image", "break")


class Faults(NamedTuple):
    """What went wrong while samples were read, small enough to travel with a batch."""

    seen: int = 0  #: Samples looked at, good or bad.
    counts: dict[str, int] = {}  #: ``{kind: number}``, e.g. ``{"broken_image": 2}``.
    examples: tuple[tuple[str, str, str, str], ...] = ()  #: Up to a few dozen ``(kind, shard, key, detail)``.

    @classmethod
    def read(cls, stored: Sequence[Any]) -> Faults:
        """What JSON made of faults, as faults."""
        seen, counts, examples = stored
        return cls(seen, counts, tuple(map(tuple, examples)))


class ImageTextBatch(NamedTuple):
    """Decoded, transformed and tokenised samples on their way to a frozen host."""

    #: ``(B, 3, H, W)`` as the host's own transform makes them, or None; uint8 where the transform's last arithmetic is
    #: left to the host (``Host.prepared``).
    images: Tensor | None
    texts: Tensor | None  #: ``(B, L)`` token ids from the host's own tokenizer, or None.
    uids: list[str]  #: The ``B`` sample ids.
    captions: list[str]  #: The ``B`` raw captions (empty strings where the data has none).
    keys: list[str]  #: The ``B`` webdataset keys.
    shards: list[str]  #: ``B`` shard names.
    faults: Faults = Faults()  #: What was dropped since the last batch.
    #: What the host's processor made of the samples, by its own names, where one sequence holds images and text
    #: (LVLMs); ``texts`` is then its ``input_ids``.
    inputs: dict[str, Tensor] | None = None
    labels: Tensor | None = None  #: ``(B,)`` int64 class numbers (the samples' ``cls``), where the reader needs them.


class Tokens(NamedTuple):
    """Activations of one batch: one contiguous segment per modality."""

    x: dict[str, Tensor]  #: ``{modality: (N_m, d_m)}`` raw activations.
    #: ``{modality: (N_m,) int64}`` row -> index into ``uids``; without uids any numbers that are equal within an item.
    item: dict[str, Tensor]
    uids: list[str] | None = None  #: The sample ids that ``item`` points into, or None where nobody needs them.
    #: ``{modality: (N_m,) int64}`` token position in the host's sequence (token sites only).
    position: dict[str, Tensor] | None = None
    #: ``{modality: (N_m,) bool}`` flags of CLS, BOS, EOS or padding tokens (token sites only).
    special: dict[str, Tensor] | None = None
    faults: Faults | None = None  #: What was dropped while this batch was read.
    #: ``{modality: (N_m, d_m)}`` gradient of the host's loss at the activations, where the data procedure takes it.
    grad: dict[str, Tensor] | None = None
    #: ``{modality: (N_m,) uint8}`` places in :data:`ROLES` (sites of conversations only).
    role: dict[str, Tensor] | None = None

    @classmethod
    def pooled(cls, x: dict[str, Tensor], uids: list[str] | None = None, faults: Faults | None = None) -> Tokens:
        """Tokens of a pooled site: row i of every modality belongs to item i."""
        import torch

        return cls(x, {m: torch.arange(len(v), device=v.device) for m, v in x.items()}, uids, faults=faults)

    def each(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """The batch with what ``fn`` makes of every tensor."""
        return Tokens(*({k: fn(t) for k, t in v.items()} if isinstance(v, dict) else v for v in self))

    def on(self, device: Any) -> bool:
        """Whether all activations are on a device."""
        return all(x.device == device for x in self.x.values())

    def paired(self) -> bool:
        """Whether all modalities have equal counts and equal ``item`` order, so that row i of each is one pair."""
        import torch

        first, *rest = self.item.values()
        return bool(rest) and all(len(r) == len(first) and torch.equal(r, first) for r in rest)


class SideBySide(NamedTuple):
    """Batches of SAEs that are trained together and read at different sites, each what it would be for itself."""

    of: dict[str, Tokens]  #: ``{sites: their batch}``; of an exact pass without those whose rows have ended.

    def on(self, device: Any) -> bool:
        """Whether all activations are on a device."""
        return all(tokens.on(device) for tokens in self.of.values())


class RowInfo(NamedTuple):
    """What a per-row normaliser divided by, needed to bring a reconstruction back to the units of x."""

    outer: Tensor | None = None  #: ``(N, 1)`` norm or standard deviation removed before centring, or None.
    inner: Tensor | None = None  #: ``(N, 1)`` norm removed after centring and scaling, or None.
    mean: Tensor | None = None  #: ``(N, 1)`` mean of the row's entries, subtracted first, or None.


class Codes(NamedTuple):
    """Sparse codes of N rows.

    Top-k families keep ``(values, indices)`` and never build the ``(N, d_sae)`` matrix; threshold families have
    ``indices=None`` and dense ``values``. A selected entry may be 0 (fewer than k positive pre-codes): "fired" is
    ``value != 0``, never "selected".
    """

    values: Tensor  #: ``(N, k)`` selected code values, or ``(N, d_sae)`` where ``indices`` is None.
    indices: Tensor | None  #: ``(N, k)`` int64 latent ids, or None.
    d_sae: int  #: Number of latents.
    modality: str | None = None  #: Which modality the rows came from; None for one-modality SAEs.
    info: RowInfo | None = None  #: The per-row scales of the normaliser; None if it has none.

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.values.shape[0]

    @staticmethod
    def stack(parts: Sequence[Codes]) -> Codes:
        """Codes of several batches below each other; rows with fewer entries are filled with zeros.

        What is filled up has latents that the row has not: ids are distinct within a row, or a product of two codes
        might read the filling in place of a value.
        """
        import torch

        first, info = parts[0], None
        if all(p.info is not None for p in parts):
            columns = zip(*(p.info for p in parts), strict=True)
            info = RowInfo(*(None if any(t is None for t in column) else torch.cat(column) for column in columns))
        if first.indices is None:
            return first._replace(values=torch.cat([p.values for p in parts]), info=info)
        k = max(p.values.shape[1] for p in parts)
        values, indices = [], []
        for p in parts:
            missing = k - p.values.shape[1]
            # of the first k latents a row has at most its own number, so enough are free
            taken = p.indices.new_zeros(p.n, k + 1).scatter_(1, p.indices.clamp(max=k), 1)[:, :k]
            free = taken.sort(dim=1, stable=True).indices[:, :missing]
            values.append(torch.nn.functional.pad(p.values, (0, missing)))
            indices.append(torch.cat([p.indices, free], 1))
        return first._replace(values=torch.cat(values), indices=torch.cat(indices), info=info)

    def ids(self) -> Tensor:
        """The latent of every value: ``indices``, or ``(N, d_sae)`` of dense values, without memory of their own."""
        import torch

        if self.indices is not None:
            return self.indices
        return torch.arange(self.d_sae, device=self.values.device).expand_as(self.values)

    def to_dense(self) -> Tensor:
        """``(N, d_sae)`` matrix."""
        if self.indices is None:
            return self.values
        return self.values.new_zeros(len(self.values), self.d_sae).scatter(1, self.indices, self.values)

    def l0(self) -> Tensor:
        """``(N,)`` number of latents that fired in each row."""
        return (self.values != 0).sum(1)

    def decode_with(self, atoms: Tensor) -> Tensor:
        """``(N, d)`` sum of ``atoms (d_sae, d)`` weighted by the codes; no bias, no normaliser."""
        if self.indices is None:
            return self.values @ atoms
        from mmsae.kernels import sparse_decode

        return sparse_decode(self.values, self.indices, atoms)

    def gather(self, ids: Tensor) -> Tensor:
        """``(N, len(ids))`` code values of the latents ``ids (L,)``, which may repeat."""
        import torch

        if self.indices is None:
            return self.values[:, ids]
        ids, back = ids.to(self.indices.device).unique(return_inverse=True)
        slot = torch.full((self.d_sae,), -1, dtype=torch.long, device=ids.device)
        slot[ids] = torch.arange(len(ids), device=ids.device)
        col = slot[self.indices]
        out = self.values.new_zeros(len(self.values), len(ids) + 1)
        return out.scatter_add(1, torch.where(col < 0, len(ids), col), self.values)[:, back]

    def rows(self, which: Tensor | slice) -> Codes:
        """The codes of some rows (index tensor, mask or slice)."""
        info = self.info and RowInfo(*(t if t is None else t[which] for t in self.info))
        return self._replace(
            values=self.values[which], indices=None if self.indices is None else self.indices[which], info=info
        )

    def pool(self, items: Tensor, n_items: int | None = None) -> Tensor:
        """``(n_items, d_sae)`` mean code of each item; ``items (N,)`` maps rows to items."""
        import torch

        n = int(items.max()) + 1 if n_items is None else n_items
        out = self.values.new_zeros(n, self.d_sae)
        if self.indices is None:
            out.index_add_(0, items, self.values)
        else:
            out.index_put_((items[:, None].expand_as(self.indices), self.indices), self.values, accumulate=True)
        return out / torch.bincount(items, minlength=n).clamp(min=1).to(out)[:, None]

    def to_csr(self) -> Tensor:
        """``(N, d_sae)`` sparse CSR tensor of the entries that fired, columns sorted."""
        import torch

        if self.indices is None:
            return self.values.to_sparse_csr()
        order = self.indices.argsort(1)
        idx, val = self.indices.gather(1, order), self.values.gather(1, order)
        on = val != 0
        crow = torch.nn.functional.pad(on.sum(1).cumsum(0), (1, 0))
        return torch.sparse_csr_tensor(crow, idx[on], val[on], size=(len(val), self.d_sae))


class SAEOutput(NamedTuple):
    """What one modality's forward pass returns."""

    x_hat: Tensor  #: ``(N, d)`` reconstruction in the raw units of x.
    codes: Codes  #: The codes.
    target: Tensor  #: ``(N, d)`` the normalised input that the losses are taken against.
    recon: Tensor  #: ``(N, d)`` the reconstruction in normalised units.
    pre: Any = None  #: Lazy pre-codes (:class:`mmsae.sae.precodes.PreCodes`), for losses that need them.


@dataclass(frozen=True)
class Site:
    """Where in which host an activation was read.

    ``module`` is a path in the host's own naming, or a virtual endpoint (``image.embed``, ``text.embed``,
    ``image.pooled``) for tensors that no module outputs. Identity is the host's fingerprint, never a path.
    """

    host: str  #: Fingerprint of the host, a hash of its config and weights.
    module: str  #: Module path or virtual endpoint.
    io: str = "out"  #: ``in``, ``out`` or ``update`` (out minus in) of that module.
    tokens: str = "pooled"  #: Token policy: ``pooled``, ``cls``, ``patches``, ``eos``, ``mask`` or ``all``.
    modality: str = IMAGE  #: ``image`` or ``text``.
    width: int = 0  #: Feature width d.
    hint: str = ""  #: How to load the host again (a hub id or a local-dir name); not part of the identity.

    @property
    def spec(self) -> str:
        """What a host calls it: ``MODULE.PATH:io[tokens]``."""
        return f"{self.module}:{self.io}[{self.tokens}]"

    def same(self, other: Site) -> bool:
        """Whether both name the same tensor of the same host (the reload hint does not count)."""
        return replace(self, hint="") == replace(other, hint="")

    def refuse_other(self, at: Site) -> None:
        """Refuse that an SAE that was trained here reads or writes at another host's site, module, or end of it.

        Raises:
            InputError: The two, and the option that accepts it.
        """
        odd = ""
        if self.host != at.host:
            odd = f"on {self}{f' ({self.hint})' if self.hint else ''}, not on host {at.host[:12]}"
        elif (self.module, self.io) != (at.module, at.io):
            odd = f"at {self.module}:{self.io}, not at {at.module}:{at.io}"
        if odd:
            how = "--allow-other-site (in Python allow_other_site=True) accepts it all the same"
            raise InputError(f"this SAE was trained {odd}; {how}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.modality}:{self.module}.{self.io}[{self.tokens}] width {self.width} of host {self.host[:12]}"
