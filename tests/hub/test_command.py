"""An SAE on its way to the hub and back: nothing is half there, its figures are in the card, every command takes it."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from mmsae import SAE, InputError
from mmsae.hub.command import pull, push
from mmsae.info import describe
from mmsae.interop import load
from mmsae.sae import TopK
from mmsae.sae.fingerprint import sae_fingerprint
from tests.helpers import hub as fake

FILES = ["README.md", "cfg.json", "mmsae_state.safetensors", "sae_weights.safetensors"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake.serving() as server:
        fake.used_by(server, monkeypatch, tmp_path / "hub")
        yield server


def make(folder, seed=0, d_sae=48):
    torch.manual_seed(seed)
    sae = SAE(8, d_sae, modalities=["image"], selector=TopK(3))
    sae.save_pretrained(folder, {"steps": 5})
    return SAE.from_pretrained(folder)


def row(score, value, control="", head="core", features="recon", **more):
    return {"head": head, "set": "test", "score": score, "features": features, "value": value, "n": 1500,
            "control": control, **more}  # fmt: skip


def evaluation(sae, **about):
    """What ``mmsae evaluate`` writes."""
    rows = [row("fvu", 0.034, low=0.033, high=0.035), row("fvu", 0.72, "random"), row("fvu", 0.36, "pca"),
            row("cosine", 0.98), row("MS", 0.5395, head="monosemanticity", features="code"),
            row("MS", 0.36, head="monosemanticity", features="raw"),
            row("MS", 0.37, head="monosemanticity"), row("MS", 0.2, "random", "monosemanticity"),
            row("MS", 0.41, "random", "monosemanticity", "code")]  # fmt: skip
    return {"sae": "runs/sae", "fingerprint": sae_fingerprint(sae), "d_sae": sae.d_sae, "host": "local-dir:clip",
            "host_fingerprint": "ab" * 16, "title": "A world", "images": {"train": 1500, "test": 1500}, "seed": 0,
            "warnings": ["few images"], "skipped": {"ood": "no sets"}, "controls": [], "rows": rows,
            **about}  # fmt: skip


def test_pushed_pulled_and_loaded_is_the_same(hub, capsys):
    sae = make("sae")
    assert push("sae", "me/sae", licence="mit") == "hf://me/sae"
    there = hub.repositories["models/me/sae"]
    assert sorted(there.files()) == FILES and there.messages == ["initial commit", "Upload SAE"]
    assert pull("me/sae", out="back") == "back"
    assert sorted(p.name for p in Path("back").iterdir()) == FILES
    for name in FILES[1:]:
        assert Path("back", name).read_bytes() == Path("sae", name).read_bytes()
    again = SAE.from_pretrained("me/sae")
    assert sae_fingerprint(again) == sae_fingerprint(sae) == sae_fingerprint(SAE.from_pretrained("back"))
    data = ModelCard(there.files()["README.md"].decode()).data
    assert data.license == "mit" and data.library_name == "mmsae"
    assert pull("me/sae", out="back") == "back" and "nothing to do" in capsys.readouterr().out
    make("back", seed=1)
    with pytest.raises(InputError, match="back is there already: choose another --out"):
        pull("me/sae", out="back")


def test_revisions_and_folders_wherever_an_sae_is_taken(hub):
    saes = {"a": make("of/a", 1), "b": make("of/b", 2, 64)}
    for name in saes:
        assert (
            push(f"of/{name}", "me/saes", revision="v1", subfolder=f"layer/{name}") == f"hf://me/saes@v1/layer/{name}"
        )
    assert sorted(hub.repositories["models/me/saes"].refs) == ["main", "v1"]
    assert hub.repositories["models/me/saes"].files("main") == {}
    for name, sae in saes.items():
        wanted = sae_fingerprint(sae)
        assert sae_fingerprint(SAE.from_pretrained(f"me/saes@v1/layer/{name}")) == wanted
        assert sae_fingerprint(SAE.from_pretrained("me/saes", revision="v1", subfolder=f"layer/{name}")) == wanted
        assert sae_fingerprint(load("me/saes", revision="v1", subfolder=f"layer/{name}")) == wanted
        assert describe(f"hf://me/saes@v1/layer/{name}")["latents"] == sae.d_sae
    assert pull("me/saes", revision="v1", subfolder="layer/b") == "b"  # the name of the folder, where it was
    assert SAE.from_pretrained("of", subfolder="a").d_sae == 48
    with pytest.raises(InputError, match=r"has no cfg.json in its main folder; there is one in layer/a, layer/b"):
        SAE.from_pretrained("me/saes@v1")
    with pytest.raises(InputError, match=r"me/saes has no cfg.json in layer; there is one in layer/a, layer/b"):
        pull("me/saes", revision="v1", subfolder="layer")
    with pytest.raises(InputError, match="has no revision 'v2'; it has main, v1"):
        pull("me/saes", revision="v2")
    assert not Path("saes").exists()


def test_the_card_has_the_figures_beside_their_controls(hub):
    sae = make("run/sae")
    Path("run/card").mkdir()
    Path("run/card/results.json").write_text(json.dumps(evaluation(sae)))
    push("run/sae", "me/sae")
    there = hub.repositories["models/me/sae"].files()
    text = there["README.md"].decode()
    assert "| core | test | fvu (recon) | 0.034 (0.033 to 0.035) | 0.72 | 0.36 |  | 1500 |" in text
    assert "| monosemanticity | test | MS (code) | 0.5395 | 0.41 |  | 0.36 | 1500 |" in text and "cosine" not in text
    assert text.count("| monosemanticity |") == 1
    assert f"*A world* on `local-dir:clip` (`{'ab' * 16}`); images: train 1,500, test 1,500; seed 0." in text
    assert "- Warning: few images" in text and "- Left out: ood: no sets" in text
    assert json.loads(there["results.json"])["rows"] == evaluation(sae)["rows"]
    pull("me/sae", out="back")
    assert json.loads(Path("back/results.json").read_text())["d_sae"] == 48
    # another SAE in its place has neither the figures nor the file
    make("run/sae", seed=3)
    push("run/sae", "me/sae")
    there = hub.repositories["models/me/sae"].files()
    assert "No evaluation was given" in there["README.md"].decode() and "results.json" not in there


def test_figures_of_another_sae_are_refused(hub):
    make("sae")
    other = make("other", seed=4)
    Path("results.json").write_text(json.dumps(evaluation(other)))
    with pytest.raises(InputError, match=r"results.json is of another SAE \(runs/sae, 48 latents\), not of sae"):
        push("sae", "me/sae", results="results.json")
    Path("results.json").write_text(json.dumps({"kept": 5}))
    with pytest.raises(InputError, match="is not what mmsae evaluate writes"):
        push("sae", "me/sae", results="results.json")
    with pytest.raises(InputError, match="no results of mmsae evaluate at nowhere"):
        push("sae", "me/sae", results="nowhere")
    assert not hub.repositories


def test_a_text_of_ones_own_stays(hub):
    make("sae")
    Path("sae/README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push("sae", "me/sae")
    assert hub.repositories["models/me/sae"].files()["README.md"].endswith(b"# Mine\n")
    with pytest.raises(InputError, match=r"README.md is your own text, which stays as it is"):
        push("sae", "me/sae", licence="apache-2.0")


def test_a_connection_that_breaks_leaves_nothing_and_the_next_try_goes_on(hub, monkeypatch):
    make("sae", d_sae=4096)
    push("sae", "me/sae")
    name, size = "sae_weights.safetensors", Path("sae/sae_weights.safetensors").stat().st_size
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("time.sleep", lambda s: None)
    hub.cuts[name] = 100
    with pytest.raises(InputError, match=r"me/sae: .*run the same command again"):
        pull("me/sae", out="back")
    assert not Path("back").exists() and not [p for p in Path().iterdir() if p.name.startswith(".back")]
    hub.asked.clear()
    hub.ranges.clear()
    hub.cuts[name] = 2
    for _ in range(3):  # versions of huggingface_hub go on within one call, or where the last one ended
        with suppress(InputError):
            pull("me/sae", out="back")
    assert Path("back", name).read_bytes() == Path("sae", name).read_bytes()
    starts = [first for path, first in hub.ranges if path == name and first]
    assert len(starts) >= 2 and 0.4 * size < starts[0] < starts[1] < size  # it went on where it was, twice
    assert not [path for verb, path in hub.asked if verb == "GET" and path.endswith("cfg.json")]  # which was whole


def test_push_to_hub_of_python(hub):
    sae = make("sae")
    assert sae.push_to_hub("me/mine", private=True, revision="dev", subfolder="x") == f"{hub.url}/me/mine"
    there = hub.repositories["models/me/mine"]
    assert there.private and sorted(there.files("dev")) == [f"x/{f}" for f in FILES]
    assert sae_fingerprint(SAE.from_pretrained("me/mine@dev/x")) == sae_fingerprint(sae)
    with pytest.raises(InputError, match="no name of a repository"):
        sae.push_to_hub("just-a-name")


def test_the_code_of_a_card_of_the_hub_runs(hub):
    make("sae")
    push("sae", "me/saes", subfolder="one")
    card = hub.repositories["models/me/saes"].files()["one/README.md"].decode()
    names = {"x": torch.randn(5, 8)}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["codes"].values.shape == (5, 3) and 'from_pretrained("hf://me/saes/one")' in card


def test_from_the_command_line(hub, tmp_path):
    make("sae")
    env = os.environ | fake.environment(hub, tmp_path / "home") | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def mmsae(*args):
        return subprocess.run([sys.executable, "-m", "mmsae.cli", *args], capture_output=True, text=True, env=env)

    done = mmsae("push", "sae", "me/sae", "--revision", "v1", "--licence", "apache-2.0")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "hf://me/sae@v1", done.stderr
    done = mmsae("pull", "me/sae@v1", "--out", "back")
    assert done.returncode == 0 and done.stdout.strip() == "back" and Path("back/cfg.json").is_file(), done.stderr
    done = mmsae("info", "hf://me/sae@v1")
    assert done.returncode == 0 and "latents: 48" in done.stdout, done.stderr
    env["HF_TOKEN"] = "hf_wrong"
    done = mmsae("push", "sae", "me/sae")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "mmsae: error: hf://me/sae: the hub refuses"
    )
    assert "hf_wrong" not in done.stderr + done.stdout
