"""The wheel holds everything and works from another folder; so does an editable install."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = "--trainer.max_steps 5 --trainer.val_check_interval 5 --trainer.enable_progress_bar false "
SMALL += "--data.pairs 512 --data.val_pairs 128 --data.batch_size 64"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is built, since building writes into its folder."""
    copy = tmp_path_factory.mktemp("source") / "mmsae"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("mmsae", "datamodules", "configs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def pip(*args):
    pytest.importorskip("pip")
    command = [sys.executable, "-m", "pip", *map(str, args), "--no-deps", "--no-index", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "-w", out, source)
    return next(out.glob("mmsae-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel, and an empty one to work in."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--target", target, wheel)
    return target, tmp_path_factory.mktemp("elsewhere")


def python(installed, *args, **kw):
    """Python in the other folder, with the installed wheel before everything else."""
    target, elsewhere = installed
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONPATH": str(target)}
    return subprocess.run([sys.executable, *args], cwd=elsewhere, env=env, capture_output=True, text=True, **kw)


def test_the_wheel_is_complete(wheel, source):
    with zipfile.ZipFile(wheel) as z:
        held = set(z.namelist())
    want = set()
    for folder in ("mmsae", "datamodules"):
        files = (p for p in (source / folder).rglob("*") if p.is_file())
        want |= {p.relative_to(source).as_posix() for p in files}
    want |= {f"mmsae/{p.relative_to(source).as_posix()}" for p in (source / "configs").rglob("*.*")}
    assert len([n for n in want if n.endswith(".yaml")]) >= 10
    assert want - held == set()
    extra = {n for n in held - want if ".dist-info/" not in n}
    assert extra == set(), "the wheel holds what is not in the source"
    assert any(n.endswith("licenses/LICENSE") for n in held)


def test_the_wheel_works_from_another_folder(installed):
    target, elsewhere = installed
    code = "import mmsae, datamodules; print(mmsae.__file__, datamodules.__file__, mmsae.__version__, sep='\\n')"
    done = python(installed, "-c", code, check=True)
    *files, version = done.stdout.split()
    assert all(Path(f).is_relative_to(target) for f in files), files
    assert version != "0.0.0"
    fit = ["-m", "mmsae.cli", "fit", "-c", "configs/smoke/paired_topk.yaml", *SMALL.split()]
    done = python(installed, *fit, "--trainer.default_root_dir", "run")
    assert done.returncode == 0, done.stderr
    cfg = json.loads((elsewhere / "run" / "sae" / "cfg.json").read_text())
    assert cfg["mmsae"]["training"]["steps"] == 5
    done = python(installed, "-m", "mmsae.cli", "fit", "-c", "configs/train/nothing.yaml")
    assert done.returncode == 2 and "train/vl_sae_store.yaml" in done.stderr and "Traceback" not in done.stderr


def test_the_command_is_installed(installed):
    script = next((installed[0] / "bin").glob("mmsae*"))
    done = python(installed, str(script), "--version", check=True)
    assert done.stdout.startswith("mmsae ")


def test_an_editable_install_finds_code_and_recipes(source, tmp_path):
    """The files that ``pip install -e`` puts into site-packages, tried without the editable install of this run."""
    build = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as z:
        z.extractall(site)
    code = f"""
import site; site.addsitedir({str(site)!r})
import mmsae, datamodules
from mmsae.recipes import find_recipe
print(mmsae.__file__, datamodules.__file__, find_recipe("configs/train/vl_sae_store.yaml"), sep="\\n")
"""
    # the new folder first: the finder of an editable mmsae in this environment has the same module name
    packages = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = subprocess.run(  # -S: the .pth files of this environment are not read, torch is found all the same
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": packages},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(Path(f).is_relative_to(source) for f in done.stdout.split()), done.stdout


STUB = r"""#!/usr/bin/env bash
case "$(basename "$0") $*" in
  FAILS) exit 3 ;;
  *" -m venv "*) bin="${@: -1}/bin"; mkdir -p "$bin"; cp "$0" "$bin/python"; cp "$0" "$bin/mmsae" ;;
  *" build "*) while [ "$1" != --out-dir ]; do shift; done; mkdir "$2"; touch "$2/mmsae-1.whl" "$2/mmsae-1.tar.gz" ;;
  *" list "*) echo torch==1 ;;
  *platform*) echo "Python of $(basename "$0")" ;;
esac
"""


@pytest.mark.parametrize(
    "fails", ["", "*--version*", "*mmsae*--help*", "mmsae?fit*", "mmsae?info*", "*pip?install*.whl*", "*pip?check*"]
)
def test_a_python_with_which_the_wheel_fails_is_named(fails, tmp_path):
    """What ``make wheels`` makes of a failure at any step, with Pythons and a uv that only pretend."""
    for name, pattern in (("good", "nothing"), ("bad", fails or "nothing"), ("uv", fails or "nothing")):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB.replace("FAILS", pattern))
        path.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    order = ["bad"] if "pip" in fails else ["good", "bad", "good"]  # one uv serves all
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "TMPDIR": str(temporary), "UVENV": str(tmp_path)}
    done = subprocess.run(
        ["bash", ROOT / "requirements" / "wheels.sh", *order], env=env, capture_output=True, text=True
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("Python of ")]
    assert said == [f"Python of {n}: {'FAILED' if fails and n == 'bad' else 'works'}" for n in order], done.stderr
    assert done.returncode == bool(fails)
    assert ("The wheel does not work with: bad" in done.stderr) == bool(fails)
    assert list(temporary.iterdir()) == []
