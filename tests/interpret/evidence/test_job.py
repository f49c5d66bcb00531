"""The job against dense formulas: what it writes is what host and SAE say, however it was run."""

import json
import shutil

import numpy as np
import pytest
import torch

from mmsae.files import write_json
from mmsae.hosts import load_host
from mmsae.interpret.evidence import job as job_module
from mmsae.interpret.evidence.folder import BINS, EDGES, Evidence
from mmsae.interpret.evidence.job import collect_evidence
from mmsae.interpret.evidence.options import Evidencing
from mmsae.options import Data, SAERun
from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.shards import ShardWriter, expand, unit_batches
from mmsae.types import InputError
from tests.helpers.evaluation import png, save_host, save_sae, write_colours

RUN = SAERun(device="cpu", workers=0, batch_size=16, progress=False)
CHOICE = Evidencing(n_top=7, quantiles=4, each=3, negatives=9, min_items=6, candidates=80)
PATCHES = "visual.transformer.resblocks.1:out[patches]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Host, shards, an SAE of patches and one of pairs, and the evidence of both."""
    root = tmp_path_factory.mktemp("evidence")
    host, shards = save_host(root / "host"), write_colours(root / "shards", 110, seed=3, per_shard=40)
    patches = save_sae(root / "patches", host, site=PATCHES)
    pairs = save_sae(root / "pairs", host, site="image.embed", modalities=("image", "text"), d_sae=40)
    for name, sae in (("patches", patches), ("pairs", pairs)):
        collect_evidence(sae, shards, root / f"of_{name}", choice=CHOICE, run=RUN)
    return root, host, shards


def codes_of(root, host, shards, name, modality):
    """``(n, places, d_sae)`` codes of all items, in the batches of the job, and their uids."""
    host, sae = load_host(host), SAE.from_pretrained(root / name)
    reading, rows, uids = host.reading({modality}), [], []
    for unit in unit_batches(expand(shards), reading["transform"], reading["tokenize"], 16):
        if unit.batch.uids:
            read = host.read(unit.batch, [sae.sites[modality]])[0]
            with torch.no_grad():
                z = sae.encode(read.x, modality).to_dense()
            rows.append(z.view(len(unit.batch.uids), -1, sae.d_sae))
            uids += unit.batch.uids
    return torch.cat(rows).numpy(), uids


