"""Pages of situations and of analyses in a real browser: nothing is fetched, nothing complains, nothing sticks out."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmsae.cli import main
from tests.helpers.chromium import Chromium
from tests.helpers.scenarios import oracle_world

TASKS = {
    "diff": ["--split", "red"],
    "correlate": [],
    "cluster": ["--clusters", "3"],
    "retrieve": ["--queries", "red & ~circle", '"two objects" & cyan', "--host", "none"],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    oracle_world(root / "e", 600, 3)
    failed = np.random.default_rng(0).random(600) < 0.2
    uids = [f"{i:032x}" for i in range(600)]
    pq.write_table(pa.table({"uid": uids, "failed": failed}), root / "failures.parquet")
    main(["scenarios", str(root / "e"), "--query", "red & circle", "--failures", str(root / "failures.parquet"),
          "--progress", "false", "--out", str(root / "scenarios")])  # fmt: skip
    for task, more in TASKS.items():
        main(["analyse", task, str(root / "e"), *more, "--out", str(root / task)])
    return root


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)], ids=["desktop", "phone"])
def test_pages_are_whole_and_as_wide_as_the_window(pages, tmp_path, width, dark):
    window = Chromium(tmp_path, (width, 844), dark)
    try:
        for page in ("scenarios", *TASKS):
            address = f"file://{pages / page}/report.html"
            window.requests.clear()
            window.open("about:blank")
            window.open(address, f"document.readyState === 'complete' && location.href === {address!r}")
            assert window.run("document.documentElement.scrollWidth") <= width, page
            broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
            assert window.run("document.images.length") > 0 and window.run(broken) == 0, page
            shade = window.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
            assert (max(shade) < 60) == dark, page
            assert [r for r in window.requests if not r.startswith((address, "data:", "about:"))] == []
        assert window.errors == []
    finally:
        window.close()
