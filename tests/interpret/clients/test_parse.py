"""What answers say: nonsense is None, never a name or a vote."""

import pytest

from mmsae.interpret.clients.parse import concept, flags, json_in, one_number, phrases


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("Sure! ```json\n[0, 0, 1]\n```", [False, False, True]),
        ("[1, 0]", None), ("[1, 0, 2]", None), ('["1", "0", "1"]', None), ("yes, no, yes", None),
        ("", None), (None, None),
        ("[true, false, true]", [True, False, True]),
    ],
)  # fmt: skip
def test_flags(text, want):
    assert flags(text, 3) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [("3", 3), ("Image 3.", 3), ("3 (image 3)", 3), ("3 or 4", None), ("9", None), ("0", None), ("three", None),
     (None, None), ("2.5", None), ("-2", None)],
)  # fmt: skip
def test_one_number(text, want):
    assert one_number(text, 1, 5) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('["red", " Blue things. ", "", "green"]', ["red", "Blue things", "green"]), ("[]", []),
        ('["no clear pattern", "a", "b", "c", "d"]', ["a", "b", "c"]), ('["red", 3]', None), ("red", None),
        (None, None),
    ],
)  # fmt: skip
def test_phrases(text, want):
    assert phrases(text, 4) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"concept": "red circles", "where": "left"}', "red circles"),
        ('I think {this} is it: {"concept": " A dog. "}', "A dog"),
        ('{"concept": "unable to determine"}', ""), ('{"concept": "no common concept"}', ""),
        ('{"concept": ""}', ""), ('{"concept": null}', ""), ('{"idea": "dog"}', None), ("a dog", None),
        ('{"concept": 7}', None),
        ('{"concept": "' + "x" * 200 + '"}', None), ("[1]", None), (None, None),
    ],
)  # fmt: skip
def test_concept(text, want):
    assert concept(text) == want


def test_json_in_takes_the_first_that_is_whole():
    assert json_in('{"a": {"b": 1} {"c": 2}') == {"b": 1} and json_in("{") is None
