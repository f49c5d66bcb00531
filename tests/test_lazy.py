"""Packages import their names when they are used."""

import subprocess
import sys
import textwrap
from importlib import import_module

import pytest

import mmsae.report

PACKAGES = "activations interop jobs metrics report sae steering training".split()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there(package):
    module = import_module(f"mmsae.{package}")
    assert not [name for name in module.__all__ if type(getattr(module, name)).__name__ == "module"]


def fresh(code):
    """What a new Python says, by words."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_names_are_imported_when_they_are_used():
    packages = ", ".join(f"mmsae.{p}" for p in PACKAGES)
    said = fresh(f"import sys, {packages}; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])")
    assert said == ["[]"]


def test_a_name_is_not_hidden_by_a_module(tmp_path):
    (tmp_path / "fruit").mkdir()
    (tmp_path / "fruit" / "__init__.py").write_text(
        "from mmsae.lazy import lazy\n__all__, __getattr__ = lazy(__name__, {'peel': 'peel', 'pear': 'Pear'})\n"
    )
    (tmp_path / "fruit" / "peel.py").write_text("def peel():\n    return 'peeled'\n")
    (tmp_path / "fruit" / "pear.py").write_text("class Pear:\n    pass\n")
    said = fresh(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import fruit
        print("fruit.pear" in sys.modules)
        import fruit.peel  # the module is no name of the package, its function is
        print(fruit.peel(), fruit.Pear.__name__, fruit.pear.__name__)
        from fruit import Pear, peel
        print(peel(), hasattr(fruit, "plum"))
    """)
    assert said == ["False", "peeled", "Pear", "fruit.pear", "peeled", "False"]


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"'mmsae\.report' has no attribute 'nothing'"):
        mmsae.report.nothing  # noqa: B018  the attribute is asked for
