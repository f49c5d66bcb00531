import pytest

from mmsae.remote import http, retry
from tests.helpers.web import serving


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """A cache of the test's own, and no long waits."""
    monkeypatch.setenv("MMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    return tmp_path / "cache" / "shards"


@pytest.fixture
def server(cache_folder, monkeypatch):
    """A server on this machine, which is allowed by name."""
    monkeypatch.setenv(http.ALLOWED, "127.0.0.1")
    with serving() as server:
        yield server
