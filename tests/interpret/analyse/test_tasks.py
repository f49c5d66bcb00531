"""``mmsae analyse`` from folders of evidence to tables and pages, by its command line; and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmsae.cli import main
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.metrics.concepts.query import write_query
from tests.helpers.evidence import write_evidence

N = 240
NAMES = {0: "red", 1: "circle", 2: "blue", 3: "<script>alert(1)</script>", 4: "frame", 5: "said alone"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of red or blue things, some of them circles; half of them framed, which no caption says."""
    rng = np.random.default_rng(0)
    z = {m: np.zeros((N, 2, 6)) for m in ("image", "text")}
    red, circle, framed = rng.random((3, N)) < 0.5
    for m in z:
        for j, on in enumerate((red, circle, ~red)):
            z[m][on, 0, j] = 1 + rng.random(on.sum())
    z["image"][circle & red, 1, 3] = 1
    z["image"][framed, 1, 4] = 2
    z["text"][rng.random(N) < 0.4, 1, 5] = 1
    shade = np.where(red[:, None, None, None], [220, 30, 30], [30, 30, 220]).astype(np.uint8)
    words = [f"a {'red' if r else 'blue'} {'circle' if c else 'square'} <b>{i}</b>" for i, (r, c) in
             enumerate(zip(red, circle, strict=True))]  # fmt: skip
    labels = [f"{'red' if r else 'blue'} {'circle' if c else 'square'}" for r, c in zip(red, circle, strict=True)]
    x = np.stack([red, circle, ~red, ~circle], 1) + rng.normal(size=(N, 4)) * 0.1
    path = write_evidence(
        tmp_path_factory.mktemp("run") / "evidence", z, captions=words, labels=labels,
        images=np.broadcast_to(shade, (N, 8, 8, 3)), n_top=40, each=20,
        embeddings={"image": x / np.linalg.norm(x, axis=1, keepdims=True)},
    )  # fmt: skip
    (path / "names").mkdir()
    write_names(path / "names" / "names.json", {j: LatentName(n) for j, n in NAMES.items()}, "s" * 32)
    return path


def run(*args):
    main(["analyse", *map(str, args)])


def results(out):
    return json.loads((Path(out) / "analysis.json").read_text())


def page_of(out):
    text = (Path(out) / "report.html").read_text()
    assert "<script" not in text and "http://" not in text.replace("http://www.w3.org", "")
    return text


def test_diff_of_a_query(folder, capsys):
    run("diff", folder, "--split", "red", "--min-items", 5)
    out = folder / "analysis" / "diff"
    assert capsys.readouterr().out.strip() == str(out)
    r = results(out)
    assert {d["name"] for d in r["first"][:2]} == {"red", "blue"} and r["first"][0]["q"] < 1e-9
    assert r["a"]["items"] + r["b"]["items"] == N and r["a"]["name"] == '"red"' and r["job"]["split"] == "red"
    table = pq.read_table(out / "differences.parquet").to_pylist()
    assert [t["latent"] for t in table[:2]] == [d["latent"] for d in r["first"][:2]]
    by = {t["name"]: t for t in table}
    assert by["frame"]["q"] > 0.05 and by["red"]["difference"] == 1 and by["blue"]["difference"] == -1
    page = page_of(out)
    assert "#0 red" in page and "data:image/webp" in page and "&lt;b&gt;" in page and "More in A" in page


def test_diff_of_labels_uids_and_two_folders(folder, tmp_path):
    run("diff", folder, "--labels-a", "red circle", "red square", "--out", tmp_path / "a")
    by_label = results(tmp_path / "a")
    (tmp_path / "red.txt").write_text("\n".join(
        u for u, label in zip(*(pq.read_table(folder / "items.parquet")[c].to_pylist() for c in ("uid", "label")),
                              strict=True) if label.startswith("red")))  # fmt: skip
    run("diff", folder, "--uids", tmp_path / "red.txt", "--out", tmp_path / "b")
    assert results(tmp_path / "b")["first"] == by_label["first"]
    run("diff", folder, folder, "--paired", "uid", "--out", tmp_path / "c")
    same = results(tmp_path / "c")
    assert (
        same["differences"] == 0
        and same["tested"] == 5
        and "No latent differs more than chance" in page_of(tmp_path / "c")
    )


