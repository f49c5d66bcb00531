"""A frozen host: reads activations at a :class:`~mmsae.types.Site` and lets a function replace them there.

Site specs are ``MODULE.PATH:io[tokens]`` in the host's own naming, as ``visual.transformer.resblocks.5:out[patches]``,
or names of virtual endpoints; ``io`` defaults to ``out``, ``tokens`` to ``all`` for token states and ``pooled``
elsewhere. What a module's tensor looks like is found by running it on a batch of one and a batch of two, so any module
of any host can be a site as long as its tensor holds one feature vector per token.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from mmsae.fingerprint import fingerprint
from mmsae.hosts.capture import Picked, Rows, Use, collect, differentiate, tap
from mmsae.hosts.gradient import Gradient, HostLoss, plain
from mmsae.hosts.hooks import ModulePort, Port
from mmsae.hosts.sites import Target, parse_site
from mmsae.hosts.tokens import Layout, find_layout
from mmsae.types import IMAGE, ImageTextBatch, InputError, Site, Tokens

Sites = Mapping[str, Site | str] | Sequence[Site | str]
Pick = Callable[[Tensor], Picked | None]


def check_device(device: str | torch.device) -> None:
    """Refuse what names no device, and a CUDA device where there is none."""
    try:
        kind = torch.device(device).type
    except RuntimeError as e:
        raise InputError(f"device {str(device)!r} is not known to torch; there are cpu and cuda, as cuda:0.") from e
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} was asked for, but torch sees no CUDA device.")


def pick_device(device: str, rank: int = 0) -> str:
    """Where to compute: ``auto`` and ``cuda`` become this rank's GPU, or ``auto`` the CPU where there is none."""
    found = torch.cuda.is_available()
    device = ("cuda" if found else "cpu") if device == "auto" else device
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; it must be cpu, cuda or auto")
    if device.startswith("cuda") and not found:
        raise InputError(f"device is {device}, and torch finds no such GPU here; there is cpu")
    return f"cuda:{rank % torch.cuda.device_count()}" if device == "cuda" else device


