import pytest

from mmsae.remote.urls import check_url, file_name, is_url, path_of, shown


@pytest.mark.parametrize("text", ["s3://b/a.tar", "hf://datasets/o/n", "https://x.org/a.tar", "pipe:cat a.tar"])
def test_urls(text):
    assert is_url(text) and check_url(text) == text


@pytest.mark.parametrize("text", ["a.tar", "/d/a.tar", "C:/x.tar", "a:b/c.tar", "file:///d/a.tar", ""])
def test_paths(text):
    assert not is_url(text)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("s3://bucket/x/0.tar", "bucket/x/0.tar"),
        ("https://me:pw@x.org/y/0.tar?download=true", "me:pw@x.org/y/0.tar"),
        ("pipe:aws s3 cp s3://b/x/0.tar.gz - | gunzip", "b/x/0.tar.gz"),
        ("pipe:curl -s 'https://x.org/d/0.tar?v=1'", "x.org/d/0.tar"),
        ("pipe:cat /d/0.tar /d/1.tar", "/d/1.tar"),
    ],
)
def test_the_path_and_the_name(url, path):
    assert path_of(url) == path and file_name(url) == path.rpartition("/")[2]


def test_a_command_without_a_name_has_a_hash():
    one, other = file_name("pipe:make-data 1"), file_name("pipe:make-data 2")
    assert one != other and one.startswith("pipe-") and len(one) == 13


def test_messages_hold_neither_passwords_nor_queries():
    assert shown("https://me:pw@x.org/a.tar?sig=1") == "https://x.org/a.tar"
    assert shown("s3://b@c/a.tar") == "s3://b@c/a.tar"