def test_correlate_across_finds_what_is_shown_and_not_said(folder, tmp_path):
    run("correlate", folder, "--out", tmp_path / "a")
    r = results(tmp_path / "a")
    assert r["sides"] == ["image", "text"] and r["first"][0]["npmi"] == pytest.approx(1)
    assert r["shown_not_said"][0]["name"] == "frame" and r["said_not_shown"][0]["name"] == "said alone"
    assert NAMES[3] in (r["surprising"][0]["name_a"], r["surprising"][0]["name_b"])  # red circles, by another name
    assert (tmp_path / "a" / "shown.parquet").exists() and "In the image and not in the text" in page_of(tmp_path / "a")
    run("correlate", folder, "--modality", "image", "--out", tmp_path / "b")
    within = pq.read_table(tmp_path / "b" / "pairs.parquet").to_pylist()
    assert results(tmp_path / "b")["sides"] == ["image"] * 2 and all(p["a"] < p["b"] for p in within)
    assert {(p["a"], p["b"]) for p in within[:2]} == {(0, 3), (1, 3)}


def test_cluster(folder, tmp_path):
    run("cluster", folder, "--concepts", "red", "circle", "blue", "--clusters", 4, "--out", tmp_path / "a")
    r = results(tmp_path / "a")
    assert r["concepts"] == [0, 1, 2] and sum(c["items"] for c in r["clusters"]) == N and r["without"] == 0
    assert r["labels"]["classes"] == 4 and r["labels"]["adjusted_rand"] > 0.9
    table = pq.read_table(tmp_path / "a" / "items.parquet").to_pydict()
    assert len(table["uid"]) == N and set(table["cluster"]) == {0, 1, 2, 3}
    assert "Items nearest to the middle" in page_of(tmp_path / "a")


def test_retrieve_with_labels_as_truth(folder, tmp_path):
    queries = ["red & ~circle", "circle | blue"]
    truths = ['"red square"', '"* circle" | "blue *"']
    run("retrieve", folder, "--queries", *queries, "--truth", "label", "--truth-queries", *truths, "--k", 5,
        "--host", "none", "--draws", 50, "--out", tmp_path / "a")  # fmt: skip
    r = results(tmp_path / "a")
    assert [q["quality"]["concepts"]["precision"]["value"] for q in r["queries"]] == [1, 1]
    first = {way: q["average_precision"]["value"] for way, q in r["queries"][0]["quality"].items()}
    assert first["concepts, held first"] == 1 > first["concepts"] > 0.6  # a little circle is no obstacle to a minimum
    assert r["queries"][0]["holds"] == r["queries"][0]["right"]
    table = pq.read_table(tmp_path / "a" / "items.parquet").to_pylist()
    assert {t["by"] for t in table} == {"concepts", "concepts, held first"} and all(t["right"] for t in table[:5])
    assert "average precision" in page_of(tmp_path / "a")
    path = write_query(tmp_path / "query.json", "#0 & ~#1", "s" * 32)
    run("retrieve", folder, "--queries", path, "--out", tmp_path / "b", "--host", "none")
    assert results(tmp_path / "b")["queries"][0]["quality"] == {}


