import json
import re

import numpy as np
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


def test_the_evidence_itself_is_no_control(tmp_path):
    planted(tmp_path / "evidence")
    with pytest.raises(InputError, match="is evidence of the SAE itself: collect some of random weights"):
        explore(str(tmp_path / "evidence"), control=str(tmp_path / "evidence"), progress=False)
    assert not (tmp_path / "browser").exists()


def test_an_sae_of_other_evidence_is_refused(tmp_path):
    planted(tmp_path / "evidence")
    with pytest.raises(InputError, match="is evidence of SAE ssssssssssss, and tests/before/files/sae/shared"):
        explore(str(tmp_path / "evidence"), sae="tests/before/files/sae/shared", progress=False)


def test_command_line(tmp_path, capsys):
    planted(tmp_path / "evidence")
    main(["explore", str(tmp_path / "evidence"), "--out", str(tmp_path / "b"), "--images", "none"])
    said = capsys.readouterr().out
    assert str(tmp_path / "b") in said and "there is no map, and no neighbours by atoms" in said
    with pytest.raises(SystemExit) as e:
        main(["explore", str(tmp_path)])
    assert e.value.code == 2 and "is no folder of evidence" in capsys.readouterr().err


# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as seen without one kind of cones
SEEN = {
    "all cones": np.eye(3),
    "no red ones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green ones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue ones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("eyes", SEEN)
def test_kinds_of_latents_are_told_apart_by_all_eyes(eyes):
    """CIELAB distances of at least 20 between the colours of latents of images, of texts and of both, and dead ones."""
    css = (STATIC / "browser.css").read_text()
    for found in [css.split("{", 1)[1].split("}")[0], css.split('[data-theme="dark"]')[1].split("}")[0]]:
        colours = re.findall(r"--(image|text|both|dead): #(\w{6})", found)
        assert len(colours) == 4
        code = np.array([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for _, c in colours])
        linear = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
        seen = (linear @ np.transpose(SEEN[eyes])).clip(0, 1)
        xyz = seen @ np.transpose([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2)
        assert apart[np.triu_indices(4, 1)].min() >= 20, dict(zip(colours, apart.round(), strict=True))
