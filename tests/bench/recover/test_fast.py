"""FAST beside packed blocks at smoke size, and the rule by which its claim is judged."""

import json

import pytest
import torch

from mmsae.bench.recover import fast
from mmsae.bench.recover.claims import answers
from mmsae.bench.recover.fast import NAME, FastSizes, conversation_tokens, fitted, token_figures
from mmsae.bench.recover.run import bench_recover
from mmsae.bench.sized import sae_recipes

TINY = FastSizes(
    scenes=200, clip_steps=2, base_steps=2, train=120, held=40, d_sae=24, k=3, rows=64, buffer=1024
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("fast")
    return root, bench_recover(root, ["topk", "jumprelu", "relu_l1"], [NAME], (0, 1), 30, False, TINY)


@pytest.fixture(scope="module")
def held(done):
    return conversation_tokens(str(done[0] / "base"), "held", TINY)


def test_what_it_writes(done):
    root, found = done
    rows = found[NAME]
    assert list(rows) == ["topk (whole)", "topk (packed)", "jumprelu (whole)", "jumprelu (packed)"]
    assert all(row["mse_special"] > 0 and "mse_special_sd" in row for row in rows.values()) and found["worlds"] == {}
    assert rows["topk (whole)"]["mse_special"] != rows["topk (packed)"]["mse_special"]
    table = (root / "table.md").read_text()
    assert f"### {NAME}: " in table and "FAST, arXiv 2506.07691) | " in table
    assert json.loads((root / "results.json").read_text())[NAME] == rows
    assert (root / "report.html").stat().st_size


def test_it_goes_on_without_training_again(done, monkeypatch):
    root, found = done
    monkeypatch.setattr(fast, "fitted", None)
    again = bench_recover(root, ["topk"], [NAME], (0, 1), 30, False, TINY)
    assert again[NAME] == {k: v for k, v in found[NAME].items() if k.startswith("topk")}


def test_without_its_saes_no_model_is_trained(tmp_path):
    assert bench_recover(tmp_path, ["relu_l1"], [NAME], (0,), 30, False, TINY)[NAME] == {}
    assert not (tmp_path / "base").exists()


def test_both_ways_have_the_same_tokens(held):
    """Equally many of each role, and the first conversation of a block is what it is alone."""
    whole, packed = (held[way] for way in fast.WAYS)
    for a, b in zip(whole, packed, strict=True):
        for column in ("role", "special", "position"):
            counts = [getattr(t, column)["text"].long().bincount() for t in (a, b)]
            assert torch.equal(*counts)
        x, y = (t.x["text"][t.item["text"] == 0] for t in (a, b))
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    special = whole[0].special["text"]
    assert 0 < special.sum() < len(special) / 2
    seen = [t.x["text"][t.item["text"] == 1] for t in (whole[0], packed[0])]
    assert (seen[0] - seen[1]).abs().max() > 1e-2  # the second sees the first


def test_errors_are_those_of_the_flagged_rows(held):
    sae = fitted(sae_recipes()["topk"], held["whole"], TINY, 20, 0)
    found = token_figures(sae, held)
    for way, prefix in (("whole", "mse"), ("packed", "packed")):
        x, special = (torch.cat([getattr(t, c)["text"] for t in held[way]]) for c in ("x", "special"))
        with torch.no_grad():
            error = (sae.decode(sae.encode(x, "text"), "text") - x).square().mean(1)
        assert found[f"{prefix}_special"] == pytest.approx(float(error[special].mean()), rel=1e-4)
        assert found[f"{prefix}_other"] == pytest.approx(float(error[~special].mean()), rel=1e-4)
    assert found["l0"] <= 3 and 0 <= found["dead"] < 1


def test_the_claim_is_seen_by_its_rule_alone():
    def told(topk, jumprelu, l0=3.0):
        row = {"mse_special": 1.0, "mse_other": 1.0, "l0": 3.0}
        rows = {f"{v} (packed)": row for v in fast.VARIANTS}
        rows |= {
            "topk (whole)": row | {"mse_special": topk},
            "jumprelu (whole)": row | {"mse_special": jumprelu, "l0": l0},
        }
        return next(said for text, said, _ in answers({NAME: rows}) if "FAST" in text)

    assert told(0.9, 0.9) == "seen" and told(0.9, 0.97) == told(0.97, 0.9) == told(0.9, 0.9, l0=4.0) == "not seen"
    assert next(said for text, said, _ in answers({}) if "FAST" in text) == "not asked"
