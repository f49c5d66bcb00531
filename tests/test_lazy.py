"""Packages import their names when they are used."""

import subprocess
import sys
import textwrap
from importlib import import_module

import pytest

import mmsae.report
from mmsae.world.generator.shards import write_world
from tests.helpers.encoders import MODELS, save_local

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


def test_cycles_are_collected_again_after_an_import_that_fails():
    said = fresh("""
        import gc
        from mmsae.lazy import uncollected
        try:
            with uncollected():
                print(gc.isenabled())
                raise ImportError("half way")
        except ImportError:
            print(gc.isenabled())
        gc.disable()
        with uncollected():
            pass
        print(gc.isenabled())  # whoever has them collected at other times is not interfered with
    """)
    assert said == ["False", "True", "False"]


def test_torch_is_imported_for_good_once():
    said = fresh("""
        import gc, sys
        from mmsae.lazy import torch_for_good
        torch_for_good()
        frozen = gc.get_freeze_count()
        print("torch" in sys.modules, frozen > 50_000, gc.isenabled())
        kept = [[] for _ in range(1000)]
        torch_for_good()  # what a process makes later is not taken away from the search for cycles
        print(gc.get_freeze_count() <= frozen)
    """)
    assert said == ["True", "True", "True", "True"]


# pyarrow brings pandas when it makes an array of a list, which is when the first part is written
NEEDLESS = "torch._dynamo sympy networkx sklearn scipy matplotlib pandas IPython ray diffusers".split()
TRAINING = ["lightning", "torchmetrics", "tensorboard", "datamodules"]


def test_extract_imports_little_before_its_first_batch(tmp_path):
    host = save_local(tmp_path / "clip", MODELS["vit"])
    write_world(tmp_path / "shards", 4, 0, "train")
    args = ["extract", "--host", host, "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "store")]
    said = fresh(f"""
        import sys
        from mmsae.activations.extract import Extraction
        from mmsae.cli import main
        first = Extraction.announce
        def announce(*args):
            first(*args)  # one batch has gone through the host
            print("@", *(m for m in {NEEDLESS + TRAINING} if m in sys.modules), "@")
        Extraction.announce = announce
        main({[*args, "--workers", "0", "--device", "cpu"]})
    """)
    assert "@" in said and said[said.index("@") + 1] == "@", said
