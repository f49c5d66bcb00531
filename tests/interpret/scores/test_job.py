"""All scorers on planted latents, beside random ones and names of others; files, page and refusals."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae.cli import main
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.names.job import Naming, write_named
from mmsae.interpret.names.options import Holding, Looking
from mmsae.interpret.scores.job import ScoreJob, names_in, write_scores
from mmsae.interpret.scores.options import Judging
from mmsae.interpret.scores.report import write_report
from mmsae.interpret.scores.table import ScoreRows
from mmsae.metrics.concepts.names import LatentName, read_names, write_names
from mmsae.types import InputError
from tests.helpers.interpret import OTHER, WORDS, ToyEmbedder, planted
from tests.interpret.scores.test_asking import knows
from tests.interpret.scores.test_surprisal import expects


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    (root / "words.txt").write_text("\n".join(WORDS + OTHER))
    # the images of captions are those of the evidence's images: one space, as a CLIP's
    for name, real in (("evidence", True), ("control", False)):
        planted(root / name, n=800, real=real, random=16 if real else 0, images=pictures(800), sae=name * 4)
        ev = Evidence(root / name)
        naming = Naming(ev, Looking(vocabulary=str(root / "words.txt")), Holding(), cache=False)
        naming.embedders = {"image": ToyEmbedder()}
        if real:
            write_named(root / name / "names", naming.run(), name * 4)
    return root


@pytest.fixture
def job(place, monkeypatch):
    monkeypatch.setattr(ScoreJob, "embedder", lambda self, ev, modality: ToyEmbedder())
    monkeypatch.setattr(Naming, "embedders", {"image": ToyEmbedder()})

    def make(control=True, asked=None, **judging):
        beside = Evidence(place / "control") if control else None
        return ScoreJob(Evidence(place / "evidence"), beside, Judging(**judging), asked, most=8)

    return make


def test_where_all_latents_have_one_name_it_is_said_that_none_is_anothers(place, tmp_path):
    shutil.copytree(place / "evidence", tmp_path / "e")
    (tmp_path / "one.txt").write_text("red\n")
    ev = Evidence(tmp_path / "e")
    naming = Naming(ev, Looking(("centroid",), vocabulary=str(tmp_path / "one.txt")), cache=False)
    naming.embedders = {"image": ToyEmbedder()}
    write_named(tmp_path / "e" / "names", naming.run(), "evidence" * 4)
    job = ScoreJob(ev, judging=Judging())
    assert [s.control for s in job.subjects()] == ["", "dealt"]
    assert job.left_out == {"names of others, by images": "all latents have one name"}


def means(found, which="all"):
    return {(r["scorer"], r["control"]): r["mean"] for r in found["summary"] if r["which"] == which}


def test_names_score_high_controls_at_chance(job, tmp_path):
    made = job()
    rows, found, subjects = made.run()
    named, every = means(found, "named"), means(found)
    assert named["judge", ""] > 0.95 and named["example_embedding", ""] > 0.9 and named["intruder", ""] > 0.6
    assert abs(every["judge", "shuffled"] - 0.5) < 0.1 and abs(every["judge", "random"] - 0.5) < 0.12
    assert abs(every["intruder", "random"] - 0.2) < 0.1 and abs(every["example_embedding", "random"] - 0.5) < 0.1
    assert ("intruder", "shuffled") not in every and ("judge", "dealt") not in every  # it shows no name
    assert abs(every["intruder", "dealt"] - 0.2) < 0.1 and abs(every["example_embedding", "dealt"] - 0.5) < 0.1
    assert named["simulation", ""] > 0.5 and abs(every["simulation", "shuffled"]) < 0.15
    assert abs(every["simulation", "random"]) < 0.2
    assert made.left_out["embedding"] == "the evidence has no embeddings of texts"
    has = ~np.isnan(rows.value)  # whatever has a value has its chance level, outcomes and interval
    assert not np.isnan([rows.chance[has], rows.low[has], rows.high[has]]).any() and (rows.n[has] > 0).all()
    assert (rows.low[has] <= rows.value[has]).all() and (rows.value[has] <= rows.high[has]).all()
    real = rows.rows((rows.control == "") & (rows.scorer == "judge"))
    assert real.named.sum() == 8 and len(real.latent) == 24
    write_scores(tmp_path, rows, found)
    assert json.loads((tmp_path / "scores.json").read_text())["job"]["control"] == "control" * 4
    assert len(ScoreRows.read(tmp_path).latent) == len(rows.latent)
    page = write_report(tmp_path, rows, found, subjects).read_text()
    assert "names of others" in page and "The best of random weights" in page and "data:image/webp" in page
    assert "red" in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_client_is_asked_about_some_latents_and_a_repeat_asks_nothing(job, tmp_path):
    client = ScriptedClient(lambda m: "?", lambda p, t: expects(p.replace(".", " "), t))
    asked = Asked(client, tmp_path)
    rows, found, _ = job(asked=asked, each=4).run()
    assert found["account"]["nonsense"] > 0 and means(found, "named")["surprisal", ""] == 1
    assert abs(means(found)["surprisal", "random"] - 0.5) < 0.25
    asked_of = rows.rows(rows.scorer == "detection")
    assert set(rows.control[rows.scorer == "simulation_asked"]) == {"", "shuffled", "random"}
    assert len(asked_of.latent) == 8 * 3 and np.isnan(asked_of.value).all() and (asked_of.n == 0).all()
    calls = client.calls
    again = Asked(client, tmp_path)
    _, second, _ = job(asked=again, each=4).run()
    assert client.calls == calls and again.counts["new"] == 0 and second["summary"] == found["summary"]


def test_one_scorer_alone(job):
    asked = Asked(ScriptedClient(knows), None)
    rows, _, _ = job(control=False, scorers=("intruder",), asked=asked).run()
    assert set(rows.scorer) == {"intruder"} and set(rows.control) == {"", "dealt"}


def test_names_of_persons_are_scored_as_theirs(place):
    path = place / "evidence" / "names" / "names.json"
    before = read_names(path)
    assert before[9].name is None
    try:
        write_names(path, before | {9: LatentName("music")}, "evidence" * 4)
        names = names_in(Evidence(place / "evidence"))["image"]
        at = names.latents.tolist().index(9)
        assert names.phrases[at] == "music" and names.held[at] and not names.held[names.latents.tolist().index(10)]
    finally:
        write_names(path, before, "evidence" * 4)


def test_what_an_older_version_wrote_is_read_or_one_sentence(job, place, tmp_path):
    """The first names had no judges, and other rules of when they hold."""
    shutil.copytree(place / "evidence", tmp_path / "e")
    names = tmp_path / "e" / "names"
    table = pq.read_table(names / "candidates.parquet")
    said = json.loads((names / "about.json").read_text())
    said["holding"] |= {"min_hard": 0.6, "clear": 0.87}
    del said["least"]
    (names / "about.json").write_text(json.dumps(said))
    pq.write_table(table.drop_columns(["judge"]), names / "candidates.parquet")
    rows, found, _ = ScoreJob(Evidence(tmp_path / "e"), job().control).run()
    assert means(found, "named")["judge", ""] > 0.95
    pq.write_table(table.drop_columns(["phrase"]), names / "candidates.parquet")
    with pytest.raises(InputError, match="has no column phrase, as another version of mmsae wrote it: run mmsae name"):
        ScoreJob(Evidence(tmp_path / "e")).run()
    (names / "candidates.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        ScoreJob(Evidence(tmp_path / "e")).run()
    pq.write_table(table, names / "candidates.parquet")
    (names / "about.json").write_text("{}")
    with pytest.raises(InputError, match="does not say how names were looked for"):
        ScoreJob(Evidence(tmp_path / "e"), job().control).run()
    rows.write(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "scores.parquet").drop_columns(["named"]), tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="has no column named"):
        ScoreRows.read(tmp_path)


def test_refusals(job, place):
    for change, words in (
        ({"scorers": ("magic",)}, "no scorer 'magic'"),
        ({"scorers": ("detection",)}, "scorer detection asks a model: name one with --client"),
    ):
        with pytest.raises(InputError, match=words):
            job(**change)
    with pytest.raises(InputError, match="is evidence of the SAE itself"):
        ScoreJob(Evidence(place / "evidence"), Evidence(place / "evidence"))


def test_names_that_a_judge_without_texts_does_not_know_are_counted(place):
    classes = {"red": np.ones(4, np.float32), "dog": np.zeros(4, np.float32)}
    tower = SimpleNamespace(name="tower", reads_text=False, classes=classes,
                            phrases=lambda some, templates: np.stack([classes[p] for p in some]))  # fmt: skip
    job = ScoreJob(Evidence(place / "evidence"), judging=Judging())
    table = job._vectors(tower, ["red", "zebra", "red", "gnu"], "image")
    assert np.isnan(table).any(1).tolist() == [False, True, False, True]
    assert job.notes == ["tower reads no text: 2 of 3 names are none of the classes that it knows, and are not judged "
                         "by it"]  # fmt: skip


def babbles(messages):
    """A judge that says nothing of what it is asked."""
    return "What a lovely picture!"


def test_a_judge_of_whose_answers_none_can_be_read_is_said(tmp_path, capsys):
    """A command that ends well and without a line of results would read as a success."""
    place = planted(tmp_path / "e", modality="text", embeddings={}, sae="a" * 32)
    main(["name", str(place)])
    capsys.readouterr()
    args = ["--client", f"script:{__name__}:babbles", "--asked", "8", "--each", "4", "--scorers", "detection"]
    main(["score", str(place), *args])
    said = capsys.readouterr().out
    assert "0 had no answer, " in said and "one that cannot be read, 0 one that there is nothing" in said
    assert "detection: none of 8 latents by texts has a score (see what the client answered)" in said
    found = json.loads((place / "scores" / "scores.json").read_text())
    a = found["account"]
    assert found["summary"] == [] and a["nonsense"] == a["new"] + a["cached"] > 0
    assert found["notes"] and found["notes"][0] in (place / "scores" / "report.html").read_text()


def test_the_command(tmp_path, capsys):
    """Without embeddings only a client can score; it is a function here."""
    place = planted(tmp_path / "e", modality="text", embeddings={}, sae="a" * 32)
    main(["name", str(place)])
    with pytest.raises(SystemExit) as e:
        main(["score", str(place)])
    assert e.value.code == 2 and "can be scored (embedding: the evidence has no embeddings" in capsys.readouterr().err
    assert not (place / "scores" / "scores.json").exists()
    client = "script:tests.interpret.scores.test_asking:knows"
    main(["score", str(place), "--client", client, "--asked", "8", "--each", "4"])
    said = capsys.readouterr().out
    assert "detection, texts, names: 1.000" in said and "names of others" in said
    found = json.loads((place / "scores" / "scores.json").read_text())
    assert means(found, "named")["detection", ""] == 1 and found["account"]["nonsense"] > 0  # it knows no intruders
    assert (place / "scores" / "report.html").exists()
    with pytest.raises(SystemExit) as e:
        main(["score", str(place), "--client", "gpt"])
    assert e.value.code == 2 and "is not openai:MODEL" in capsys.readouterr().err
