import pytest

from mmsae.errors import InputError
from mmsae.remote import pipe
from mmsae.remote.pipe import piped


def test_the_output_is_whole_and_leaves_nothing(cache_folder):
    with piped("pipe:printf 'some text' | cat") as file:
        assert file.read() == b"some text"
    assert list(cache_folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("printf half; exit 3", r"pipe:printf half; exit 3: the command ended with status 3 \(tried 3 times\)"),
        ("cat /no/such/file | cat", "status 1: cat: /no/such/file: No such file"),
        ("no-such-command-here", "status 127"),
    ],
)
def test_a_status_that_is_not_0_is_an_error(cache_folder, command, sentence):
    with pytest.raises(InputError, match=sentence):
        piped(f"pipe:{command}")
    assert list(cache_folder.parent.iterdir()) == []


def test_it_is_tried_again(cache_folder, tmp_path):
    mark = tmp_path / "mark"
    with piped(f"pipe:if [ -e {mark} ]; then echo good; else touch {mark}; exit 1; fi") as file:
        assert file.read() == b"good\n"
    assert pipe.TRIES > 1


def test_secrets_come_from_the_environment(cache_folder, monkeypatch):
    monkeypatch.setenv("MY_SECRET_URL", "hidden")
    with piped('pipe:printf "$MY_SECRET_URL"') as file:
        assert file.read() == b"hidden"
