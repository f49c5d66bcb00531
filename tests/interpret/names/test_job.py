"""Names on planted concepts (oracle O2), abstention on random latents (O3), and what is refused."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mmsae.cli import main
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.guesses import Candidates
from mmsae.interpret.names.job import Naming, write_named
from mmsae.interpret.names.options import Holding, Looking
from mmsae.metrics.concepts.names import names_only, read_names
from mmsae.types import InputError
from tests.helpers.evidence import write_evidence
from tests.helpers.interpret import OTHER, WORDS, ToyEmbedder, planted


def naming(folder, embedder=True, **looking):
    found = Naming(Evidence(folder), Looking(**looking), Holding(), cache=False)
    if embedder:
        found.embedders = {m: ToyEmbedder() for m in found.ev.modalities}
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("names")
    (root / "words.txt").write_text("\n".join(WORDS + OTHER))
    return planted(root / "evidence")


@pytest.fixture
def words(place):
    return str(place.parent / "words.txt")


@pytest.mark.parametrize("method", ["captions", "wpmi", "centroid"])
def test_every_method_names_planted_latents_and_no_random_one(place, words, method):
    found = naming(place, vocabulary=words, methods=(method,), longest=1).run()
    names = found.names
    assert {j: names[j].name for j in range(8)} == dict(enumerate(WORDS))
    assert not names_only({j: n for j, n in names.items() if j >= 8})
    assert all(names[j].method == method and names[j].auroc > 0.95 and names[j].z > 3 for j in range(8))
    assert "AUROC" in names[9].note and names[40].note == "never fires" and math.isnan(names[40].auroc)
    assert found.about["named"] == 8 and found.about["judges"] == {"image": ["vectors", "words"]}


def test_the_best_of_all_methods_is_chosen_on_the_train_half(place, words):
    found = naming(place, vocabulary=words).run()
    c = found.candidates
    assert set(c.method) == {"captions", "wpmi", "centroid"} and found.about["left_out"]["vocabulary"].startswith(
        "no SAE"
    )
    assert c.chosen.sum() == 40 and np.isnan(c.auroc[~c.chosen]).all()
    for j in range(40):
        own = c.rows(c.latent == j)
        enough = own.rows(~(own.z < 3)) if (~(own.z < 3)).any() else own
        assert own.auroc_train[own.chosen][0] >= np.nanmax(enough.auroc_train) - 0.02
    assert {j: found.names[j].name for j in range(8)} == dict(enumerate(WORDS))


def test_without_embeddings_words_of_captions_judge(tmp_path):
    place = planted(tmp_path / "e", embeddings={})
    found = naming(place, embedder=False).run()
    assert {j: found.names[j].name for j in range(8)} == dict(enumerate(WORDS))
    assert found.about["judges"] == {"image": ["words"]} and "no embeddings" in found.about["left_out"]["wpmi"]


def test_without_captions_vectors_do(tmp_path, words):
    found = naming(planted(tmp_path / "e", captions=False), vocabulary=words).run()
    assert {j: found.names[j].name for j in range(8)} == dict(enumerate(WORDS))
    assert found.about["left_out"]["captions"] == "the evidence has no captions"


def test_texts_are_named_as_images_are(tmp_path, words):
    found = naming(planted(tmp_path / "e", modality="text"), vocabulary=words).run()
    assert {j: found.names[j].name for j in range(8)} == dict(enumerate(WORDS))
    assert found.names[0].note.endswith("of texts")


def test_the_own_hosts_embeddings_are_no_judge_beside_captions(place, words, monkeypatch):
    monkeypatch.setattr(ToyEmbedder.host, "fingerprint", "h" * 32)
    found = naming(place, vocabulary=words).run()
    assert found.about["judges"] == {"image": ["words"]} and found.about["named"] == 8
    assert found.about["left_out"]["judging by vectors"] == "toy is the SAE's own host"
    by_vectors = Naming(Evidence(place), Looking(vocabulary=words), Holding(judge="vectors"), cache=False)
    by_vectors.embedders = {"image": ToyEmbedder()}
    assert by_vectors.run().about["judges"] == {"image": ["vectors"]}


def test_only_the_train_half_is_looked_at(place, words, tmp_path):
    """What the test half holds changes no candidate, only the AUROC that is reported."""
    ev = Evidence(place)
    rows = np.flatnonzero(ev.items.half == "test")
    e, captions = np.array(ev.embeddings("image")), list(ev.items.caption)
    e[rows], shuffled = np.random.default_rng(0).permutation(e[rows]), [captions[i] for i in rows[::-1]]
    for i, text in zip(rows, shuffled, strict=True):
        captions[i] = text
    z = np.asarray(ev.codes("image").matrix().todense())[:, None]
    changed = write_evidence(
        tmp_path / "e", {"image": z}, captions=captions, embeddings={"image": e}, quantiles=5, each=10
    )
    a, b = (naming(p, vocabulary=words).run() for p in (place, changed))
    assert (a.candidates.phrase == b.candidates.phrase).all()
    assert np.allclose(a.candidates.auroc_train, b.candidates.auroc_train, equal_nan=True)
    assert a.about["named"] == 8 and b.about["named"] == 0


def test_files_are_written_and_read(place, words, tmp_path):
    found = naming(place, vocabulary=words).run()
    path = write_named(tmp_path / "names", found, "s" * 32)
    assert names_only(read_names(path, "s" * 32)) == dict(enumerate(WORDS))
    write_named(place / "names", found, "s" * 32)
    again = Candidates.read(place)
    assert (again.phrase == found.candidates.phrase).all() and (again.chosen == found.candidates.chosen).all()
    assert json.loads((tmp_path / "names" / "about.json").read_text())["named"] == 8
    with pytest.raises(InputError, match=r"run mmsae name .* first"):
        Candidates.read(tmp_path / "names")


def test_a_vocabulary_of_one_word_works(place, tmp_path):
    (tmp_path / "one.txt").write_text("red\n")
    found = naming(place, vocabulary=str(tmp_path / "one.txt"), methods=("centroid",)).run()
    assert found.names[0].name == "red" and found.about["named"] == 1 and math.isnan(found.names[0].margin)
    both = naming(place, vocabulary=str(tmp_path / "one.txt")).run()
    assert both.about["left_out"]["wpmi"] == "of a vocabulary of one phrase every item has it"


def test_the_command_names_and_refuses(tmp_path, capsys):
    place = planted(tmp_path / "e", embeddings={}, sae="a" * 32)
    main(["name", str(place)])
    said = capsys.readouterr().out
    assert (
        "8 of 40 latents with evidence have a name" in said and "without wpmi: the evidence has no embeddings" in said
    )
    assert names_only(read_names(place / "names" / "names.json", "a" * 32)) == dict(enumerate(WORDS))
    bare = planted(tmp_path / "bare", embeddings={}, captions=False)
    for args, words in (
        ([tmp_path], "is no folder of evidence"),
        ([bare], "has nothing to name latents by"),
        ([place, "--methods", "wpmi"], "method wpmi cannot be used: the evidence has no embeddings"),
        ([place, "--methods", "magic"], "no method 'magic'"),
        ([place, "--modality", "text"], "modality is text, but"),
        ([place, "--latents", "99"], "there is no latent 99"),
        ([bare, "--vocabulary", "captions", "--methods", "captions"], "has no captions"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["name", *map(str, args)])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1
    assert not (bare / "names").exists()


def test_the_command_goes_by_a_control(tmp_path, capsys):
    """With a share of names it is what no more latents of random weights reach; by one number, many may."""
    place = planted(tmp_path / "e", embeddings={}, sae="a" * 32)
    control = planted(tmp_path / "c", embeddings={}, sae="b" * 32, real=False, seed=1)
    main(["name", str(place), "--control", str(control), "--false-names", "0.1"])
    assert "name: 10% of latents of random weights reach an AUROC of 0.5" in capsys.readouterr().out
    names = read_names(place / "names" / "names.json")
    least = json.loads((place / "names" / "about.json").read_text())["least"]["image"]
    held = names_only(names)
    assert {j: held[j] for j in range(8)} == dict(enumerate(WORDS)) and 0.5 <= least < 0.7
    assert all((names[j].auroc >= least) == (j in held) or "z " in names[j].note for j in range(40))
    others = [j for j in range(8, 40) if j in held]
    assert len(others) <= 8 and all(names[j].auroc < 0.7 for j in others)  # of 32, a tenth on average
    other = planted(tmp_path / "o", embeddings={}, sae="c" * 32, host="o" * 32)
    for more, words in (
        (["--control", str(place)], "is evidence of the SAE itself"),
        (["--control", str(control), "--false-names", "0"], "false_names is 0, it must be a share between 0 and 1"),
        (["--control", str(control), "--false-names", "0.001"], "takes a control of 999 latents or more with evidence"),
        (["--control", str(other)], "is evidence on host oooooooooooo"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["name", str(place), *more])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1


def test_a_latent_that_never_fires_is_said_to_be_one(tmp_path, capsys):
    """And not that the evidence lacks captions or embeddings, which it has."""
    place = planted(tmp_path / "e", embeddings={}, sae="a" * 32)
    for latents, words in (
        (["40"], f"latent 40 of {place} never fires: there is nothing to name it by"),
        (["40", "40"], "of the 2 latents asked for none has evidence"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["name", str(place), "--latents", *latents])
        err = capsys.readouterr().err
        assert e.value.code == 2 and words in err and err.count("\n") == 1
    assert not (place / "names").exists()
    main(["name", str(place), "--latents", "40", "0"])
    names = read_names(place / "names" / "names.json")
    assert names[0].name and names[40].name is None and names[40].note == "never fires" and len(names) == 2


def test_a_control_that_says_enough_of_one_modality_is_used_there_and_it_is_said_where_not(tmp_path, capsys):
    """Read by thresholds, latents that fire on texts alone are few: they do not keep images from being held by it."""
    place = planted(tmp_path / "e", embeddings={}, sae="a" * 32, texts=True)
    for texts, n in ((True, 1), (False, 0)):
        control = planted(tmp_path / f"c{n}", embeddings={}, sae="b" * 32, real=False, seed=1, texts=texts)
        main(["name", str(place), "--control", str(control), "--out", str(tmp_path / f"n{n}")])
        said = capsys.readouterr().out
        why = f"it has {n} latents with evidence of texts alone, and a share of 0.15 takes 6: 1 names are held by"
        assert f"without the control of texts: {why} --min-auroc 0.81" in said
        about = json.loads((tmp_path / f"n{n}" / "about.json").read_text())
        assert list(about["least"]) == ["image"] and why in about["left_out"]["the control of texts"]
        assert read_names(tmp_path / f"n{n}" / "names.json")[40].auroc > 0.81


@pytest.mark.parametrize(("vocabulary", "classes"), [("common", True), ("captions", False)])
def test_classes_of_a_host_are_the_default_vocabulary_alone(tmp_path, monkeypatch, vocabulary, classes):
    """A vocabulary that somebody gave is not quietly another one."""
    known = SimpleNamespace(name="tower", reads_text=False, classes={"tench": np.ones(2), "goldfish": np.ones(2)})
    monkeypatch.setattr("mmsae.interpret.names.job.Embedder.of", lambda *args, **options: known)
    z = np.random.default_rng(0).random((40, 1, 3)).astype(np.float32)
    folder = write_evidence(tmp_path / "evidence", {"image": z}, captions=["a cat"] * 40)
    naming = Naming(Evidence(folder), Looking(vocabulary=vocabulary))
    assert bool(naming.embedders) == classes
    if classes:
        assert naming.phrases == ["tench", "goldfish"]
    else:
        assert "the default vocabulary alone" in naming.left_out["vectors of images"]
