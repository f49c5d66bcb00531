"""A browser of planted evidence, and a window to look at it in."""

import pytest

from tests.helpers.browser import browser
from tests.helpers.chromium import Chromium


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return browser(tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    window = Chromium(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture
def at(window, made):
    """Opens a page of the browser; at the end nothing was complained of, and nothing outside the folder asked for."""

    def open_(path, until="document.querySelector('#page > *:not(.hint)')", beside=""):
        window.open("about:blank")
        window.open(f"file://{made.parent / beside if beside else made}/index.html{path}", until)
        return window

    open_.folder = made

    window.open(f"file://{made}/index.html#/about")
    window.run("localStorage.clear()")
    window.forget()
    yield open_
    assert window.errors == []
    assert [
        r for r in window.requests if not r.startswith((f"file://{made.parent}/", "data:", "blob:", "about:"))
    ] == []
