"""Where on a host: site specs, and what the tensor of a module looks like.

A spec is a virtual endpoint (``image.embed``, ``text.pooled``) or ``MODULE.PATH:io[tokens]`` in the host's own naming.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mmsae.hosts.hooks import ModulePort, Port
from mmsae.hosts.tokens import Layout, check_policy, find_layout
from mmsae.types import InputError

if TYPE_CHECKING:
    from mmsae.hosts.base import Host


_SPEC = re.compile(r"(?P<module>[\w.]+)(?::(?P<io>\w+))?(?:\[(?P<tokens>\w+)\])?")


class Target(NamedTuple):
    """A site spec, resolved on one host.

    Attributes:
        module: Module path or virtual endpoint.
        io: ``in``, ``out`` or ``update``.
        tokens: Token policy.
        modality: Which encoder computes it.
        layout: What the host's tensor looks like.
    """

    module: str
    io: str
    tokens: str
    modality: str
    layout: Layout

    @property
    def has_tokens(self) -> bool:
        """Whether the host's tensor has a token axis."""
        return self.layout.ndim > 2

    @property
    def pooled(self) -> bool:
        """Whether there is one row per item."""
        return self.tokens == "pooled"

    def __str__(self) -> str:
        return f"{self.module}:{self.io}[{self.tokens}]"


def resolve(host: Host, spec: str) -> Target:
    """What a spec means on a host.

    Raises:
        InputError: The spec is malformed, or names a module, io or token policy that the host does not have there.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"site {spec!r} is not of the form MODULE.PATH:io[tokens] or MODALITY.embed.")
    module, io = match["module"], match["io"] or "out"
    if io not in ("in", "out", "update"):
        raise InputError(f"site {spec!r}: io {io!r} is not one of in, out, update.")
    virtual = module in host.endpoints
    if virtual and io != "out":
        raise InputError(f"site {spec!r}: the endpoint {module} has io 'out' only.")
    modality = module.split(".")[0] if virtual else host._modality(module)
    layout = host._layout(module, io, modality)
    tokens = match["tokens"] or ("all" if layout.ndim > 2 else "pooled")
    check_policy(tokens, layout, modality, host._has_cls(modality), f"site {spec!r}")
    return Target(module, io, tokens, modality, layout)


def find_port(host: Host, module: str, io: str) -> Port:
    """The tensor that a module path or an endpoint names.

    Raises:
        InputError: No such module; the message has near matches.
    """
    if module in host.endpoints:
        return host._endpoint(module)
    try:
        return ModulePort(host.model.get_submodule(module), io)
    except AttributeError:
        names = [*host.endpoints, *(n for n, _ in host.model.named_modules())]
        near = difflib.get_close_matches(module, names, n=5, cutoff=0.5)
        hint = f"near matches: {', '.join(near)}" if near else f"endpoints: {', '.join(host.endpoints)}"
        raise InputError(f"host {host.hint} has no module or endpoint {module!r}; {hint}.") from None


def probe(host: Host, module: str, io: str, modality: str) -> Layout:
    """What a site's tensor looks like, found by running the host on one item and on two.

    Raises:
        InputError: The host never calls the module, calls it several times, or its tensor is no set of features.
    """
    shapes, where = [], f"{module}:{io}"

    def note(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise InputError(f"{where} cannot be a site: its tensor is {x.dtype}, not floating point.")
        shapes.append(x.shape)
        return x

    with find_port(host, module, io).attach(note):
        for n in (1, 2):
            host._run(modality, host._probe_input(modality, n))
    if len(shapes) != 2:
        calls = "never called" if not shapes else f"called {len(shapes) // 2} times"
        raise InputError(f"{where} cannot be a site: it is {calls} when the host encodes one {modality} batch.")
    return find_layout(*shapes, channels_last=host._channels_last(), where=where)


UNCOND, COND = 0, 1  # the guidance branches of a diffusion pipeline


class Where(NamedTuple):
    """Which rows of which call an edit sees.

    Attributes:
        item: ``(N,)`` row of the batch (of batch times beams while beams are searched; of the prompts in a pipeline).
        position: ``(N,)`` which token: place in the item's own sequence, padding not counted in language models, row by
            row in maps; None for pooled sites and means.
        image: ``(N,) bool``, image tokens, where one sequence holds image and text; else None.
        special: ``(N,) bool``, class, register, BOS, EOS, padding or template tokens; None for pooled sites and means.
        start: Tokens in the cache of a language model: 0 at the beginning of a prompt and on all other hosts.
        prompt: Tokens of the prompt in a language model; None where that is not known and several tokens come onto a
            cache, which a piece of a prompt and tokens on trial both do.
        grid: ``(H, W)`` where the tokens are the cells of a map, and ``position`` is ``y * W + x``.
        branch: ``(N,)`` :data:`COND` or :data:`UNCOND`, in a diffusion pipeline; else None.
        step: Which step of a generation is under way, counted from 0; None outside of one (text encoders too).
    """

    item: Tensor
    position: Tensor | None = None
    image: Tensor | None = None
    special: Tensor | None = None
    start: int = 0
    prompt: int | None = 0
    grid: tuple[int, int] | None = None
    branch: Tensor | None = None
    step: int | None = None

    def prefill(self) -> bool:
        """Whether the call reads the prompt (as it always is on hosts that do not decode) or what was generated.

        Raises:
            InputError: That cannot be told.
        """
        if self.start and self.prompt is None:
            raise InputError(
                f"several tokens at once come onto a cache of {self.start}, and whether they are the prompt's or were "
                "generated cannot be told: run the model through the host's generate()."
            )
        return self.start < max(1, self.prompt or 0)
