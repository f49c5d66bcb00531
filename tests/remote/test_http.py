import base64
import io

import pytest

from mmsae.errors import InputError
from mmsae.remote import http, places
from mmsae.remote.retry import TRIES, MayPass
from mmsae.remote.urls import Remote

DATA = bytes(range(256)) * 5000


@pytest.fixture
def place(server):
    server.files["/a.tar"] = DATA
    return f"{server.url}/a.tar"


def brought(url, tmp_path):
    (found,) = places.find([url])
    places.bring(found, tmp_path / "brought")
    return (tmp_path / "brought").read_bytes()


def test_found_and_brought(place, server, tmp_path):
    (found,) = places.find([place])
    assert found == Remote(place, len(DATA), found.tag) and found.tag.startswith('"')
    assert brought(place, tmp_path) == DATA
    assert places.tail(found, 10) == DATA[-10:] and places.tail(found, 10**9) == DATA
    assert server.sent["/a.tar"] == 1


@pytest.mark.parametrize("fault", ["cut", "503", "500"])
def test_what_may_pass_is_tried_again(fault, place, server, tmp_path):
    server.faults["/a.tar"] = [fault, fault]
    assert brought(place, tmp_path) == DATA
    assert server.faults["/a.tar"] == []


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("cut", r"the transfer was cut after \d+ of 1280000 bytes.*\(tried 6 times\)"),
        ("too long", r"had 1280000 bytes when it was found and has 1281000 now"),
        ("always 503", r"the server answers 503 .*\(tried 6 times\)"),
    ],
)
def test_what_does_not_pass_is_an_error(fault, sentence, place, server, tmp_path):
    server.faults["/a.tar"] = [fault] * (TRIES if fault == "cut" else 1)
    if fault == "too long":
        server.faults["/a.tar"] *= 2
    with pytest.raises(InputError, match=sentence):
        brought(place, tmp_path)


def test_a_server_that_always_says_more_than_it_sends(place, server, tmp_path):
    server.lies["/a.tar"] = 1000
    with pytest.raises(InputError, match=r"the transfer was cut after 1280000 of 1281000 bytes.*tried 6 times"):
        brought(place, tmp_path)


def test_a_file_that_changes_is_refused(place, server, tmp_path):
    (found,) = places.find([place])
    server.faults["/a.tar"] = ["other tag"]
    with pytest.raises(InputError, match=r'changed since it was found: its ETag was ".*" and is "another"'):
        places.bring(found, tmp_path / "x")
    server.files["/a.tar"] = DATA[:-1]
    with pytest.raises(InputError, match=r"had 1280000 bytes when it was found and has 1279999 now"):
        places.bring(found, tmp_path / "x")
    assert server.asked["/a.tar"] == 3  # none was tried again


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("404", "the server answers 404"),
        ("403", "it asks for credentials"),
        ("no length", "does not say how long it is"),
        ("to file:///etc/passwd", "from http to file is refused"),
        ("to ftp://example.org/a.tar", "from http to ftp is refused"),
        ("to http://10.0.0.1:9/a.tar", r"leads to 10\.0\.0\.1.* private network: it is refused"),
        ("to http://[::1]:9/a.tar", "leads to ::1"),
        ("to http://169.254.169.254/latest/meta-data", r"169\.254\.169\.254"),
    ],
)
def test_refused_at_once(fault, sentence, place, server, monkeypatch):
    made = []

    def connected(address, *args):
        if address[0] == "127.0.0.1":
            return real(address, *args)
        made.append(address)
        return Elsewhere(address[0])

    real = http.socket.create_connection
    monkeypatch.setattr(http.socket, "create_connection", connected)
    if fault == "no length":
        server.faults["/a.tar"] = ["no ranges", "no ranges"]
        monkeypatch.setattr(server, "faults", {"/a.tar": ["no length", "no ranges"]})
    else:
        server.faults["/a.tar"] = [fault]
    with pytest.raises(InputError, match=sentence):
        places.find([place])
    assert all(a[0] in fault for a in made)


class Elsewhere:
    """A connection to another address, to which nothing may be sent."""

    def __init__(self, host):
        self.host = host

    def getpeername(self):
        return (self.host, 9)

    def close(self):
        pass


def test_this_machine_is_refused_unless_it_is_named(place, monkeypatch):
    monkeypatch.delenv(http.ALLOWED)
    with pytest.raises(InputError, match=r"leads to 127\.0\.0\.1.*unless MMSAE_PRIVATE_HOSTS=127\.0\.0\.1 allows it"):
        places.find([place])
    with pytest.raises(InputError, match=r"leads to 127\.0\.0\.1"):
        places.find([place.replace("127.0.0.1", "localhost")])


def test_a_proxy_is_asked_with_public_names_alone(place, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv(http.ALLOWED)
    monkeypatch.setenv("no_proxy", "")
    server.files["http://data.example.org/a.tar"] = b"by proxy"  # a proxy is asked for the whole URL
    (found,) = places.find(["http://data.example.org/a.tar"])
    assert found.size == 8
    with pytest.raises(InputError, match="private network"):
        places.find(["http://10.0.0.1/a.tar"])


def test_redirects_are_followed_and_passwords_are_not_sent_along(place, server, tmp_path, monkeypatch):
    rc = tmp_path / "netrc"
    rc.write_text("machine 127.0.0.1 login me password secret\n")
    rc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(rc))
    server.secret = "Basic " + base64.b64encode(b"me:secret").decode()
    assert brought(place, tmp_path) == DATA
    server.secret = ""
    server.faults["/b.tar"] = [f"to {server.url.replace('127.0.0.1', 'localhost')}/a.tar"]
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1,localhost")
    server.heard.clear()
    places.find([f"{server.url}/b.tar"])
    assert "Authorization" in server.heard[0][1] and "Authorization" not in server.heard[1][1]


def test_a_server_without_parts_of_files(place, server, tmp_path):
    server.faults["/a.tar"] = ["no ranges"]
    (found,) = places.find([place])
    assert found.size == len(DATA) and places.tail(found, 10) is None


def test_a_server_that_is_not_there(cache_folder, monkeypatch):
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1")
    with pytest.raises(InputError, match=r"the server cannot be reached .*tried 6 times"):
        places.find(["http://127.0.0.1:9/a.tar"])


def test_an_empty_file(server):
    server.files["/e.tar"] = b""
    with pytest.raises(InputError, match="is empty"):
        places.find([f"{server.url}/e.tar"])


def test_waits_as_long_as_the_server_asks(place, server):
    assert http._seconds("7") == 7 and http._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0 == http._seconds(None)
    server.faults["/a.tar"] = ["cut"]
    (found,) = places.find([place])
    with pytest.raises(MayPass):
        http.download(found, io.BytesIO())


@pytest.mark.parametrize(
    "url",
    ["https://me:secret@example.org/a.tar", "https://b.s3.amazonaws.com/a.tar?X-Amz-Signature=abc",
     "https://example.org/a.tar?token=abc"],
)  # fmt: skip
def test_secrets_in_urls_are_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="would be written into results") as told:
        places.find([url])
    assert "abc" not in str(told.value) and "secret@" not in str(told.value)
