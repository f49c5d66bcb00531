"""Names by steering (method ``steering``): a latent is put into a vision-language model, which then says what it sees.

The latent's atom is added to all image rows of a blank image at the SAE's own site, by several times its mean value,
and the model is asked what it sees; the same is asked, with the latent put in, about the items on which it is largest.
It is the idea of arXiv 2603.22593 as the project's issue tells it: the paper's prompts and strengths were not at hand.
What the model says of a blank image without the latent is no name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from mmsae.types import IMAGE, InputError

TIMES = (4.0, 8.0)  # the mean value of a latent where it fires
#: What is asked of a blank image, and of the top images.
ASKS = (
    "What do you see in this image? Answer with a word or a few.",
    "What do these images have in common? Answer with a word or a few.",
)
SIDE, GREY = 224, (128, 128, 128)
LONGEST = 6  # words
MAX_TOKENS = 12  # of an answer
_LEAD = re.compile(
    r"^(i (can )?see|(this|the) (image|picture|photo)s? (shows?|is|are|has|have|contains?|depicts?)( of)?|it is|"
    r"there (is|are)|(an?|the) (image|picture|photo) of)\s+",
    re.I,
)
_ARTICLE = re.compile(r"^(an?|the|some)\s+", re.I)


def brief(answer: str) -> str:
    """The first words of an answer as a name: ``This image shows a red circle.`` is ``red circle``; may be empty."""
    text = re.split(r"[.;:!?\n,]", answer.strip())[0].strip(" \"'*")
    while (shorter := _ARTICLE.sub("", _LEAD.sub("", text))) != text:
        text = shorter
    return " ".join(text.split()[:LONGEST]).lower()


def image_site(host: Any, sae: Any) -> Any:
    """The site at which the SAE reads images of this host.

    Raises:
        InputError: The SAE reads no images of it.
    """
    from mmsae.steering.edits.attach import check_site

    if IMAGE not in sae.sites:
        raise InputError("naming by steering needs an SAE on image rows of a vision-language model")
    return check_site(host, sae.sites[IMAGE], sae)[0]


def mosaic(images: Sequence[Any], side: int = SIDE) -> Any:
    """Up to nine images in a square, blank where there are fewer; a blank image of none."""
    from PIL import Image

    out = Image.new("RGB", (side, side), GREY)
    per = 1 if len(images) <= 1 else 2 if len(images) <= 4 else 3
    cell = side // per
    for i, image in enumerate(images[: per * per]):
        out.paste(image.resize((cell, cell)), (cell * (i % per), cell * (i // per)))
    return out


def steered_answers(
    host: Any,
    sae: Any,
    latents: Sequence[int],
    mean: Sequence[float],
    images: Callable[[int], Sequence[Any]],
    times: Sequence[float] = TIMES,
    asks: tuple[str, str] = ASKS,
    done: Callable[[], object] = lambda: None,
    max_tokens: int = MAX_TOKENS,
    kept: Callable[[int, Callable[[], list[str]]], list[str]] = lambda latent, answers: answers(),
) -> dict[int, list[str]]:
    """``{latent: names}`` that a vision-language model gives with a latent put in, each once, weakest dose first.

    Args:
        host: The model.
        sae: An SAE on its image rows.
        latents: Which latents.
        mean: The mean value of each where it fires, in the SAE's units.
        images: ``latent -> its strongest images``.
        times: How many times the mean is added.
        asks: What is asked of a blank image, and of the top images.
        done: Called after every latent.
        max_tokens: Length of answers.
        kept: ``(latent, how its answers are made) -> them``, for answers that are known from before.
    """
    from mmsae.steering.edits.attach import attach
    from mmsae.steering.edits.edit import Edit
    from mmsae.steering.edits.intervention import Intervention

    site, out = image_site(host, sae), {}

    def ask(image: Any, text: str) -> str:
        return brief(host.answer(host.collate.batch([text], [image]), max_new_tokens=max_tokens)[0])

    nothing = cache(lambda: ask(mosaic([]), asks[0]))

    def answers(j: int, value: float) -> list[str]:
        said, top = [], mosaic(images(j))
        for dose in times:
            with attach(host, {site: (sae, Intervention(Edit.add([j], float(dose * value)), unit="raw"))}):
                said += [ask(mosaic([]), asks[0]), ask(top, asks[1])]
        return [s for s in dict.fromkeys(said) if s and s != nothing()]

    for j, value in zip(latents, mean, strict=True):
        out[j] = kept(j, partial(answers, j, value))
        done()
    return out
