"""Lists of phrases: what ships is what its source has, and bad files are refused."""

import pytest

from mmsae.interpret.names.vocabulary import WORDS, read_vocabulary
from mmsae.types import InputError


def test_the_list_that_ships_has_its_sources_and_every_phrase_once():
    import open_clip

    phrases, text = read_vocabulary("common"), (WORDS / "common.txt").read_text()
    assert phrases[: len(set(open_clip.IMAGENET_CLASSNAMES))] == list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    assert {"red", "striped", "two objects", "sunset"} <= set(phrases) and len(phrases) == len(set(phrases)) > 1600
    assert "MIT licence" in text and "Apache-2.0" in text


def test_nouns_of_wordnet_come_from_timm():
    nouns = read_vocabulary("imagenet21k")
    assert len(nouns) > 20_000 and "snapping turtle" in nouns and not any("," in n for n in nouns)


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("# mine\nred  circle\n\nblue\nred circle\n")
    assert read_vocabulary(str(file)) == ["red circle", "blue"]
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match=r"words\.txt has no phrase"):
        read_vocabulary(str(file))
    with pytest.raises(
        InputError, match="is no file with a phrase a line, and not one of common, imagenet21k, captions"
    ):
        read_vocabulary("nothing")
