"""benchmarks/variants_real.py: its rules and figures on small rows, and a run on photographs at the smallest size."""

import json
from pathlib import Path

import pytest
import torch

from mmsae.bench.multimodal.data import Split
from mmsae.bench.sized import CONTROLS
from mmsae.bench.stages import stages_of

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import variants_real
        import variants_real_table

        yield variants_real, variants_real_table


def maps(benchmark, images, seed, classes=3, positions=4, width=12):
    """Maps whose rows are the direction of the image's class and noise."""
    directions = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels, item = torch.arange(images) % classes, torch.arange(images).repeat_interleave(positions)
    x = 3 * directions[labels[item]] + 0.3 * torch.randn(len(item), width, generator=generator)
    return benchmark[0].Maps(x, item, labels), directions


@pytest.fixture(scope="module")
def images(benchmark):
    (train, directions), (choose, _), (test, _) = (maps(benchmark, n, s) for s, n in enumerate((60, 30, 30)))
    own = benchmark[0]
    return own.Images(train, choose, test, lambda m: own.mean_of(m) @ directions.T)


@pytest.fixture(scope="module")
def pairs(benchmark):
    parts = []
    for seed, n in enumerate((90, 30, 30)):
        m, directions = maps(benchmark, n, seed, positions=1)
        parts.append(Split({"image": m.x, "text": 1.1 * m.x}, [str(c) for c in m.labels], m.labels))
    return benchmark[0].Pairs(*parts, 3 * directions)


SMALL = {"d_sae": 16, "steps": 20, "rows": 32}


def run(benchmark, part, data, out, **more):
    own = benchmark[0]
    part = part._replace(**SMALL, **more)
    stages = stages_of(out, {"benchmark": "test"}, progress=False)
    found = own.Benchmark("part", part, data, stages)
    choices = found.choices()
    return {"size": part._asdict(), "rows": 1, "host": data.host(), "choices": choices,
            "table": list(found.rows(choices, (0, 1)))}  # fmt: skip


def test_images_have_a_row_for_every_variant_k_and_control(benchmark, images, tmp_path, monkeypatch):
    own = benchmark[0]
    some = {"variants": ("topk", "jumprelu", "gated"), "ks": (1, 2, 4)}
    found = run(benchmark, own.IMAGES, images, tmp_path, **some)
    table = found["table"]
    names = [(r["sae"], r["k"]) for r in table]
    assert names == [(v, k) for v in some["variants"] for k in some["ks"]] + [(f"topk ({c})", 2) for c in CONTROLS]
    of = {(r["sae"], r["k"]): r for r in table}
    assert of["topk", 4]["l0"] <= 4 and of["topk", 1]["l0"] == pytest.approx(1) and "fvu_sd" in of["topk", 4]
    assert of["topk", 2]["fvu"] < of["topk (untrained)", 2]["fvu"]
    assert images.host()["means"] == 1 and images.host()["host"] == 1  # three directions are easily told apart
    assert of["topk", 4]["nearest"] > 0.9 and of["topk", 4]["same"] > 0.9
    assert set(found["choices"]["gated"]["tried"]) == set(own.STRENGTHS)
    assert found["choices"]["gated"]["lr"] == found["choices"]["topk"]["lr"]
    assert set(found["choices"]["jumprelu"]["tried"]) == set(own.LRS)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(own, "fit", never)
    assert run(benchmark, own.IMAGES, images, tmp_path, **some)["table"] == table  # what is done is read


def test_every_variant_trains_on_its_part(benchmark, images, pairs, tmp_path):
    for part, data in ((benchmark[0].IMAGES, images), (benchmark[0].PAIRS, pairs)):
        found = benchmark[0].Benchmark("part", part._replace(**SMALL), data, stages_of(tmp_path, {}, progress=False))
        for variant in part.variants:
            sae = found._fit(variant, 3, 1e-2, 0)
            assert tuple(sae.modalities) == part.modalities and sae.normaliser.centre
            assert all(torch.isfinite(torch.tensor(v)) for k, v in data.score(sae).items() if "ms" not in k)


