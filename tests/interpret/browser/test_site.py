import json
import re

import pytest

from mmsae.cli import main
from mmsae.interpret.browser.command import explore
from mmsae.interpret.browser.site import SCRIPTS, STATIC
from mmsae.types import InputError
from tests.helpers.browser import SAE, browser, planted


def test_the_folder_is_whole_and_names_nothing_outside(tmp_path):
    folder, _ = browser(tmp_path)
    assert json.loads((folder / "browser.json").read_text())["sae"] == SAE
    page = (folder / "index.html").read_text()
    used = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert {u for u in used if not u.startswith(("data:", "#"))} == {"app/browser.css", *(f"app/{s}" for s in SCRIPTS)}
    assert all((folder / u).is_file() for u in used if u.startswith("app/"))
    assert "http:" not in page and "https:" not in page
    assert sorted(SCRIPTS) == sorted(p.relative_to(STATIC).as_posix() for p in STATIC.rglob("*.js"))


def test_texts_never_become_markup():
    for path in STATIC.glob("*.js"):
        unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|fetch\(|import\("
        assert not re.search(unsafe, path.read_text()), path.name


def test_made_again_and_not_over_other_things(tmp_path):
    folder, _ = browser(tmp_path)
    (folder / "mine.txt").write_text("x")
    explore(str(tmp_path / "evidence"), out=str(folder), progress=False)  # a browser may be replaced
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds other things and no browser\.json"):
        explore(str(tmp_path / "evidence"), out=str(other), progress=False)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_names_of_another_sae_are_refused(tmp_path):
    planted(tmp_path / "evidence")
    names = tmp_path / "evidence" / "names" / "names.json"
    names.parent.mkdir()
    names.write_text(json.dumps({"format": 1, "sae": "t" * 32, "names": {}}))
    with pytest.raises(InputError, match="names latents of SAE tttttttttttt, not of ssssssssssss"):
        explore(str(tmp_path / "evidence"), progress=False)
    assert not (tmp_path / "browser").exists()


def test_an_sae_of_other_evidence_is_refused(tmp_path):
    planted(tmp_path / "evidence")
    with pytest.raises(InputError, match="is evidence of SAE ssssssssssss, and tests/before/files/sae/shared"):
        explore(str(tmp_path / "evidence"), sae="tests/before/files/sae/shared", progress=False)


def test_command_line(tmp_path, capsys):
    planted(tmp_path / "evidence")
    main(["explore", str(tmp_path / "evidence"), "--out", str(tmp_path / "b"), "--images", "none"])
    assert str(tmp_path / "b") in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        main(["explore", str(tmp_path)])
    assert e.value.code == 2 and "is no folder of evidence" in capsys.readouterr().err
