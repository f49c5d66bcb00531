"""The lock holds everything that pyproject.toml asks for, on every Python that it is for, and comes from PyPI alone."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
sys.path.insert(0, str(ROOT / "requirements"))
from moved import entries, main  # noqa: E402


@pytest.fixture(scope="module")
def asked():
    """Requirements of pyproject.toml, with those of the extra ``test``, its own extras and the build."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    own = ("test", "docs", "fast", "lite0", "notebooks", "ray", "wordnet")
    lines += [r for e in own for r in extras[e] if not r.startswith("mmsae[")]
    assert extras["test"][0] == "mmsae[docs,fast,lite0,notebooks,ray,wordnet]"
    return [Requirement(r) for r in lines]


def at(path, python):
    """``{name: version}`` of a file on a Python of Linux x86-64."""
    here = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": "linux"}
    here |= {
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_system": "Linux",
        "os_name": "posix",
    }
    found = [r for r in map(Requirement, entries(path)) if r.marker is None or r.marker.evaluate(here)]
    names = [r.name for r in found]
    assert len(set(names)) == len(names)
    return {r.name: next(iter(r.specifier)).version for r in found}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_has_all_that_is_asked_for(asked, python):
    held = at(ROOT / "requirements" / "lock.txt", python)
    wrong = {str(r): held.get(canonicalize_name(r.name)) for r in asked}
    wrong = {r: v for r, v in wrong.items() if v is None or v not in Requirement(r).specifier}
    assert wrong == {}, "make lock"
    assert len(held) > len(asked)


def test_the_oldest_are_the_lower_bounds(asked):
    floors = {canonicalize_name(r.name): s.version for r in asked for s in r.specifier if s.operator == ">="}
    held = at(ROOT / "requirements" / "oldest.txt", "3.11")
    lines = [Requirement(x) for x in (ROOT / "requirements" / "oldest.in").read_text().splitlines() if "==" in x]
    assert {"transformers", "diffusers", "timm", "open-clip-torch"} == {r.name for r in lines}
    for r in lines:
        version = next(iter(r.specifier)).version
        assert Version(version) == Version(floors[r.name]), r.name
        assert held.get(r.name, at(ROOT / "requirements" / "lock.txt", "3.11")[r.name]) == version


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_everything_has_hashes_and_no_place(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.lstrip().startswith("#")]
    assert not [x for x in lines if re.search(r"://|@|^-", x)], "an index, a link or a path"
    for line, entry in entries(path).items():
        assert re.fullmatch(r"[\w.-]+==\S+( ; .*)?", line) and re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), line
    assert len(entries(path)) == sum(not x.startswith(" ") for x in lines)


def test_what_moved_is_told(tmp_path, capsys):
    lock, new = tmp_path / "lock", tmp_path / "new"
    lock.write_text("# by uv\na==1 \\\n    --hash=sha256:1\nb==1 ; python_version > '3' \\\n    --hash=sha256:2\n")
    new.write_text(
        "a==1 \\\n    --hash=sha256:1\nb==2 ; python_version > '3' \\\n    --hash=sha256:3\n    # via a\n"
        "c==3 ; python_version < '3' \\\n    --hash=sha256:4\nd==4 \\\n    --hash=sha256:5\n"
    )
    main(lock, new)
    out, told = capsys.readouterr()
    assert out == (
        "b==2 ; python_version > '3' \\\n    --hash=sha256:3\nc==3 ; python_version < '3' \\\n    --hash=sha256:4\n"
        "d==4 \\\n    --hash=sha256:5\n"
    )
    assert told == "b 1 -> 2\nd (none) -> 4\n"
    main(lock, lock)
    assert capsys.readouterr() == ("", "")


def test_the_changelog_has_this_version():
    """*Unreleased*, then releases with dates, the newest first; between releases the version is the next .dev0."""
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    now = Version(toml.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    first, *heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "[Unreleased]" and heads
    found = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head) for head in heads]
    assert all(found), heads
    versions, dates = [Version(f[1]) for f in found], [f[2] for f in found]
    assert versions == sorted(versions, reverse=True) and dates == sorted(dates, reverse=True)
    assert now == versions[0] if not now.is_devrelease else now > versions[0]