def test_codes_of_pairs_tell_classes_and_the_report_has_everything(benchmark, pairs, tmp_path):
    some = {"variants": ("paired_topk", "shared_topk"), "ks": (2, 4)}
    found = run(benchmark, benchmark[0].PAIRS, pairs, tmp_path, **some)
    of = {(r["sae"], r["k"]): r for r in found["table"]}
    assert found["host"] == {"host": 1.0} and of["paired_topk", 4]["zero_code"] > 0.9
    row = of["paired_topk", 4]
    assert row["fvu"] == pytest.approx((row["fvu_image"] + row["fvu_text"]) / 2)
    path = benchmark[1].write_report(tmp_path, {"seeds": [0, 1], "parts": {"pairs": found}})
    text = path.read_text()
    assert text.count("| paired_topk |") == 3 and "| shared_topk (encoder frozen) | 4 |" in text
    assert f"{row['fvu']:.3f} ({row['fvu_sd']:.3f})" in text and (tmp_path / "front.png").stat().st_size > 5000


def test_the_learning_rate_is_of_the_lowest_error_at_about_k(benchmark):
    own = benchmark[0]
    tried = {1e-3: {"fvu": 0.3, "l0": 16.0}, 1e-2: {"fvu": 0.2, "l0": 17.0}, 1e-1: {"fvu": 0.1, "l0": 60.0}}
    assert own.chosen_lr(tried, 16) == 1e-2  # a lower error at 60 latents is not better
    assert own.chosen_lr({1e-3: {"fvu": 0.1, "l0": 60.0}, 1e-2: {"fvu": 0.2, "l0": 5.0}}, 16) == 1e-2
    assert own.chosen_strength(tried, 40) == 1e-1


def test_dead_latents_are_silent_in_all_modalities(benchmark, pairs):
    own = benchmark[0]
    sae = own.Benchmark("part", own.PAIRS._replace(**SMALL), pairs, None)._fit(
        "shared_topk", 2, 1e-2, 0, control="untrained"
    )
    on = [own.fired(sae.encode(pairs.train[m], m)) for m in ("image", "text")]
    dense = (sae.encode(pairs.train["image"], "image").to_dense() != 0).any(0)
    assert torch.equal(on[0], dense)
    assert own.front(sae, pairs.train)["dead"] == pytest.approx(1 - float((on[0] | on[1]).double().mean()))


@pytest.mark.slow
def test_the_layers_behind_the_maps_give_the_logits_of_the_host(benchmark, tmp_path):
    if not (SHARED / "hosts" / "lite0").is_dir():
        pytest.skip(f"needs an EfficientNet-Lite0 in {SHARED / 'hosts'}")
    from timm.data import ImageNetInfo

    from mmsae.hosts import load_host

    host = load_host(f"timm:local-dir:{SHARED / 'hosts' / 'lite0'}")
    names = ImageNetInfo().label_names()
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    held = []
    hook = host.model.blocks[6].register_forward_hook(lambda module, args, out: held.append(out))
    with torch.no_grad():
        logits = host.model(x)
    hook.remove()
    rows = held[0].permute(0, 2, 3, 1).reshape(3 * 49, -1)
    m = benchmark[0].Maps(rows, torch.arange(3).repeat_interleave(49), torch.zeros(3, dtype=torch.long))
    assert torch.allclose(benchmark[0].rest_of(host, names[5:9])(m), logits[:, 5:9], atol=1e-4)


@pytest.mark.slow
def test_from_photographs_to_a_table(benchmark, tmp_path):
    data = SHARED / "data"
    if not (data / "cifar10").is_dir():
        pytest.skip(f"needs photographs in {data}")
    path = benchmark[0].main(["--quick", "--parts", "pairs", "--data", str(data), "--out", str(tmp_path / "run")])
    (part,) = json.loads((path.parent / "results.json").read_text())["parts"].values()
    of = {(r["sae"], r["k"]): r for r in part["table"]}
    assert len(of) == 3 * len(benchmark[0].PAIRS.variants) + len(CONTROLS)
    assert part["host"]["host"] > 0.12 and of["paired_topk", 8]["fvu"] < of["shared_topk (untrained)", 8]["fvu"]
