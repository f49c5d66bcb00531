"""``mmsae steer`` on a tiny Stable Diffusion: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import warnings

import pytest
import torch

from mmsae import SAE
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.metrics.concepts.names import LatentName, write_names
from mmsae.sae import AffineEncoder, TopK
from mmsae.sae.fingerprint import sae_fingerprint
from tests.helpers.diffusion import sd

TEXT_SITE = "text_encoder.layers.1:out[all]"
BLOCK = "unet.down_blocks.1.attentions.0:out"
QUICK = ["--steps", "2", "--progress", "false", "--batch-size", "3", "--seeds", "0", "1"]
PROMPTS = ["a red cat", "a photo of blue dog"]


@pytest.fixture(autouse=True)
def large_changes_are_wanted_here():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*may break")
        yield


def red(images, prompts):
    """A scorer that the command line names."""
    return images[:, 0].mean((1, 2))


def channel(i):
    """What makes a scorer."""
    return lambda images, prompts: images[:, i].mean((1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("steer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd().save_pretrained(root / "pipeline")
    host = load_host(f"diffusers:{root / 'pipeline'}")
    for name, spec in (("text", TEXT_SITE), ("block", BLOCK)):
        torch.manual_seed(0)
        site = host.site(spec)
        sae = SAE(site.width, d_sae=48, modalities=(site.modality,), encoder=AffineEncoder(), selector=TopK(8))
        sae.sites = {site.modality: site}
        sae.save_pretrained(root / name)
    (root / "prompts.txt").write_text("# tuning prompts\na red square\n\na photo of red circle\n")
    (root / "concepts.yaml").write_text("red: [red cat, red dog]\nblue: [blue cat, blue dog]\n")
    return root


def run(made, sae, *args, out="run"):
    main(["steer", "--host", f"diffusers:{made / 'pipeline'}", "--sae", str(made / sae), "--out", str(made / out),
          "--prompts", *PROMPTS, *QUICK, *args])  # fmt: skip
    return made / out


def live(made, out):
    from mmsae.steering import FeatureStats

    return FeatureStats.load(made / out / "stats").live().tolist()


def refused(capsys, made, *args, **kwargs):
    with pytest.raises(SystemExit) as e:
        run(made, *args, **kwargs)
    assert e.value.code == 2
    return capsys.readouterr().err


def test_a_sweep_writes_pictures_tables_results_and_a_report(made, capsys):
    import pandas as pd

    here = "tests.steering.test_command"
    folder = run(made, "text", "--features", "3", "--op", "set", "--unit", "raw", "--strengths", "2", "-2",
                 "--controls", "2", "--scorers", f"red={here}:red", f"green={here}:channel(1)")  # fmt: skip
    assert capsys.readouterr().out.strip() == str(folder)
    table = pd.read_parquet(folder / "table.parquet")
    assert len(table) == 2 * 2 * (1 + 2 * (1 + 2)) * 3 and set(table.metric) == {"moved", "red", "green"}
    assert len(pd.read_csv(folder / "table.csv")) == len(table)
    at = table[(table.strength == 2) & (table.metric == "moved")]
    mine, control = at[at.control < 0], at[at.control >= 0]
    assert (mine.value > 0).all() and (control.value > 0).all()
    assert mine.relative.mean() == pytest.approx(control.relative.mean(), rel=1e-5) and (mine.share > 0).all()
    results = json.loads((folder / "results.json").read_text())
    assert results["name"] == "set 3" and {r["strength"] for r in results["verdicts"]["red"]} == {2, -2}
    assert results["verdicts"]["red"][0]["controls"] == 2
    page = (folder / "report.html").read_text()
    assert "Before and after" in page and page.count("data:image/png") == 2
    assert all((folder / f).stat().st_size > 1000 for f in ("before_after.png", "dose.png"))


def test_features_are_called_by_their_names(made, capsys):
    sae = sae_fingerprint(SAE.from_pretrained(made / "text"))
    names = write_names(made / "names.json", {3: LatentName("red <b>", "wpmi", auroc=0.875), 5: LatentName(None)}, sae)
    other = write_names(made / "other.json", {3: LatentName("red")}, "0" * 32)
    args = ["--features", "3", "5", "--op", "set", "--unit", "raw", "--strengths", "2", "--controls", "0"]
    assert "names latents of SAE 000000000000" in refused(
        capsys, made, "text", *args, "--names", str(other), out="refused"
    )
    folder = run(made, "text", *args, "--names", str(names), out="named")
    said = json.loads((folder / "results.json").read_text())
    assert said["features"]["3"]["name"] == "red <b>" and said["features"]["5"]["name"] is None
    page = (folder / "report.html").read_text()
    assert "set 3 5 (red &lt;b&gt;)" in page and "no name held up" in page and "0.875" in page and "red <b>" not in page


def test_a_killed_run_goes_on_and_another_job_is_refused(made, capsys):
    args = ["--features", "3", "--op", "set", "--unit", "raw", "--strengths", "2", "--controls", "0"]
    folder = run(made, "text", *args, out="again")
    whole = (folder / "table.csv").read_bytes()
    parts = sorted((folder / "parts").glob("*.parquet"))
    before, gone = parts[0].stat().st_mtime_ns, parts[1]
    gone.unlink()
    assert (run(made, "text", *args, out="again") / "table.csv").read_bytes() == whole
    assert parts[0].stat().st_mtime_ns == before and gone.exists() and len(parts) == 2
    assert "its strengths is [2.0] there and [3.0] here" in refused(
        capsys, made, "text", *args[:-3], "3", *args[-2:], out="again"
    )
    assert (folder / "table.csv").read_bytes() == whole


def test_statistics_are_measured_where_none_are_given(made):
    folder = run(
        made, "text", "--features", "0", "--unit", "raw", "--controls", "2", "--strengths", "1", out="stats_raw"
    )
    ids = live(made, folder.name)
    assert len(ids) > 3
    args = ["--features", str(ids[0]), "--strengths", "3", "--controls", "3", "--stats", str(folder / "stats")]
    again = run(made, "text", *args, out="stats_given")
    assert not (again / "stats").exists() and (again / "report.html").exists()


def test_a_block_of_the_denoiser_under_a_mask(made):
    import numpy as np
    import pandas as pd
    from PIL import Image

    half = np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    Image.fromarray(half).save(made / "mask.png")
    folder = run(made, "block", "--features", "1", "2", "--unit", "rel_norm", "--strengths", "0.3", "--branch", "all",
                 "--mask", str(made / "mask.png"), "--window", "0", "1", "--controls", "2",
                 out="block_run")  # fmt: skip
    table = pd.read_parquet(folder / "table.parquet")
    mine = table[(table.strength > 0) & (table.control < 0)]
    assert mine[mine.metric == "moved"].value.min() > 0 and mine[mine.metric == "inside"].value.between(0, 1).all()
    assert mine.share.to_numpy() == pytest.approx(0.5) and mine.relative.to_numpy() == pytest.approx(0.3, rel=1e-4)


def test_concepts_words_and_forgetting(made):
    quick = ["--controls", "0"]
    run(made, "text", "--concept", "red cat", "--strengths", "-0.5", *quick, out="concept")
    run(made, "text", "--words", "red", "blue", "--anchors", str(made / "prompts.txt"), "--top", "4",
        "--strengths", "3", "--controls", "2", out="words")  # fmt: skip
    folder = run(made, "block", "--forget", "red", "--anchors", str(made / "concepts.yaml"), "--percentile", "95",
                 "--strengths", "-1", "-5", *quick, out="forget")  # fmt: skip
    names = {json.loads((made / f / "results.json").read_text())["name"] for f in ("concept", "words", "forget")}
    assert names == {"red cat", "red to blue", "forget red"} and (folder / "concept_stats.safetensors").exists()


def test_an_edit_in_yaml_and_on_the_command_line_is_the_same(made):
    import pandas as pd

    recipe = made / "recipe.yaml"
    recipe.write_text(
        "edit: [{op: set, ids: [3], v: 2.0}, {op: ablate, ids: [5]}]\nunit: raw\nstrengths: [1.0]\ncontrols: 0\n"
    )
    a = run(made, "text", "-c", str(recipe), out="yaml")
    b = run(made, "text", "--edit", "{op: set, ids: [3], v: 2.0}", "{op: ablate, ids: [5]}", "--unit", "raw",
            "--strengths", "1", "--controls", "0", out="flags")  # fmt: skip
    left, right = (pd.read_parquet(f / "table.parquet") for f in (a, b))
    pd.testing.assert_frame_equal(left, right)


def test_bad_input_is_one_sentence_and_leaves_nothing(made, capsys):
    raw = ["--unit", "raw", "--controls", "0"]
    update = "unet.down_blocks.1.attentions.0:update"
    forget = ("block", "--forget", "pink", "--anchors", str(made / "concepts.yaml"))
    (made / "broken.yaml").write_text("red: [a")
    (made / "number.yaml").write_text("red: 3")
    cases = [
        (("text", "--features", "99", *raw), "feature 99 is not one of the SAE's 48 latents"),
        (("text",), "say how to steer by one of features, edit, concept, words, forget: none was given"),
        (("text", "--features", "1", "--concept", "x"), "features, concept was given"),
        (("text", "--features", "1", "--strengths", "0"), "must be different and not 0"),
        (("text", "--features", "1", "--window", "1", "3"), "window [1, 3]"),
        (("text", "--features", "1", "--site", BLOCK), "this SAE was trained at text_encoder"),
        (("block", "--features", "1", *raw, "--site", update), "an update is output minus"),
        (("text", "--features", "1", "--unit", "x_furlong"), "x_furlong"),
        (("text", "--features", "1", "--scorers", "red=no_such_module:red"), "no_such_module"),
        (("text", "--features", "1", "--scorers", "red"), "NAME=MODULE:SCORER"),
        (("text", "--features", "1", "--target", "a dog"), "needs a judge"),
        (("text", "--features", "1", "--mask", str(made / "none.png")), "none.png cannot be read"),
        (("text", "--words", "red", "blue"), "words needs anchors"),
        (("block", "--forget", "red", "--strengths", "2"), "negative factors"),
        ((*forget, "--strengths", "-1"), "concept 'pink'"),
        (("text", "--features", "1", "--stats", str(made / "nothing")), "no statistics of features"),
        ((*forget[:3], "--anchors", str(made / "broken.yaml"), "--strengths", "-1"), "broken.yaml cannot be read"),
        ((*forget[:3], "--anchors", str(made / "number.yaml"), "--strengths", "-1"), "not {'red': 3}"),
        (("text", "--features", "1", *raw, "--batch-size", "0"), "batch_size is 0; it must be at least 1"),
        (("text", "--words", "red", "blue", "--anchors", "x", "--unit", "raw"), "unit 'raw' has no meaning with words"),
        ((*forget, "--strengths", "-1", "--window", "0", "1"), "window (0, 1) has no meaning with forget"),
        (("text", "--features", "1", "--controls", "-1"), "controls is -1; it must be at least 0"),
        (("text", "--features", "1", *raw, "--steps", "0"), "steps is 0; it must be at least 1"),
    ]  # fmt: skip
    for args, message in cases:
        err = refused(capsys, made, *args, out="bad")
        assert message in err, (args, err)
        assert err.count("\n") == 1 and not (made / "bad").exists(), args


def test_a_folder_of_something_else_keeps_its_files(made, capsys):
    (made / "mine").mkdir()
    (made / "mine" / "table.csv").write_text("mine")
    assert "mine has table.csv" in refused(capsys, made, "text", "--features", "3", "--unit", "raw", out="mine")
    assert [(p.name, p.read_text()) for p in (made / "mine").iterdir()] == [("table.csv", "mine")]


def test_hosts_that_draw_nothing_are_refused(made, capsys):
    from tests.helpers.encoders import MODELS, save_local

    with pytest.raises(SystemExit):
        clip = save_local(made / "clip", next(iter(MODELS.values())))
        main(["steer", "--host", clip, "--sae", str(made / "text"), "--prompts", "x", "--features", "1"])
    assert "draws no images" in capsys.readouterr().err
