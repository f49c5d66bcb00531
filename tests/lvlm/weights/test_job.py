import json

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch

from mmsae.filtering.scorers.base import ScorerSpec
from mmsae.filtering.scorers.lvlm import SaeVScorer
from mmsae.lvlm.tokens import TokenScorer, encode_tokens
from mmsae.lvlm.weights.command import weights
from mmsae.lvlm.weights.file import load_weights
from mmsae.lvlm.weights.job import Subset, cross_modal_weights
from mmsae.lvlm.weights.lightning import Weights
from mmsae.metrics import sample_scores
from mmsae.options import call
from mmsae.sae import SAE, TopK
from mmsae.shards import unit_batches
from mmsae.types import InputError
from tests.helpers.lvlm_jobs import QUESTIONS, make_host, make_sae, sample, shard

QUIET = {"progress": False, "samples": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    host = make_host(root)
    sae = make_sae(host)
    sae.save_pretrained(root / "sae")
    (root / "shards").mkdir()
    for i in range(3):
        shard(root / "shards" / f"{i}.tar", 6, start=6 * i)
    return root, host, sae


def run(host, sae, root, out, **options):
    return call(cross_modal_weights, host=host, sae=sae, shards=str(root / "shards"), out=out, **options)


def command(root, out, **options):
    given = {"sae": str(root / "sae"), "shards": str(root / "shards"), "n_side": 3, "device": "cpu"}
    return call(weights, out=str(out), **{**given, **QUIET, **options})


def batch(host, n=5):
    return host.collate([sample(i, QUESTIONS[i % 4]) for i in range(n)])


def test_scorer(world):
    _, host, sae = world
    w = torch.rand(48)
    scorer = TokenScorer(host, sae, w)
    got = scorer.score(batch(host))
    assert tuple(got) == scorer.columns == (
        "cos_code", "cos_algorithm", "cos_mean", "l0", "l1", "co_l0", "co_l1", "n_image", "n_text"
    )  # fmt: skip
    assert (got["n_image"] == 9).all() and got["n_text"].tolist() == [6, 11, 7, 6, 6][:5]
    tokens = host.capture(batch(host), "layers.1:out")
    want = sample_scores(encode_tokens(sae, tokens), tokens, w)
    assert all(torch.equal(got[c], want[c]) for c in got)
    assert not any(c.startswith("cos") for c in TokenScorer(host, sae).columns)
    alone = scorer.score(host.collate([sample(1, QUESTIONS[1])]))
    for name, value in alone.items():
        assert value[0].item() == pytest.approx(got[name][1].item(), abs=1e-4), name


def test_scorer_without_an_image_and_with_one_modality(world):
    _, host, sae = world
    plain = host.collate([sample(0, QUESTIONS[0], image=None), sample(1, QUESTIONS[1], image=None)])
    got = TokenScorer(host, sae, torch.rand(48)).score(plain)
    assert got["n_image"].tolist() == [0, 0] == got["cos_code"].tolist() and (got["l0"] > 0).all()
    single = SAE(host.hidden_size, 48, modalities=("text",), selector=TopK(6)).eval()
    single.sites = {"text": host.site("layers.1:out[text]")}
    assert (TokenScorer(host, single).score(batch(host))["n_image"] == 9).all()


def test_scorer_refuses(world):
    _, host, sae = world
    with pytest.raises(InputError, match="7 cross-modal weights for an SAE of 48 latents"):
        TokenScorer(host, sae, torch.rand(7))
    pooled = make_sae(host)
    pooled.sites = {m: host.site(f"layers.1:in[{m}_mean]") for m in ("image", "text")}
    with pytest.raises(InputError, match="scores of tokens need a site with tokens"):
        TokenScorer(host, pooled)
    other = make_sae(host)
    other.sites = {m: s.__class__(**{**s.to_dict(), "host": "0" * 32}) for m, s in sae.sites.items()}
    with pytest.raises(InputError, match="was trained on"):
        TokenScorer(host, other)


def test_weights_of_shards(world, tmp_path):
    root, host, sae = world
    found = command(root, tmp_path / "w")
    assert found["out"] == str(tmp_path / "w") and found["pairs"] == 18 and found["tokens"]["image"] == 18 * 9
    assert 0 < found["coverage"] <= 1 and found["text"] == "question" and found["weighted"] > 0
    file = load_weights(tmp_path / "w")
    file.check(sae, host.fingerprint)
    assert file.weights.isfinite().sum() == found["weighted"]
    assert not (tmp_path / "w" / "parts").exists()
    again = command(root, tmp_path / "w")
    assert again == found
    with pytest.raises(InputError, match=r"result of another job: its definition\.n_side is 3 there and 4 here"):
        command(root, tmp_path / "w", n_side=4)
    spec = ScorerSpec(str(root / "sae"), "", "cos_code", str(tmp_path / "w"), "cpu", "fp32", 0, False)
    scorer = SaeVScorer(spec)
    got, why = scorer.score(batch(host)), scorer.reasons(batch(host))
    assert torch.equal(got["cos_code"], TokenScorer(host, sae, file.weights).score(batch(host))["cos_code"])
    image, text = (why.codes[m].to_dense() > 0 for m in ("image", "text"))
    assert torch.equal((image & text).sum(1).double(), got["co_l0"])
    for side, has, lacks in ((why.text_only, text, image), (why.image_only, image, text)):
        on = side.strengths > 0
        assert (has & ~lacks).gather(1, side.latents)[on].all() and (
            side.strengths[:, 1:] <= side.strengths[:, :-1]
        ).all()
    with pytest.raises(InputError, match="score cos_mean needs cross-modal weights"):
        SaeVScorer(spec._replace(score="cos_mean", weights=""))
    with pytest.raises(InputError, match="belong to sae"):
        file.check(make_sae(host, seed=1), host.fingerprint)


def test_weights_of_an_sae_without_sites_are_its_own_wherever_they_are_used(world, tmp_path):
    """As ``mmsae convert`` leaves it: the first attach names the sites, in one command and not yet in another."""
    root, host, _ = world
    bare = make_sae(host)
    bare.sites = {}
    bare.save_pretrained(tmp_path / "bare")
    command(root, tmp_path / "w", sae=str(tmp_path / "bare"), host=host.hint)
    spec = ScorerSpec(str(tmp_path / "bare"), host.hint, "cos_code", str(tmp_path / "w"), "cpu", "fp32", 0, False)
    assert SaeVScorer(spec).score(batch(host))["cos_code"].isfinite().all()
    load_weights(tmp_path / "w").check(SAE.from_pretrained(tmp_path / "bare"), host.fingerprint)


def test_a_killed_job_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    root, host, sae = world
    options = {"selection": "pooled", "n_pool": 12, "n_side": 3, **QUIET}
    run(host, sae, root, tmp_path / "whole", **options)
    seen, capture = [], host.capture

    def dies(batch, sites):
        seen.append(batch.shards[0])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return capture(batch, sites)

    monkeypatch.setattr(host, "capture", dies)
    with pytest.raises(KeyboardInterrupt):
        run(host, sae, root, tmp_path / "killed", **options)
    assert len(list((tmp_path / "killed" / "parts").glob("*.part"))) == 1
    (tmp_path / ".killed.tmp-0123abcd").mkdir()  # what a kill while the result is written leaves
    run(host, sae, root, tmp_path / "killed", **options)
    assert seen == ["0.tar", "1.tar", "1.tar", "2.tar"]
    for name in ("weights.json", "latent_weights.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_answers_are_text_only_where_asked(world, tmp_path):
    root, host, sae = world
    counts = {}
    for text in ("question", "question+answer"):
        counts[text] = run(host, sae, root, tmp_path / text, text=text, **QUIET)
    assert counts["question+answer"]["tokens"]["text"] == counts["question"]["tokens"]["text"] + 18


def test_a_subset_is_chosen_by_uid(world, tmp_path):
    root, host, sae = world
    subset = Subset(None, 0.5)
    share = sum(subset.keeps(f"{i:032x}") for i in range(2000)) / 2000
    assert share == pytest.approx(0.5, abs=0.05) and not Subset(None, 0.0).keeps("0") and Subset(None, 1.0).keeps("0")
    found = run(host, sae, root, tmp_path / "w", samples=9, progress=False)
    assert 0 < found["pairs"] < 18


def test_lightning_predict_gives_the_same_files(world, tmp_path):
    root = world[0]
    command(root, tmp_path / "a")
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for _ in range(2):  # the second time there is nothing to do
        model = Weights(
            sae=str(root / "sae"), shards=str(root / "shards"), out=str(tmp_path / "b"), n_side=3, samples=None
        )
        pl.Trainer(accelerator="cpu", **options).predict(model, return_predictions=False)
    for name in ("weights.json", "latent_weights.safetensors", "top_tokens.parquet", "gallery.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())


def test_top_tokens_are_those_of_the_naive_search(world, tmp_path):
    root, host, sae = world
    run(host, sae, root, tmp_path / "w", **QUIET)
    best = {}
    for step in unit_batches(sorted(str(p) for p in (root / "shards").iterdir()), None, None, 8, collate=host.collate):
        if not step.batch.uids:
            continue
        tokens = host.capture(step.batch, "layers.1:out")
        for m, codes in encode_tokens(sae, tokens).items():
            for z, item, at in zip(codes.to_dense(), tokens.item[m], tokens.position[m], strict=True):
                for j in (z > 0).nonzero()[:, 0].tolist():
                    samples = best.setdefault((j, m), {})
                    own = (z[j].item(), -int(at), step.batch.shards[item])
                    uid = step.batch.uids[item]
                    samples[uid] = max(samples.get(uid, own), own)
    table = pq.read_table(tmp_path / "w" / "top_tokens.parquet").to_pylist()
    got = {}
    for row in table:
        place = (row["value"], -row["position"], row["shard"])
        got.setdefault((row["latent"], row["modality"]), []).append((row["uid"], place))
    assert got.keys() == best.keys()
    for key, samples in best.items():
        want = sorted(samples.items(), key=lambda kv: (-kv[1][0], kv[0]))[:6]
        assert [u for u, _ in got[key]] == [u for u, _ in want], key
        for (_, a), (_, b) in zip(got[key], want, strict=True):
            assert a[0] == pytest.approx(b[0], rel=1e-5) and a[1:] == b[1:]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"samples": 0}, "samples is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"workers": -1}, "workers is -1"),
     ({"selection": "per_modality", "n_side": 0}, "n_side is 0")],
)  # fmt: skip
def test_wrong_numbers_are_named_and_leave_nothing(world, tmp_path, options, words):
    root, host, sae = world
    with pytest.raises(InputError, match=words):
        run(host, sae, root, tmp_path / "w", **{**QUIET, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_stays_as_it_is(world, tmp_path):
    root, host, sae = world
    (tmp_path / "thesis.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="holds no result of mmsae weights"):
            run(host, sae, root, out, **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no cross-modal weights in"):
        load_weights(tmp_path)
    (tmp_path / "weights.json").write_text(json.dumps({"format": 1}))
    (tmp_path / "latent_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no cross-modal weights in"):
        load_weights(tmp_path)
