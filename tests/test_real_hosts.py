"""Tables of benchmarks/real_hosts.py: figures over seeds with intervals, beside controls; and its arguments."""

import json
from pathlib import Path

import pytest

import mmsae.evaluation.card.card  # noqa: F401  it registers the heads
from mmsae.evaluation.rows import row
from mmsae.evaluation.suite import load_suite
from mmsae.training.cli import build_cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import real_hosts
        import real_hosts_table

        yield real_hosts, real_hosts_table


def test_a_figure_is_the_mean_over_seeds_with_the_range_of_values_and_intervals(benchmark):
    table = benchmark[1]
    seeds = [[row("ood", "digits", "mds", "raw", v, 10, low=v - 0.1, high=v + 0.05)] for v in (0.7, 0.9)]
    seeds[0].append(row("ood", "digits", "mds", "code", 0.5, 10, "random"))
    found = table.over_seeds(seeds)
    assert found["ood", "digits", "mds", "raw", ""] == pytest.approx((0.8, 0.6, 0.95, 2))
    lines = table.table(found, "ood").splitlines()
    assert lines[0] == "| set | score | raw | code, random |"
    assert lines[2] == "| digits | mds | 0.800 (0.600–0.950) | 0.500 (0.500–0.500) |"


def test_the_report_has_every_case_and_says_on_how_many_each_was_fitted(benchmark, tmp_path):
    for seed, value in (("0", 0.6), ("1", 0.8)):
        about = {"site": "image:x", "images": {"train": 5000}, "fitted_on": {"knn": 5000, "recon": 4500}}
        ood_rows = [
            row("ood", "digits", "knn", "raw", value, 9, auroc=value),
            row("ood", "id", "id_accuracy", "raw", 1, 9),
        ]
        card = {"site": {"image": "image:x"}, "rows": [row("core", "test", "fvu", "recon", value, 9)]}
        for kind, content in (("ood", {**about, "rows": ood_rows}), ("card", card)):
            folder = tmp_path / "maps" / seed / kind
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(content))
    half = tmp_path / "half" / "0" / ".card.tmp-1"  # of a card that is being written
    half.mkdir(parents=True)
    (half / "results.json").write_text("{}")
    text = benchmark[1].write_report(tmp_path, tmp_path / "out" / "report.md").read_text()
    assert "half" not in text and text.count("### What it cannot show") == 1
    assert "## maps" in text and "image:x; 2 seeds." in text and "Fitted on: knn 5,000, recon 4,500." in text
    assert text.count("0.700 (0.600–0.800)") == 2 and "id_accuracy" not in text


def test_what_is_said_in_short_follows_the_tables(benchmark, tmp_path):
    """Cases of a page that were not run again stay, and their findings too."""
    import real_hosts_findings as said

    page = tmp_path / "report.md"
    page.write_text(
        "# x\n\n## In short\n\nstale\n\n## patches\n\nimage:y; 3 seeds.\n\n`core`:\n\n"
        "| set | score | recon | recon, random | recon, pca | code | raw |\n|---|---|---|---|---|---|---|\n"
        "| test | fvu | 0.300 (0.290–0.310) | 0.800 (0.790–0.810) | 0.305 (0.300–0.310) | – | – |\n"
        "| test | MS | – | – | – | 0.100 (0.090–0.110) | 0.200 (0.190–0.210) |\n"
    )
    text = benchmark[1].write_report(tmp_path / "none", page).read_text()
    assert "stale" not in text and text.count("## patches") == 1 and "| test | fvu | 0.300 (0.290–0.310)" in text
    assert (
        "(FVU): .300, not told apart from as many principal components (.305), better than random weights (.800)."
        in text
    )
    assert "**Where codes lose**: 1 of 1 figures are worse than those of raw features: MS." in text
    a, b = said.Value(0.5, 0.4, 0.6), said.Value(0.7, 0.65, 0.8)
    assert said.compared(a, b) == "worse than" and said.compared(a, b, less=True) == "better than"


def test_a_part_of_shards_and_a_smaller_suite(benchmark, tmp_path):
    from mmsae.shards import FaultLog, expand, read_shard
    from tests.helpers.evaluation import write_colours

    part = benchmark[0].part_of(write_colours(tmp_path / "all", 50, 0), 20, tmp_path / "part")
    whole = [s for p in expand(str(tmp_path / "all")) for s in read_shard(p, FaultLog(), need=(), decode=False)]
    few = [s for p in expand(part) for s in read_shard(p, FaultLog(), need=(), decode=False)]
    assert [s.uid for s in few] == [s.uid for s in whole[:20]] and few[3].raw["png"] == whole[3].raw["png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        path = benchmark[0].suite_of(benchmark[0].CASES["patches"], tmp_path)
    suite = load_suite(path)
    assert {d.limit for d in suite.data.values()} == {200}
    assert all(suite.find(f) for f in (*suite.trees.values(), suite.classes))


def test_recipe_and_suite_take_what_the_benchmark_gives_them(benchmark, tmp_path):
    run = benchmark[0]
    assert set(run.HEADS) <= set(load_suite(str(ROOT / run.SUITE)).heads)
    for case in run.CASES.values():
        more = [f"{run.SAE}ratio", "null", f"{run.SAE}d_sae", str(case.d_sae)]
        path = str(ROOT / "configs" / "train" / "topk_store.yaml")
        cli = build_cli(["-c", path, *more, "--trainer.default_root_dir", str(tmp_path)], run=False)
        assert cli.model.sae.d_sae == case.d_sae and cli.model.sae.selector.k == 32
