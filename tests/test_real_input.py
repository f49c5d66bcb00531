"""benchmarks/real_input.py on real photographs, at the smallest size."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "cifar10"
METHODS = {
    "paired_topk",
    "paired_topk λ .03",
    "paired_topk shuffled",
    "vl_sae",
    "shared_topk",
    "dual_topk",
    "random weights",
}


@pytest.fixture(scope="module")
def real_input():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import real_input

        yield real_input


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    if not DATA.is_dir():
        pytest.skip(f"needs photographs in {DATA}")
    shards = {"train": "train-000000", "val": "train-000001", "test": "test-000000"}
    args = [a for split, name in shards.items() for a in (f"--{split}", str(DATA / f"cifar10-{name}.tar.gz"))]
    sizes = ["--clip-steps", "20", "--seeds", "0", "--sizes", "48:4", "--lr", "1e-2", "--steps", "30"]
    return [*args, *sizes, "--out", str(tmp_path_factory.mktemp("real") / "run"), "--no-progress"]


@pytest.mark.slow
def test_from_photographs_to_a_table_and_nothing_is_done_twice(real_input, command, monkeypatch):
    table = real_input.main(command)
    results = json.loads((table.parent / "results.json").read_text())
    (size,) = results["sizes"].values()
    assert set(size["scores"]) == METHODS
    first = {name: s[0] for name, s in size["scores"].items()}
    assert results["host"]["zero_shot"]["raw"] > 0.15  # chance is .1
    assert first["paired_topk"]["fvu"]["image"] < first["random weights"]["fvu"]["image"]
    cosine = first["paired_topk"]["code_cosine"]
    assert cosine["difference"] == pytest.approx(cosine["pair"] - cosine["shuffled"])
    assert cosine["difference"] > 0.02
    for s in first.values():
        assert s["zero_shot"]["raw"] == results["host"]["zero_shot"]["raw"]  # the same host for all
        assert s["zero_shot"]["tuning"].keys() >= {"0.0"}  # alpha 0 is among the choices
        for way in ("image_to_text", "text_to_image"):  # an equal caption is of the same class
            assert s["recall"]["caption"][way]["1"] <= s["recall"]["class"][way]["1"]
    text = table.read_text()
    assert all(text.count(f"| {name} |") == 4 + (name != "random weights") for name in METHODS)
    assert text.count("mmsae fit -c configs/train/") == 6

    monkeypatch.setattr(real_input, "pretrain_clip", None)  # must not be called again
    written = {f: f.stat().st_mtime_ns for f in table.parent.glob("sae/*/sae/*")}
    real_input.main(command)
    assert table.read_text() == text
    assert written == {f: f.stat().st_mtime_ns for f in table.parent.glob("sae/*/sae/*")} and written


def test_the_lowest_validation_fvu_without_a_warning_is_chosen(real_input, monkeypatch):
    from types import SimpleNamespace

    import torch

    from mmsae.types import Codes

    fvu_of, warned = {1e-3: 0.5, 1e-2: 0.1, 1e-1: 0.3}, {1e-2}

    class Fake:
        def __init__(self, lr):
            self.lr = lr

        def encode(self, x, m):
            return Codes(torch.full((len(x), 1), self.lr), None, 1, m)

        def decode(self, codes, m):
            return codes.values

    monkeypatch.setattr(real_input, "trained", lambda out, name, size, setting, seed: (Fake(setting["lr"]), []))
    monkeypatch.setattr(real_input, "fvu", lambda x_hat, x: fvu_of[round(x_hat[0].item(), 6)])
    monkeypatch.setattr(
        real_input, "pair_report", lambda a, b, **_: {"warnings": ["hub"] * (round(a.values[0].item(), 6) in warned)}
    )
    val = real_input.Split({m: torch.ones(2, 1) for m in ("image", "text")}, ["a", "b"], torch.arange(2))

    def choose():
        args = SimpleNamespace(lr=list(fvu_of), steps=[30], out=Path("."))
        return real_input.select(args, "paired_topk", (48, 4), val)["chosen"]["lr"]

    assert choose() == 1e-1  # 1e-2 is lower, but warned about
    warned.clear()
    assert choose() == 1e-2
    warned.update(fvu_of)
    assert choose() == 1e-2


def test_one_training_shard_cannot_be_split(real_input, command, tmp_path):
    from mmsae.types import InputError

    no_val = [a for i, a in enumerate(command) if "--val" not in (a, command[i - 1])]
    with pytest.raises(InputError, match="2 are needed"):
        real_input.main([*no_val, "--out", str(tmp_path)])


def test_a_folder_of_other_settings_is_refused(real_input, command, tmp_path):
    from mmsae.types import InputError

    (tmp_path / "settings.json").write_text(json.dumps({"host": "another"}))
    with pytest.raises(InputError, match="give another --out"):
        real_input.main([*command, "--out", str(tmp_path)])
