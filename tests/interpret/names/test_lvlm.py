"""Names that a model says: what it is shown, what of its answers is a name, and how names are judged."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mmsae.cli import main
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.options import Asking
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.job import Naming
from mmsae.interpret.names.lvlm import explained, question, spread
from mmsae.interpret.names.options import Holding, Looking
from mmsae.interpret.names.spoken import drawn, spoken_candidates
from mmsae.interpret.shown import ItemViews
from mmsae.metrics.concepts.names import names_only, read_names
from tests.helpers.evidence import write_evidence
from tests.helpers.interpret import WORDS, planted


def sees(messages):
    """Names the word that all examples have and the silent ones lack."""
    text = messages[-1].text
    on, off = text.split("It does not respond to these")
    on, off = ([set(line.split()) for line in re.findall(r"^\d+\. (.*)$", part, re.M)] for part in (on, off))
    found = set.intersection(*on) - set.union(*off)
    return json.dumps({"concept": " ".join(found) if len(found) == 1 else None, "where": "", "others_lack": ""})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("lvlm") / "e", modality="text", embeddings={}, sae="a" * 32)


def test_a_model_names_what_the_examples_share(texts):
    ev = Evidence(texts)
    naming = Naming(ev, Looking(methods=("lvlm",)), Holding(), cache=False)
    asked = Asked(ScriptedClient(sees, name="scripted"), None)
    found = naming.run(asked=spoken_candidates(naming, asked, 0))
    named = names_only(found.names)
    assert len(named) >= 6 and all(WORDS[j] == n for j, n in named.items())
    assert all(found.names[j].by == "scripted" and found.names[j].method == "lvlm" for j in named)
    assert found.about["methods"] == ["lvlm"] and np.isnan(found.names[0].z)


UNREAD, NOTHING = "nonsense", "abstained"


@pytest.mark.parametrize(
    ("answer", "counted"),
    [("I think it is red", UNREAD), ('{"concept": "unable to tell"}', NOTHING), ('{"concept": null}', NOTHING),
     ("{}", UNREAD)],
)  # fmt: skip
def test_nonsense_and_abstentions_are_no_names(texts, answer, counted):
    naming = Naming(Evidence(texts), Looking(methods=("lvlm",)), Holding(), cache=False)
    asked = Asked(ScriptedClient(lambda m: answer), None)
    found = naming.run(asked=spoken_candidates(naming, asked, 5))
    assert not names_only(found.names)
    assert {k: asked.account[k] for k in (UNREAD, NOTHING)} == {UNREAD: 0, NOTHING: 0} | {counted: 5}
    assert (found.about["with_evidence"], found.about["suggested"], found.about["named"]) == (40, 0, 0)
    assert found.names[0].note == "nothing was suggested" and found.names[40].note == "never fires"


def test_only_some_latents_are_asked_about_and_the_rest_is_named_without(texts):
    naming = Naming(Evidence(texts), Looking(), Holding(), cache=False)
    client = ScriptedClient(sees)
    found = naming.run(asked=spoken_candidates(naming, Asked(client, None), 5))
    assert client.calls == 5 and len(names_only(found.names)) == 8
    assert drawn(np.arange(9), 0, 0).tolist() == list(range(9)) and len(drawn(np.arange(9), 4, 0)) == 4


def test_images_are_shown_with_heat_crops_and_silent_ones(tmp_path):
    rng, n = np.random.default_rng(0), 80
    z, images = np.zeros((n, 16, 1), np.float32), rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8)
    z[::2, 5] = rng.uniform(1, 2, (n // 2, 1))
    ev = Evidence(
        write_evidence(tmp_path / "e", {"image": z}, images=images, captions=["x y"] * n, grid={"image": (4, 4)})
    )
    naming = Naming(ev, Looking(), Holding(), cache=False)
    own = naming.examples("image").of(np.array([0]))
    system, user = question(0, ItemViews(ev, "image"), own)
    silent = min(5, int((own.hard >= 0).sum()))
    assert system.role == "system" and len(user.images) == 6 + 3 + silent
    sizes = [Image.open(io.BytesIO(i)).size for i in user.images]
    assert sizes[0] == (32, 32) and sizes[6] == (24, 24) and "Where it responds is red" in user.text
    half = ev.items.half[np.r_[own.positive[own.positive >= 0], own.hard[own.hard >= 0]]]
    assert (half == "train").all()
    assert explained([0], ItemViews(ev, "image"), naming.examples("image"),
                     Asked(ScriptedClient(lambda m: '{"concept": "noise"}'), None)) == {0: "noise"}  # fmt: skip


def test_examples_are_spread_over_strengths():
    assert spread(np.arange(20), 5) == [0, 5, 10, 14, 19] and spread(np.array([3, 1, -1]), 5) == [3, 1]


def test_the_command_asks_keeps_answers_and_goes_on(texts, tmp_path, capsys):
    client = f"script:{__name__}:sees"
    main(
        ["name", str(texts), "--out", str(tmp_path / "names"), "--client", client, "--asked", "0", "--methods", "lvlm"]
    )
    said = capsys.readouterr().out
    assert "40 questions, 0 known before" in said
    first = read_names(tmp_path / "names" / "names.json", "a" * 32)
    assert len(names_only(first)) >= 6
    main(
        ["name", str(texts), "--out", str(tmp_path / "names"), "--client", client, "--asked", "0", "--methods", "lvlm"]
    )
    assert "0 questions, 40 known before" in capsys.readouterr().out
    assert (Candidates.read(tmp_path) if (tmp_path / "names").exists() else None) is not None
    for args, words in (
        (["--methods", "lvlm"], "method lvlm asks a model: name one with --client"),
        (["--client", client, "--methods", "steering"], "has nothing to name latents by"),
    ):
        with pytest.raises(SystemExit):
            main(["name", str(texts), "--out", str(tmp_path / "other"), *args])
        assert words in capsys.readouterr().err


def babbles(messages):
    return "{" if "red" in messages[-1].text.split("It does not respond")[0] else '{"concept": null}'


def test_the_command_says_what_became_of_the_answers(texts, tmp_path, capsys):
    client = f"script:{__name__}:babbles"
    main(["name", str(texts), "--out", str(tmp_path / "n"), "--client", client, "--asked", "0", "--methods", "lvlm"])
    said = capsys.readouterr().out.splitlines()
    about = json.loads((tmp_path / "n" / "about.json").read_text())["account"]
    unread, nothing = about[UNREAD], about[NOTHING]
    assert unread + nothing == 40 and min(unread, nothing) > 0
    counts = f"0 had no answer, {unread} one that cannot be read, {nothing} one that there is nothing; cost 0.00"
    assert f"name: {__name__}:babbles: 40 questions, 0 known before; {counts}" in said
    assert "name: nothing was suggested for 40 of the latents with evidence" in said
    assert "name: 0 of 40 latents with evidence have a name that holds" in said


def test_asking_has_defaults():
    assert Asking().client == "" and Asking().asked == 50