@pytest.mark.parametrize(("name", "modality"), [("patches", "image"), ("pairs", "image"), ("pairs", "text")])
def test_codes_statistics_and_lists_are_those_of_host_and_sae(made, name, modality):
    root, *rest = made
    e = Evidence(root / f"of_{name}")
    z, uids = codes_of(root, *rest, name, modality)
    assert e.items.uid == uids and e.n == 110
    pooled, at = np.abs(z).max(1), np.abs(z).argmax(1)
    np.testing.assert_allclose(e.codes(modality).matrix().toarray(), pooled, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(e.lists(modality).matrix().toarray().T, pooled, rtol=1e-5, atol=1e-7)
    codes = e.codes(modality)
    rows = np.repeat(np.arange(e.n), np.diff(codes.start))
    assert (codes.position == at[rows, codes.index]).all()
    s = e.stats(modality)
    assert (s.fired_rows == (z != 0).sum((0, 1))).all() and (s.fired_items == (pooled != 0).sum(0)).all()
    np.testing.assert_allclose(s.sum, z.sum((0, 1), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(s.sum_sq, np.square(z, dtype=np.float64).sum((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(s.max, pooled.max(0), rtol=1e-6)
    assert s.histogram.shape == (z.shape[2], BINS) and (s.histogram.sum(1) == s.fired_rows).all()
    j = int(s.fired_rows.argmax())
    clipped = np.abs(z[..., j][z[..., j] != 0]).clip(EDGES[0], EDGES[-1])
    assert (s.histogram[j] == np.histogram(clipped, EDGES)[0]).all()
    assert (s.fired_items == 0).any()  # a latent that never fires is among them
    dead = int(np.flatnonzero(s.fired_items == 0)[0])
    assert (e.top(modality).item[dead] == -1).all() and not e.eligible(modality)[dead]
    assert not len(e.positives(dead, modality, "train")) and not len(e.negatives(dead, modality, "test"))


@pytest.mark.parametrize(("name", "modality"), [("patches", "image"), ("pairs", "text")])
def test_top_items_are_those_of_a_full_sort(made, name, modality):
    root, *_ = made
    e = Evidence(root / f"of_{name}")
    own = e.codes(modality).matrix().toarray()
    own[e.items.copies[modality] >= 0] = 0
    top = e.top(modality)
    for j in range(e.d_sae):
        order = sorted(np.flatnonzero(own[:, j]), key=lambda i: (-abs(own[i, j]), e.items.uid[i]))[:7]
        assert top.item[j].tolist() == order + [-1] * (7 - len(order))
        assert np.allclose(top.value[j, : len(order)], own[order, j])


@pytest.mark.parametrize(("name", "modality"), [("patches", "image"), ("pairs", "image"), ("pairs", "text")])
def test_examples_are_of_equal_quantiles_and_negatives_are_silent(made, name, modality):
    root, *_ = made
    e = Evidence(root / f"of_{name}")
    own = np.abs(e.codes(modality).matrix().toarray())
    copies, test = e.items.copies[modality] >= 0, e.items.half == "test"
    assert 30 < test.sum() < 80
    for j in range(e.d_sae):
        on = np.flatnonzero((own[:, j] > 0) & ~copies)
        assert e.eligible(modality)[j] == (len(on) >= 6)
        drawn = e._map("examples.safetensors")[f"{modality}.positive"][j]
        if len(on) < 6:
            assert (drawn == -1).all()
            continue
        on = np.array(sorted(on, key=lambda i: (-own[i, j], e.items.uid[i])))
        part = {i: r * 4 // len(on) for r, i in enumerate(on)}
        sizes = np.bincount(list(part.values()), minlength=4)
        assert sizes.max() - sizes.min() <= 1
        for q in range(4):
            for half, slots in (("train", drawn[q, :2]), ("test", drawn[q, 2:])):
                there = [i for i in on if part[i] == q and test[i] == (half == "test")]
                got = slots[slots >= 0].tolist()
                assert len(got) == min(len(slots), len(there)) and set(got) <= set(there) and len(set(got)) == len(got)
        train, held = (set(e.positives(j, modality, h).tolist()) for h in ("train", "test"))
        assert not train & held
        for kind in ("random", "hard"):
            for half, most in (("train", 5), ("test", 4)):
                got = e.negatives(j, modality, half, kind)
                assert len(set(got.tolist())) == len(got) and (own[got, j] == 0).all() and not copies[got].any()
                there = ((own[:, j] == 0) & ~copies & (test == (half == "test"))).sum()
                assert len(got) == min(most, there)


def test_hard_negatives_are_the_most_alike(made):
    root, *_ = made
    e = Evidence(root / "of_pairs")
    embed, own, test = e.embeddings("image"), e.codes("image").matrix().toarray(), e.items.half == "test"
    np.testing.assert_allclose(np.linalg.norm(embed, axis=1), 1, rtol=1e-5)
    for j in np.flatnonzero(e.eligible("image"))[:10]:
        mean = embed[e.positives(j, "image", "train")].sum(0)
        silent = np.flatnonzero((own[:, j] == 0) & ~test & (e.items.copies["image"] < 0))
        best = silent[np.argsort(-(embed[silent] @ mean))][:5]
        assert set(e.negatives(j, "image", "train", "hard").tolist()) == set(best.tolist())


def test_rows_of_items_in_evidence_are_kept_with_their_thumbnails(made):
    root, *rest = made
    e = Evidence(root / "of_patches")
    z, _ = codes_of(root, *rest, "patches", "image")
    grid = e.grid("image")
    assert (grid.rows, grid.cols, grid.places) == (4, 4, 16)
    top = e.top("image")
    for j in np.flatnonzero(e.eligible("image"))[:8]:
        item, place = int(top.item[j, 0]), int(top.position[j, 0])
        heat = e.heat(item, j)
        np.testing.assert_allclose(heat.ravel(), z[item, :, j], rtol=1e-5, atol=1e-7)
        assert heat.ravel()[place] == top.value[j, 0]
        assert e.thumbnail(item)[:4] == b"RIFF"


def same_files(a, b):
    names = {p.name for p in a.iterdir()} - {"evidence.json"}
    assert names == {p.name for p in b.iterdir()} - {"evidence.json"}
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    said = [json.loads((f / "evidence.json").read_text()) for f in (a, b)]
    assert said[0] == said[1]


def test_a_second_pass_gives_the_same_bytes(made, tmp_path):
    root, _, shards = made
    for name in ("patches", "pairs"):
        choice = Evidencing(**vars(CHOICE) | {"keep_gb": 0.0})
        collect_evidence(str(root / name), shards, tmp_path / name, choice=choice, run=RUN)
        same_files(tmp_path / name, root / f"of_{name}")


def test_a_killed_job_goes_on_and_gives_the_same_bytes(made, tmp_path, monkeypatch):
    root, _, shards = made
    finish, done = job_module.EvidenceTar.finish, []

    def killed(self, faults):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(self)
        finish(self, faults)

    out = tmp_path / "out"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(job_module.EvidenceTar, "finish", killed)
        collect_evidence(str(root / "patches"), shards, out, choice=CHOICE, run=RUN)
    assert not out.exists()
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(job_module, "write_tokens", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        collect_evidence(str(root / "patches"), shards, out, choice=CHOICE, run=RUN)
    with monkeypatch.context() as m:
        m.setattr(job_module.EvidenceTar, "finish", lambda *a: pytest.fail("all tars were done"))
        collect_evidence(str(root / "patches"), shards, out, choice=CHOICE, run=RUN)
    same_files(out, root / "of_patches")


def test_two_processes_give_the_same_bytes(made, tmp_path):
    root, _, shards = made
    collect_evidence(str(root / "patches"), shards, tmp_path / "out", choice=CHOICE, run=RUN, devices=2)
    same_files(tmp_path / "out", root / "of_patches")


def test_the_order_of_shards_does_not_matter(made, tmp_path):
    root, _, shards = made
    turned = [str(p) for p in expand(shards)][::-1]
    collect_evidence(str(root / "pairs"), turned, tmp_path / "out", choice=CHOICE, run=RUN)
    a, b = Evidence(root / "of_pairs"), Evidence(tmp_path / "out")
    uid_a, uid_b = (np.array([*e.items.uid, ""]) for e in (a, b))
    assert (uid_a[:-1] != uid_b[:-1]).any()
    for m in ("image", "text"):
        assert (uid_a[a.top(m).item] == uid_b[b.top(m).item]).all()
        for kind in ("positive", "random", "hard"):
            x, y = (uid[e._map("examples.safetensors")[f"{m}.{kind}"]] for uid, e in ((uid_a, a), (uid_b, b)))
            assert (np.sort(x.reshape(len(x), -1)) == np.sort(y.reshape(len(y), -1))).all(), kind
        np.testing.assert_allclose(a.stats(m).sum, b.stats(m).sum, rtol=1e-12)
        assert (a.stats(m).histogram == b.stats(m).histogram).all()


def test_a_finished_job_is_left_though_its_host_moved_and_another_is_refused(made, capsys, tmp_path):
    root, _, shards = made
    out = root / "of_pairs"
    collect_evidence(str(root / "pairs"), shards, out, choice=CHOICE, run=SAERun(**vars(RUN) | {"progress": True}))
    assert "finished before" in capsys.readouterr().out
    moved = tmp_path / "elsewhere"
    shutil.copytree(root / "host", moved)
    before = (out / "evidence.json").read_bytes()
    collect_evidence(str(root / "pairs"), shards, out, f"local-dir:{moved}", CHOICE, RUN)
    assert (out / "evidence.json").read_bytes() == before
    with pytest.raises(InputError, match=r"its sae is '.*' there and '.*' here"):
        collect_evidence(str(root / "patches"), shards, out, choice=CHOICE, run=RUN)
    with pytest.raises(InputError, match="n_top is 7 there and 8 here"):
        choice = Evidencing(**vars(CHOICE) | {"n_top": 8})
        collect_evidence(str(root / "pairs"), shards, out, choice=choice, run=RUN)
    fingerprint = sae_fingerprint(SAE.from_pretrained(root / "patches"))
    with pytest.raises(InputError, match="is evidence of sae"):
        Evidence(out, sae=fingerprint)


def write(folder, n, **fields):
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "s") as w:
        for i in range(n):
            own = {k: v(i) if callable(v) else v for k, v in fields.items()}
            picture = png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            w.write(f"s{i:03d}", {**({"png": picture} if own.pop("image", True) else {}), **own})
    return str(folder)


def test_a_corpus_without_captions_or_images(made, tmp_path):
    root, *_ = made
    sae = str(root / "pairs")
    about = collect_evidence(sae, write(tmp_path / "a", 30), tmp_path / "images", choice=CHOICE, run=RUN)
    assert about["modalities"] == ["image"] and not about["captions"] and list(about["embedder"]) == ["image"]
    texts = write(tmp_path / "b", 30, image=False, txt=lambda i: f"a {'red green blue'.split()[i % 3]} {i} circle")
    about = collect_evidence(sae, texts, tmp_path / "texts", choice=CHOICE, run=RUN)
    e = Evidence(tmp_path / "texts")
    assert e.modalities == ["text"] and not about["images"] and e.thumbnail(int(e.top("text").item.max())) is None
    with pytest.raises(InputError, match=r"the SAE is of images, and .* has captions"):
        collect_evidence(str(root / "patches"), texts, tmp_path / "none", choice=CHOICE, run=RUN)
    nothing = write(tmp_path / "c", 3, image=False, json={"a": 1})
    with pytest.raises(InputError, match="neither images nor captions"):
        collect_evidence(sae, nothing, tmp_path / "none", choice=CHOICE, run=RUN)
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.partial").exists()


def test_copies_are_found_by_modality_and_are_no_evidence(made, tmp_path):
    root, *_ = made
    e = Evidence(root / "of_pairs")
    pairs = list(zip(e.items.uid, e.items.caption, strict=True))
    text, image = e.items.copies["text"], e.items.copies["image"]
    assert (text >= 0).sum() == 107 and (image < 0).all() and (e.items.copy_of < 0).all()  # three captions, noise
    for i in np.flatnonzero(text >= 0):
        lead = text[i]
        assert text[lead] == -1 and e.items.caption[lead] == e.items.caption[i]
        assert e.items.uid[lead] == min(u for u, c in pairs if c == e.items.caption[i])
    assert set(e.top("text").item.ravel().tolist()) <= {-1, *np.flatnonzero(text < 0).tolist()}
    assert np.diff(e.codes("text").start).min() > 0  # their codes are kept
    choice = Evidencing(**vars(CHOICE) | {"copies": True})
    collect_evidence(str(root / "pairs"), made[2], tmp_path / "all", choice=choice, run=RUN)
    assert (Evidence(tmp_path / "all").top("text").item[:, -1] >= 0).any()


def test_faults_are_counted_and_listed_and_too_many_refused(made, tmp_path):
    root, *_ = made
    for folder, broken in (("few", 1), ("many", 3), ("all", 40)):
        with ShardWriter(tmp_path / folder, "t") as w:
            rng = np.random.default_rng(1)
            for i in range(40):
                picture = png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                w.write(f"t{i:03d}", {"png": picture if i >= broken else b"no image", "txt": f"number {i}"})
    sae = str(root / "patches")
    about = collect_evidence(sae, str(tmp_path / "few"), tmp_path / "ok", choice=CHOICE, run=RUN)
    assert about["faults"]["counts"] == {"broken_image": 1} and about["n_items"] == 39
    assert about["faults"]["examples"][0][2] == "t000"
    for folder, said in (("many", "3 of 40 samples .* had to be dropped"), ("all", "no sample was usable")):
        with pytest.raises(InputError, match=said):
            collect_evidence(sae, str(tmp_path / folder), tmp_path / "bad", choice=CHOICE, run=RUN, data=Data())
        shutil.rmtree(tmp_path / "bad.partial")


def test_a_uid_twice_is_refused(made, tmp_path):
    root, *_ = made
    with ShardWriter(tmp_path / "s", "s", per_shard=1) as w:
        for i in range(2):
            rng = np.random.default_rng(i)
            picture = png(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            w.write(f"k{i}", {"png": picture, "json": {"uid": "0" * 32}})
    with pytest.raises(InputError, match=f"uid {'0' * 32} occurs twice"):
        collect_evidence(str(root / "patches"), str(tmp_path / "s"), tmp_path / "out", choice=CHOICE, run=RUN)


def test_another_host_embeds(made, tmp_path):
    root, _, shards = made
    from tests.helpers.encoders import MODELS, save_local

    other = save_local(tmp_path / "other", MODELS["resnet"], seed=5)
    choice = Evidencing(**vars(CHOICE) | {"embedder": other})
    about = collect_evidence(str(root / "patches"), shards, tmp_path / "out", choice=choice, run=RUN)
    assert about["embedder"] == {"image": other, "text": other}
    e, h = Evidence(tmp_path / "out"), load_host(other)
    reading = h.reading({"image"})
    batch = next(unit_batches(expand(shards), reading["transform"], None, 16)).batch
    own = torch.nn.functional.normalize(h.read(batch, ["image.embed"])[0].x, dim=1).numpy()
    np.testing.assert_allclose(e.embeddings("image")[:16], own, atol=1e-5)
    assert e.about["hard_negatives"]["image"].endswith(other)


def test_settings_are_checked(made, tmp_path):
    root, _, shards = made
    with pytest.raises(InputError, match="n_top is 0"):
        collect_evidence(str(root / "pairs"), shards, tmp_path / "o", choice=Evidencing(n_top=0), run=RUN)
    (tmp_path / "o").mkdir()
    write_json(tmp_path / "o" / "x.json", {})
    with pytest.raises(InputError, match="holds no result of mmsae evidence"):
        collect_evidence(str(root / "pairs"), shards, tmp_path / "o", choice=CHOICE, run=RUN)


def test_info_describes_the_folder(made):
    from mmsae.info import info

    said = info(str(made[0] / "of_patches"))
    for line in (
        "kind: evidence",
        "items: 110",
        "image: 4 x 4",
        "copies: 0",
        "seed 0, 4 quantiles x 3",
        "faults: none",
    ):
        assert line in said, said
