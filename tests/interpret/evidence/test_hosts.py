"""Evidence whose hosts have moved: who reads it says where they are now, and no other host is taken for one."""

import json
import shutil

import pytest

from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.interpret.embedder import Embedder
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.evidence.hosts import NamedHost
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing, Whereabouts
from mmsae.options import SAERun
from mmsae.types import InputError
from tests.helpers.encoders import MODELS, save_local
from tests.helpers.evaluation import save_host, save_sae, write_colours

CHOICE = Evidencing(n_top=7, quantiles=4, each=3, negatives=9, min_items=6, candidates=80)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Evidence whose host, and whose embedder, lie elsewhere now; and another host."""
    root = tmp_path_factory.mktemp("moved")
    host, shards = save_host(root / "host"), write_colours(root / "shards", 110, seed=3, per_shard=60)
    sae = save_sae(root / "sae", host, site="image.embed", modalities=("image", "text"), d_sae=40)
    other = save_local(root / "embedder", MODELS["resnet"], seed=5)
    run = SAERun(device="cpu", workers=0, batch_size=32, progress=False)
    collect_evidence(sae, shards, root / "own", choice=CHOICE, run=run)
    collect_evidence(sae, shards, root / "other", choice=Evidencing(**vars(CHOICE) | {"embedder": other}), run=run)
    (root / "words.txt").write_text("red\ngreen\nblue\nsquare\nimage\n")
    for name in ("host", "embedder"):
        shutil.move(root / name, root / "new" / name)
    save_local(root / "stranger", MODELS["vit"], seed=9)
    return root


def at(folder):
    return f"local-dir:{folder}"


def run(command, folder, out, *more):
    looking = ["--vocabulary", str(folder.parent / "words.txt")] if command == "name" else []
    main([command, str(folder), "--out", str(out), *looking, "--device", "cpu", "--progress", "false", *more])


def refused(capsys, *args):
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_name_of_today_does_and_without_it_a_sentence_says_the_option(moved, tmp_path, capsys):
    said = refused(capsys, "name", moved / "own", tmp_path / "n")
    assert "does not exist; " in said and said.endswith("own names this host: say with --host where it is now")
    run("name", moved / "own", tmp_path / "n", "--host", at(moved / "new" / "host"))
    methods = json.loads((tmp_path / "n" / "about.json").read_text())["methods"]
    assert {"wpmi", "centroid"} <= set(methods)
    said = refused(capsys, "score", moved / "own", tmp_path / "s")
    assert said.endswith("say with --host where it is now") and not (tmp_path / "s").exists()


def test_scores_and_the_browser_find_it_too(moved, tmp_path, capsys):
    where = ["--host", at(moved / "new" / "host")]
    run("name", moved / "own", moved / "own" / "names", *where)
    run("score", moved / "own", tmp_path / "s", *where)
    scorers = {r["scorer"] for r in json.loads((tmp_path / "s" / "scores.json").read_text())["summary"]}
    assert {"judge", "embedding"} <= scorers
    given = [str(moved / "own"), "--progress", "false", "--layout", "none", "--vocabulary", str(moved / "words.txt")]
    main(["explore", *given, "--out", str(tmp_path / "b"), *where])
    assert at(moved / "new" / "host") in "".join(p.read_text() for p in (tmp_path / "b" / "data").rglob("vectors*"))
    with pytest.raises(SystemExit):
        main(["explore", *given, "--out", str(tmp_path / "c"), "--host", at(moved / "stranger")])
    assert "is host" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_another_host_is_refused_with_both_fingerprints(moved, tmp_path, capsys):
    stranger, own = at(moved / "stranger"), Evidence(moved / "own").about["job"]["host"]
    found = load_host(stranger).fingerprint
    said = refused(capsys, "name", moved / "own", tmp_path / "n", "--host", stranger)
    assert f"{stranger} is host {found[:12]}, and {moved / 'own'} is of" in said and own[:12] in said
    assert not (tmp_path / "n" / "names.json").exists()


def test_a_host_that_embeds_alone_has_a_name_of_its_own(moved, tmp_path, capsys):
    where = Whereabouts(at(moved / "new" / "host"), at(moved / "new" / "embedder"))
    ev = Evidence(moved / "other", where=where)
    assert NamedHost.of(ev).load().fingerprint == ev.about["job"]["host"]
    assert Embedder.of(ev, "image", device="cpu").host.fingerprint == ev.about["job"]["embedder"]
    said = refused(capsys, "name", moved / "other", tmp_path / "n", "--host", where.host)  # it is not the embedder
    assert said.endswith("say with --embedder where it is now")
    with pytest.raises(InputError, match=r"is host .*, and .*other is of"):
        NamedHost.embedder_of(Evidence(moved / "other", where=Whereabouts(embedder=where.host)), "image").load()


def test_retrieval_says_the_option_too_and_refuses_embeddings_of_another_width(moved, tmp_path, capsys):
    (tmp_path / "names.json").write_text('{"1": "red"}')
    given = ["analyse", "retrieve", str(moved / "own"), "--queries", "red", "--names", str(tmp_path / "names.json")]
    wider = save_local(tmp_path / "wider", {**MODELS["vit"], "embed_dim": 48}, seed=1)
    for host, said in (([], "say with --host where it is now"), (["--host", wider], "has those of")):
        with pytest.raises(SystemExit):
            main([*given, "--out", str(tmp_path / "r"), *host])
        assert said in capsys.readouterr().err and not (tmp_path / "r").exists()
    main([*given, "--out", str(tmp_path / "r"), "--host", at(moved / "new" / "host")])
    assert (tmp_path / "r" / "report.html").exists()