def test_queries_over_areas(tmp_path):
    """Latent 0 has two areas in every third image, one in the others; latent 1 lies right of it in every other one."""
    z = np.zeros((60, 8, 8, 2))  # of 8 x 8 patches
    z[:, :3, :3, 0] = z[::3, 5:, :3, 0] = 1
    z[::2, :3, 5:, 1] = z[1::2, 5:, :3, 1] = 1
    path = write_evidence(tmp_path / "e", {"image": z.reshape(60, 64, 2)}, grid={"image": (8, 8)}, n_top=60, each=60)
    run("retrieve", path, "--queries", "count(#0) >= 2", "count(#0) == 1 & left_of(#0, #1)", "--out", tmp_path / "a")
    asked = results(tmp_path / "a")["queries"]
    assert [q["holds"] for q in asked] == [20, 20]
    table = pq.read_table(tmp_path / "a" / "items.parquet").to_pylist()
    assert {int(t["uid"], 16) for t in table if t["query"] == asked[0]["query"] and t["score"] > 0.5} == {
        *range(0, 60, 3)
    }
    run("diff", path, "--split", "count(#0) >= 2", "--min-items", 1, "--out", tmp_path / "b")
    r = results(tmp_path / "b")
    assert (r["a"]["items"], r["b"]["items"], r["differences"]) == (20, 40, 0)


def test_dense_retrieval_stands_beside(folder, tmp_path, monkeypatch):
    """A host whose texts lie where the planted embeddings say."""
    from mmsae.interpret.analyse import tasks

    space = {"red": [1, 0, 0, 0], "circle": [0, 1, 0, 0], "red and not circle": [0.7, 0.7, 0, 0]}
    embed = lambda texts: np.array([space[t] for t in texts], float)  # noqa: E731
    monkeypatch.setattr(tasks, "_embedder", lambda *args: embed)
    run("retrieve", folder, "--queries", "red & ~circle", "--truth", "label", "--truth-queries", '"red square"',
        "--out", tmp_path / "a", "--draws", 50)  # fmt: skip
    quality = results(tmp_path / "a")["queries"][0]["quality"]
    assert set(quality) == {
        "concepts",
        "concepts, held first",
        "held first, then dense sum",
        "dense phrase",
        "dense sum",
        "dense logic",
    }
    assert (
        quality["dense sum"]["average_precision"]["value"] > 0.9 > quality["dense phrase"]["average_precision"]["value"]
    )
    assert quality["dense phrase"]["held_above"]["low"] > 0.3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("diff",), "is one corpus, and diff compares two"),
        (("diff", "--split", "#1 |"), "should stand where its end is"),
        (("diff", "--split", "#77"), "no latent #77: the SAE has 6"),
        (("diff", "--labels-a", "cat"), "has the label 'cat'"),
        (("diff", "--split", "nowhere.json"), "nowhere.json cannot be read"),
        (("correlate", "--above", "1"), "above is 1.0"),
        (("cluster", "--clusters", "1"), "clusters is 1; it must be at least 2"),
        (("cluster", "--concepts", "green"), "no latent is named 'green'"),
        (("retrieve",), "queries: at least one is needed"),
        (("retrieve", "--queries", "red", "--truth", "colour"), "which is read from --shards"),
        (("retrieve", "--queries", "red", "--truth", "label", "--truth-queries", "dog", "--host", "none"), "dog"),
        (("retrieve", "--queries", "red", "blue", "--truth-queries", "red"), "2 queries are given with 1"),
        (("retrieve", "--queries", "count(red) > 1"), "without a patch grid"),
        (("retrieve", "--queries", "red", "--modality", "audio"), "modality is 'audio'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(folder, tmp_path, capsys, args, says):
    task, *options = args
    with pytest.raises(SystemExit) as e:
        run(task, folder, *options, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert e.value.code == 2 and says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_folders_that_are_none(tmp_path, folder, capsys):
    for args, says in (((tmp_path,), "is no folder of evidence"), ((folder, folder, "--out", "x"), "reads one folder")):
        with pytest.raises(SystemExit):
            run("correlate", *args)
        assert says in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(SystemExit):
        run("correlate", folder, "--out", tmp_path / "mine")
    assert "they would be lost" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.txt").exists()