class Host(ABC):
    """A frozen host in eval mode.

    Args:
        model: The host; parameters are frozen here.
        hint: How to load it again.
        device: Device that it runs on.
        precision: ``fp32``, or autocast ``bf16`` / ``fp16``; outputs are float32 either way.
    """

    modalities: tuple[str, ...] = (IMAGE,)  #: What its sites hold.
    endpoints: tuple[str, ...] = ()  #: Names of virtual endpoints, sites that are no module's.
    embeddings: tuple[str, ...] = ()  #: Those of them that are ``(B, d)`` by their meaning.

    def __init__(self, model: nn.Module, hint: str = "", device: str | torch.device = "cpu", precision: str = "fp32"):
        if precision not in ("fp32", "bf16", "fp16"):
            raise InputError(f"precision {precision!r} is not one of fp32, bf16, fp16.")
        self.model = model.eval().requires_grad_(False)
        self.hint, self.precision = hint, precision
        self._layouts: dict[tuple[str, str], Layout] = {}
        self._probing = False
        self.to(device)

    # What a host says about itself.

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values that, with the weights, determine the outputs."""

    @abstractmethod
    def reading(self, modalities: Collection[str], text: str = "question") -> dict[str, Any]:
        """``transform``, ``tokenize`` and ``collate`` for the pipelines of ``mmsae.shards``: what makes its batches.

        Args:
            modalities: Those that are read.
            text: ``question+answer`` asks for whole conversations, which only vision-language hosts have.
        """

    def prepared(self, batch: ImageTextBatch, device: str | torch.device | None = None) -> ImageTextBatch:
        """The batch with images as the model takes them, where what :meth:`reading` gives leaves that to the host.

        :meth:`read` does it by itself.

        Args:
            batch: What a loader with the options of :meth:`reading` makes.
            device: Where the images are to be; default: the host's device.
        """
        return batch

    @abstractmethod
    def default_sites(self) -> dict[str, Site]:
        """``{modality: where it is read if nobody says}``."""

    @property
    def objectives(self) -> dict[str, HostLoss]:
        """The losses of this host whose gradients can be read, by name."""
        return {}

    def objective(self, gradient: Gradient) -> HostLoss:
        """The loss that is meant; one that this host has not, and arithmetic that loses gradients, are refused."""
        if isinstance(gradient, str):
            if gradient not in self.objectives:
                has = ", ".join(self.objectives) or "none"
                raise InputError(f"gradient is {gradient!r}, but the losses of host {self.hint} are: {has}")
            gradient = self.objectives[gradient]
        if self.precision == "fp16" or any(p.dtype == torch.float16 for p in self.model.parameters()):
            raise InputError(f"gradient {gradient.name}: gradients underflow in fp16; take precision fp32 or bf16")
        return gradient

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of config and weights, taken once: the host is frozen."""
        return fingerprint(self.config(), self.model.state_dict())

    @property
    def device(self) -> torch.device:
        """Device that holds the host."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> Host:
        """Move the host; the fingerprint does not change."""
        check_device(device)
        self.model.to(device)
        return self

    def batch_size(self, asked: int | None = None) -> int:
        """Samples of a forward pass: what is asked for, else 256; on a CPU fewer where images are large.

        There as many as have the area of 16 images of 224 pixels, a power of two from 4 to 256: larger batches are no
        faster, and cost page faults wherever the allocator does not keep memory (:mod:`mmsae.allocator`).
        """
        if asked is not None:
            if asked < 1:
                raise InputError(f"batch_size is {asked}; it must be at least 1")
            return asked
        if self.device.type != "cpu" or (pixels := self.image_area()) is None:
            return 256
        return min(256, max(4, 2 ** int(math.log2(16 * 224**2 / pixels))))

    def image_area(self) -> int | None:
        """Pixels of an image as the host takes it; None for hosts of text."""
        return None

    # Sites.

    def resolve(self, spec: str) -> Target:
        """What a spec means on this host, which may lack its module, io or token policy (InputError)."""
        module, io, tokens = parse_site(spec)
        if module in self.endpoints and io != "out":
            raise InputError(f"site {spec!r}: the endpoint {module} has io 'out' only.")
        module = self.full_name(module)
        layout = self._layout(module, io)
        tokens = tokens or ("all" if layout.ndim > 2 else "pooled")
        target = Target(module, io, tokens, self.modality_of(module, tokens), layout)
        self.check_policy(target, f"site {spec!r}")
        return target

    def site(self, spec: str | Site, allow_other_site: bool = False) -> Site:
        """The site that a spec names on this host; a :class:`Site` is checked by :meth:`check_site`."""
        if isinstance(spec, Site):
            return self.check_site(spec, allow_other_site)
        t = self.resolve(spec)
        return Site(self.fingerprint, t.module, t.io, t.tokens, t.modality, t.layout.width, self.hint)

    def check_site(self, site: Site, allow_other_site: bool = False) -> Site:
        """The same site as one of this host; a site of another host is refused.

        Args:
            site: From a checkpoint or a store; one without a host (imported checkpoints) is given this one.
            allow_other_site: Accept another fingerprint, not another width or modality.
        """
        if site.host and site.host != self.fingerprint and not allow_other_site:
            raise InputError(
                f"site {site.module} belongs to host {site.host} ({site.hint or 'no hint'}), but this host is "
                f"{self.fingerprint} ({self.hint or 'no hint'}); pass allow_other_site=True to attach anyway."
            )
        own = self.site(f"{site.module}:{site.io}[{site.tokens}]")
        for field in ("modality", "width"):
            theirs, ours = getattr(site, field), getattr(own, field)
            if theirs and theirs != ours:
                raise InputError(f"site {site.module} has {field} {theirs}, but on host {self.hint} it is {ours}.")
        return own

    def width(self, spec: str | Site | None = None) -> int:
        """Feature width d at a site; default: the first of :meth:`default_sites`."""
        return (next(iter(self.default_sites().values())) if spec is None else self.site(spec)).width

    def one_each(self, sites: Site | str | Sites) -> dict[str, Site]:
        """``{modality: site}``; two sites of one modality are refused."""
        given = list(sites.values()) if isinstance(sites, Mapping) else sites
        chosen = [self.site(s) for s in ([given] if isinstance(given, (str, Site)) else given)]
        names = [s.modality for s in chosen]
        if len(set(names)) != len(names):
            raise InputError(f"one site per modality is read, got {', '.join(names)}; use read or edits for several.")
        return dict(zip(names, chosen, strict=True))

    # What a kind of hosts says about its modules.

    def full_name(self, module: str) -> str:
        """The module's own path, where it may be named by another one."""
        return module

    @abstractmethod
    def modality_of(self, module: str, tokens: str = "all") -> str:
        """Whose activations a module computes."""

    @abstractmethod
    def check_policy(self, target: Target, where: str) -> None:
        """Refuse a token policy that a site does not have."""

    def probe(self, module: str, n: int) -> None:
        """Run the part of the host that holds a module over any ``n`` items, for :meth:`measure`."""
        raise NotImplementedError

    @abstractmethod
    def picking(self, target: Target) -> AbstractContextManager[Pick]:
        """While the context is open, what picks the rows of a site from its tensor."""

    @abstractmethod
    def passes(self, batch: ImageTextBatch, targets: Sequence[Target]) -> list[tuple[list[int], Callable[[], Any]]]:
        """Runs of the host over a batch, each after the numbers of the sites that it reaches."""

    def channels_last(self) -> bool:
        """Whether the host's maps are ``(B, H, W, d)``."""
        return False

    def module(self, path: str) -> nn.Module:
        """A module of the host; the error names near matches."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            names = [*self.endpoints, *(n for n, _ in self.model.named_modules())]
            near = difflib.get_close_matches(path, names, n=5, cutoff=0.5)
            hint = f"near matches: {', '.join(near)}" if near else "host.model.named_modules() lists modules"
            raise InputError(f"host {self.hint} has no module or endpoint {path!r}; {hint}.") from None

    def port(self, module: str, io: str) -> Port:
        """The tensor of a site."""
        return ModulePort(self.module(module), io)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """While the context is open, edits that are open do not see what runs."""
        before, self._probing = self._probing, True
        try:
            yield
        finally:
            self._probing = before

    def _layout(self, module: str, io: str) -> Layout:
        """What a site's tensor looks like, found once."""
        if (module, io) not in self._layouts:
            with self.unseen():
                self._layouts[module, io] = self.measure(module, io)
        return self._layouts[module, io]

    def measure(self, module: str, io: str) -> Layout:
        """What a site's tensor looks like, by running the host on one item and on two; of an embedding one tells."""
        shapes, where = [], f"{module}:{io}"

        def note(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                raise InputError(f"{where} cannot be a site: its tensor is {x.dtype}, not floating point.")
            shapes.append(x.shape)
            return x

        with self.port(module, io).attach(note):
            self.probe(module, 1)
            if module in self.embeddings and [len(s) for s in shapes] == [2]:
                shapes.append(torch.Size((2, *shapes[0][1:])))  # of large hosts every forward pass is felt
            else:
                self.probe(module, 2)
        if len(shapes) != 2:
            calls = f"called {len(shapes) // 2} times" if shapes else "never called"
            what = f"it is {calls} when the host encodes one {self.modality_of(module)} batch"
            raise InputError(f"{where} cannot be a site: {what}.")
        return find_layout(*shapes, channels_last=self.channels_last(), where=where)

    # Reading and replacing.

    @contextmanager
    def tapped(self, target: Target, fn: Use, *more: Any) -> Iterator[None]:
        """While the context is open, send the rows of a site through ``fn(rows, where)``."""
        with self.picking(target, *more) as pick:
            port = self.port(target.module, target.io)
            with tap(port, target, lambda x: None if self._probing else pick(x), fn):
                yield

    def target(self, site: Site | str) -> Target:
        """What a spec, or a site of this host, means."""
        return self.resolve(site if isinstance(site, str) else self.site(site).spec)

    def edit(self, site: Site | str, fn: Callable[..., Tensor], *, where: bool = False) -> AbstractContextManager[None]:
        """Context manager: while it is open, the host computes with ``fn(x)`` in place of ``x`` at ``site``.

        Holds for everything that the host does, :meth:`capture` and direct calls of ``self.model`` among it.

        Args:
            site: The site.
            fn: ``(N, d)`` float32 rows, in the order in which :meth:`capture` returns them, to rows of the same
                shape. It must not change its argument in place. Returning the same object changes nothing at all.
            where: Call ``fn(rows, where)`` with a :class:`~mmsae.hosts.sites.Where`.
        """
        return self.tapped(self.target(site), lambda rows, at: fn(rows, at) if where else fn(rows))

    def read(self, batch: ImageTextBatch, sites: Sequence[Site | str], gradient: Gradient = "") -> list[Rows]:
        """Rows at several sites, in their order, with forward passes that stop when all are read.

        A site that nothing in the batch reaches is refused. With ``gradient``, the name of one of :attr:`objectives` or
        another loss, one whole pass gives the derivative of its sum over the batch by every row as well, in the sense
        of :meth:`edit`: of what the host computes when that row alone is changed.
        """
        batch = self.prepared(batch)
        targets = [self.target(s) for s in sites]
        taps = [partial(self.tapped, t) for t in targets]
        got: dict[int, Rows | None] = {}
        if gradient:
            loss = self.objective(gradient)
            got |= enumerate(differentiate(taps, lambda: loss.terms(self, plain(batch)), loss.name))
        else:
            for reached, run in self.passes(batch, targets):
                got |= zip(reached, collect([taps[i] for i in reached], run), strict=True)
        if unread := [targets[i] for i, rows in sorted(got.items()) if rows is None]:
            raise InputError(f"site {unread[0]} was not reached: the batch has no {unread[0].modality} for it.")
        return [got[i] for i in range(len(targets))]

    def capture(self, batch: ImageTextBatch, sites: Sites | None = None, gradient: Gradient = "") -> Tokens:
        """Activations of a batch, detached; token sites fill ``position`` and ``special``, too.

        Args:
            batch: What a loader with the options of :meth:`reading` makes.
            sites: One site per modality; default: :meth:`default_sites`.
            gradient: Loss whose derivatives fill ``grad``, see :meth:`read`.
        """
        return Host.capture_each(self, batch, {"": sites}, gradient)[""]

    def capture_each(
        self, batch: ImageTextBatch, choices: Mapping[str, Sites | None], gradient: Gradient = ""
    ) -> dict[str, Tokens]:
        """What :meth:`capture` gives at each of several choices of sites, ``{name: Tokens}``, read together."""
        chosen = {name: self.one_each(self.default_sites() if s is None else s) for name, s in choices.items()}
        every = list(dict.fromkeys(site for own in chosen.values() for site in own.values()))
        rows = dict(zip(every, self.read(batch, every, gradient), strict=True))
        return {name: Rows.tokens({m: rows[s] for m, s in own.items()}, batch) for name, own in chosen.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hint!r}, {'+'.join(self.modalities)}, {self.device}, {self.precision})"
