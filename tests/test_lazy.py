import subprocess
import sys

import pytest

from mmsae.lazy import lazy


@pytest.mark.parametrize("package", ["metrics", "report"])
def test_every_name_is_there(package):
    module = __import__(f"mmsae.{package}", fromlist=["x"])
    assert all(getattr(module, name) for name in module.__all__)


def test_names_are_imported_when_they_are_used():
    code = "import sys, mmsae.metrics, mmsae.report; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="'here' has no attribute 'nothing'"):
        lazy("here", {"there": "some thing"})[1]("nothing")
