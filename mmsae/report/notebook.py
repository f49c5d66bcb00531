"""Images and codes in a notebook: plain matplotlib figures, and sliders where a notebook server can show them."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmsae.metrics.concepts.evidence import TopTable
from mmsae.report.figures import PALETTE
from mmsae.report.gallery import CodePair, as_array
from mmsae.types import IMAGE, TEXT

DPI = 80  # small files: a notebook with ten figures stays far below a megabyte


def interactive() -> bool:
    """Whether a slider would live: in a notebook, with ipywidgets, and not switched off by ``MMSAE_WIDGETS=0``.

    Pages made from executed notebooks have no kernel behind them, so whoever executes one to be read switches it off.
    """
    if os.environ.get("MMSAE_WIDGETS") == "0" or find_spec("ipywidgets") is None:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def slider(draw: Callable[..., Any], **choices: Sequence[Any]) -> None:
    """Call ``draw`` with its defaults, or let sliders call it with one of the choices of each argument."""
    if not interactive():
        draw()
        return
    from ipywidgets import SelectionSlider, interact

    defaults = {k: p.default for k, p in inspect.signature(draw).parameters.items()}
    interact(
        draw,
        **{k: SelectionSlider(options=list(v), value=defaults[k], continuous_update=False) for k, v in choices.items()},
    )


def show_images(
    images: Sequence[Any],
    titles: Sequence[str] = (),
    columns: int = 8,
    size: float = 1.3,
    rows: Sequence[str] = (),
    wrap: int = 18,
    title: str = "",
) -> None:
    """Images in a grid, row by row.

    Args:
        images: Images as :func:`as_array` takes them.
        titles: One above each.
        columns: Images in a row.
        size: Inches a side of one image.
        rows: Labels of the rows, on the left.
        wrap: Characters in a line of a title.
        title: Heading.
    """
    import matplotlib.pyplot as plt

    n = -(-len(images) // columns)
    titles = ["\n".join(textwrap.fill(line, wrap) for line in t.splitlines()) for t in titles]
    lines = max((t.count("\n") + 1 for t in titles), default=0)
    height = n * (size + 0.15 * lines) + (0.3 if title else 0)
    fig, axes = plt.subplots(n, columns, figsize=(columns * size, height), dpi=DPI, squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for i, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        ax.imshow(as_array(image), interpolation="nearest")
        if titles:
            ax.set_title(titles[i], fontsize=8)
    for ax, label in zip(axes[:, 0], rows, strict=False):
        ax.set_ylabel(textwrap.fill(label, wrap), fontsize=9, rotation=0, ha="right", va="center")
    if title:
        fig.suptitle(title, fontsize=10)
    plt.show()


def show_latents(
    latents: Sequence[int],
    tables: Mapping[str, TopTable],
    image_of: Callable[[str], Any],
    caption_of: Mapping[str, str],
    names: Mapping[int, str] | None = None,
    n_images: int = 8,
    n_captions: int = 3,
) -> None:
    """One line per latent: the images that it fires on most, and the captions that it fires on most, once each.

    ``tables`` are those of :func:`mmsae.metrics.top_evidence` by modality; ``image_of`` and ``caption_of`` take a uid.
    """
    import matplotlib.pyplot as plt

    size, wide = 0.8, 5.6
    _, axes = plt.subplots(
        len(latents), n_images + 2, figsize=((n_images + wide + 1.3) * size, len(latents) * size), dpi=DPI,
        squeeze=False, layout="constrained", width_ratios=[1.3, *[1] * n_images, wide],
    )  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    for line, j in zip(axes, latents, strict=True):
        label = textwrap.fill(f"#{j} {(names or {}).get(j, '')}".strip(), 14)
        line[0].text(1, 0.5, label, ha="right", va="center", fontsize=9, transform=line[0].transAxes)
        for ax, (uid, _) in zip(line[1:-1], tables[IMAGE].top(j), strict=False):
            ax.imshow(as_array(image_of(uid)), interpolation="nearest")
        captions = list(dict.fromkeys(caption_of[uid] for uid, _ in tables[TEXT].top(j)))[:n_captions]
        text = "\n".join(textwrap.shorten(c, 76) for c in captions)
        line[-1].text(0, 0.5, text, va="center", fontsize=8, transform=line[-1].transAxes)
    plt.show()


def show_codes(pairs: Sequence[CodePair], images: Sequence[Any] = ()) -> None:
    """Codes of pairs beside each other: bars to the left for the image, to the right for the text.

    ``pairs`` are from :func:`mmsae.report.compare_codes`, ``images`` are theirs.
    """
    import matplotlib.pyplot as plt

    bars = max(len(p.bars) for p in pairs)
    _, axes = plt.subplots(
        2, len(pairs), figsize=(5 * len(pairs), 1.4 + 0.26 * bars), dpi=DPI, squeeze=False, layout="constrained",
        height_ratios=[1, 0.26 * bars],
    )  # fmt: skip
    for (top, ax), pair, image in zip(axes.T, pairs, [*images, *[None] * len(pairs)], strict=False):
        top.axis("off")
        if image is not None:
            top.imshow(as_array(image), interpolation="nearest")
        caption = textwrap.fill(f"{pair.title}: {pair.caption}", 56)
        top.set_title(f"{caption}\ncosine of the codes {pair.cosine:.2f}", fontsize=9)
        at = range(len(pair.bars))
        shade = [1.0 if b.shared else 0.45 for b in pair.bars]
        for side, colour, sign in (("image_value", PALETTE[0], -1), ("text_value", PALETTE[1], 1)):
            drawn = ax.barh(at, [sign * getattr(b, side) for b in pair.bars], color=colour)
            for bar, alpha in zip(drawn, shade, strict=True):
                bar.set_alpha(alpha)
        ax.axvline(0, color="black", lw=0.7)
        ax.set_yticks(at, [b.label for b in pair.bars], fontsize=8)
        ax.invert_yaxis()
        ax.spines[["top", "right", "left"]].set_visible(False)
        limit = max(abs(x) for x in ax.get_xlim())
        ax.set_xlim(-limit, limit)
        ax.set_xticks([-limit / 2, limit / 2], ["image", "text"], fontsize=9)
    plt.show()
