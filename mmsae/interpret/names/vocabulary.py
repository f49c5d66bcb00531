"""Lists of phrases that latents may be called.

``common`` ships with the package (``words/common.txt``, which says its sources and licences): the 1,000 ImageNet class
names as open_clip words them, and the project's own list of colours, materials, textures, parts, scenes and attributes.
``imagenet21k`` are the 21,843 nouns of WordNet behind ImageNet-21k, from the tables of timm. ``captions`` are the
phrases of the corpus itself.
"""

from __future__ import annotations

from pathlib import Path

from mmsae.files import lines_of, read_text
from mmsae.types import InputError

WORDS = Path(__file__).with_name("words")
LISTS = ("common", "imagenet21k")


def read_vocabulary(source: str) -> list[str]:
    """Phrases of a list by name, or of a text file with one a line (``#`` begins a comment), each once, in order.

    Raises:
        InputError: No such list or file, or one without phrases.
    """
    if source == "imagenet21k":
        from timm.data import ImageNetInfo

        table = ImageNetInfo("imagenet21k")
        lines = [table.index_to_description(i).split(",")[0] for i in range(table.num_classes())]
    else:
        path = WORDS / f"{source}.txt" if source in LISTS else Path(source)
        if source not in LISTS and not path.exists():
            raise InputError(
                f"vocabulary {source} is no file with a phrase a line, and not one of {', '.join(LISTS)}, captions"
            )
        lines = [line for line in lines_of(read_text(path)) if not line.startswith("#")]
    phrases = list(dict.fromkeys(p for line in lines if (p := " ".join(line.split()))))
    if not phrases:
        raise InputError(f"vocabulary {source} has no phrase")
    return phrases
