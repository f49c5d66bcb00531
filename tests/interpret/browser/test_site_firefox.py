"""The browser in the other engine: it opens from a disk and loads what it shows; keys, search, dark colours work."""

from tests.helpers.browser import browser
from tests.helpers.firefox import Firefox


def test_firefox_opens_it_from_a_disk(tmp_path):
    folder, _ = browser(tmp_path / "run")
    address = f"file://{folder}/index.html"
    (tmp_path / "profile").mkdir()
    w = Firefox(tmp_path / "profile", (1200, 800), dark=True)
    try:
        w.open(address, "document.querySelectorAll('.tile img').length > 5")
        assert w.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
        w.key("j"), w.key("j"), w.key("\ue007")  # Enter
        w.wait("location.hash.startsWith('#/latent/') && document.querySelectorAll('.shot canvas.map').length > 3")
        w.key("b")
        assert w.run("document.querySelector('.title .star').textContent") == "★"
        w.key("t")
        assert w.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 250)"
        w.open("about:blank")
        w.open(f"{address}#/?q=word7", "document.querySelector('.tile .head small')?.textContent === '#7'")
        w.open("about:blank")
        last = "document.querySelector('.tile .head small')?.textContent === '#11'"
        w.open(f"{address}#/?filter=shared&order=index&up=1", last)
        w.run("document.querySelectorAll('.chip')[2].click()")
        w.wait(
            "location.hash === '#/?filter=image&order=index&up=1' && document.querySelectorAll('.tile').length === 6"
        )
        w.run("history.back()")
        w.wait(f"location.hash === '#/?filter=shared&order=index&up=1' && {last}")
        w.open("about:blank")
        sample = (
            "document.querySelectorAll('.where .map').length > 1 && document.querySelectorAll('.sample img').length"
        )
        w.open(f"{address}#/sample/{7:032x}", sample)
        w.open("about:blank")
        w.open(f"{address}#/query?q=%237", "document.querySelectorAll('.sample img').length > 3")
        w.open("about:blank")
        w.open(
            f"{address}#/query?q=count(%237)%20%3C%202",
            "document.querySelector('.hint').textContent.includes('Holds of')",
        )
        assert w.errors == []
        assert [r for r in w.requests if not r.startswith((f"file://{folder}/", "data:", "blob:", "about:"))] == []
    finally:
        w.close()
