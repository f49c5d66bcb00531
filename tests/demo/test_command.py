"""The demo, end to end at the tiny profile: killed in the middle, started again, and its figures beside random ones."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmsae.sae import SAE
from mmsae.sae.fingerprint import sae_fingerprint

METHODS = ("paired_topk", "vl_sae", "shared_topk", "random")


def command(out, log):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    args = [sys.executable, "-m", "mmsae.cli", "demo", "--out", str(out), "--profile", "tiny", "--progress", "false"]
    return subprocess.Popen(args, stdout=log.open("w"), stderr=subprocess.STDOUT, env=env)


def side_processes(out):
    """Processes for the vision-language and the drawing part of this demo."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            args = file.read_bytes().split(b"\0")
            if {b"mmsae.demo.llava", b"mmsae.demo.diffusion"} & set(args) and str(out).encode() in args:
                found.append(file)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was killed while its second SAE trained (or soon after) and started again."""
    out = tmp_path_factory.mktemp("demo") / "run"
    log = out.with_name("log")
    process = command(out, log)
    while process.poll() is None and not (out / "vl_sae").exists():
        time.sleep(0.05)
    assert process.poll() is None, log.read_text()
    assert side_processes(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 20
    while side_processes(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert not side_processes(out), "a process outlives the demo"
    assert not (out / "results.json").exists() and not (out / "report.html").exists()
    code, text = command(out, log).wait(), log.read_text()
    assert code == 0, text
    return out, text, json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_ends_with_the_path(finished):
    _, text, results = finished
    for stage in ("world_train", "clip", "extract_train", "fit_paired_topk"):
        assert f"[{stage}] done before" in text
    assert "[fit_shared_topk]\n" in text
    assert text.strip().splitlines()[-1].endswith("report.html")
    assert set(results["seconds"]) >= {"clip", "fit_vl_sae", "score", "evidence", "browser"}


@pytest.mark.slow
def test_it_ends_with_the_browser_of_its_saes_beside_each_other_and_random_weights(finished):
    out, text, _ = finished
    assert f"browser: {out / 'browser' / 'index.html'}" in text
    assert 'href="browser/index.html"' in (out / "report.html").read_text()
    shown = SAE.from_pretrained(out / "paired_topk" / "sae")
    assert json.loads((out / "browser" / "browser.json").read_text())["sae"] == sae_fingerprint(shown)
    for sae in ("paired_topk", "vl_sae", "random"):
        assert (out / sae / "evidence" / "names" / "names.json").is_file()


@pytest.mark.slow
def test_results_have_the_promised_fields_and_are_far_from_random(finished):
    _, _, r = finished
    assert set(r["clip"]["zero_shot"]) >= {"colour", "shape", "size", "texture", "background", "position"}
    assert set(r["clip"]["recall_at_1"]) == {"image_to_text", "text_to_image"}
    assert set(r["methods"]) == set(METHODS)
    for m in r["methods"].values():
        assert set(m["fvu"]) == {"image", "text"} and set(m["concept_f1"]) == {"image", "text", "same"}
        assert set(m["concept_f1_by_group"]["image"]) >= {
            "colour",
            "shape",
            "size",
            "texture",
            "background",
            "position",
        }
        assert {"top_concept_agreement", "recall_at_1", "dead_fraction"} <= set(m)
        assert {"pair", "shuffled"} <= set(m["code_cosine"]) and "same" in m["concept_auc"]
        assert {k: set(v) for k, v in m["mismatch"].items()} == {
            kind: {"pair_code", "pair_weighted"} for kind in ("swap", "attribute")
        }
    assert set(r["mismatch"]["swap"]) == {"clip", "clip_centred"}
    assert set(r["zero_shot"]) >= {"raw", "recon", "code", "enhanced", "alpha"}
    paired, chance = r["methods"]["paired_topk"], r["methods"]["random"]
    assert paired["fvu"]["image"] < 0.3 * chance["fvu"]["image"]
    assert paired["concept_f1"]["same"] > chance["concept_f1"]["same"] + 0.1
    assert paired["recall_at_1"] > chance["recall_at_1"]
    assert paired["code_cosine"]["pair"] - paired["code_cosine"]["shuffled"] > 0.5
    assert paired["mismatch"]["swap"]["pair_code"] > 0.95


@pytest.mark.slow
def test_a_damaged_set_is_filtered_and_the_reasons_name_what_is_wrong(finished):
    out, _, results = finished
    f = results["filter"]
    assert f["samples"] == 600 and f["kept"] == 420 and f["damaged"] == {"swap": 90, "attribute": 90}
    assert f["damaged_share"]["before"] == pytest.approx(0.3)
    assert f["damaged_share"]["kept"] < 0.1 < 0.7 < f["damaged_share"]["dropped"]
    for kind, least in (("swap", 0.98), ("attribute", 0.85)):
        assert set(f["auroc"][kind]) >= {"clip", "clip_centred", "pair_code", "pair_weighted"}
        assert min(f["auroc"][kind].values()) > least
    assert f["reason_named"]["share"] > 0.5
    assert all(e["truth"] for e in f["examples"]["One wrong word, dropped"])
    assert (out / "filter" / "report.html").exists() and (out / "filter" / "scores.parquet").exists()


@pytest.mark.slow
def test_pictures_from_elsewhere_are_detected_beside_controls(finished):
    out, _, results = finished
    o = results["ood"]
    assert set(o["images"]) >= {"id", "digits", "noise", "checker"} and min(o["images"].values()) > 50
    for figure in ("auroc", "fpr95_ood_positive"):
        detectors = {"raw mds", "code mds", "codes recon", "random codes recon", "pca codes recon"}
        assert detectors | {"statistics pixels mds"} <= set(o[figure])
        assert all(set(v) == {"digits", "noise", "checker", "near", "far"} for v in o[figure].values())
    assert o["auroc"]["codes recon"]["noise"] > 0.9
    assert o["auroc"]["codes recon"]["far"] > o["auroc"]["random codes recon"]["far"]
    html = (out / "report.html").read_text()
    assert "Images from elsewhere" in html and (out / "ood" / "tables.md").exists()


@pytest.mark.slow
def test_the_llava_is_asked_with_and_without_concepts(finished):
    out, _, results = finished
    h = results["hallucination"]
    assert set(h["pope"]) == {"random", "adversarial"}
    for methods in h["pope"].values():
        assert list(methods) == ["greedy", "beta", "concept"]
        assert all(m["n"] == 80 and {"accuracy", "f1", "yes_ratio"} <= set(m) for m in methods.values())
    assert {f"{k}/{m}" for k in ("fvu", "l0", "dead") for m in ("image", "text")} <= set(h["token_sae"])
    assert h["token_sae"]["fvu/image"] < 0.6 and h["token_sae"]["fvu/text"] < 0.6
    ce = h["ce_recovered"]["image_text"]
    assert ce["original"] < ce["reconstructed"] < ce["zeroed"] and ce["recovered"] > 0.5
    assert h["weights"]["weighted"] > 50 and len(h["latents"]) == 12
    assert set(h["seconds"]) >= {"llava", "fit_llava_tokens", "weights", "fit_llava_concepts", "hallucination"}
    html = (out / "report.html").read_text()
    for title in ("Filtering a damaged set", "why</h2>", "A vision-language model", "Does it see what it says?"):
        assert title in html


@pytest.mark.slow
def test_a_colour_is_steered_beside_random_directions(finished):
    out, _, results = finished
    r = results["steering"]
    assert {"colour", "background", "probe", "n"} <= set(r["pipeline"]) and r["pipeline"]["n"] == 12
    ways = {row["way"]: row for row in r["table"]}
    assert list(ways) == ["unsteered", "target prompt", "SAE reconstruction", "substitution", "random 0", "random 1"]
    assert ways["random 0"]["relative"] == pytest.approx(ways["substitution"]["relative"]) and r["edit"]["k"] > 0
    assert ways["unsteered"]["relative"] == 0 and len(r["tried"]) == 16
    assert len(set(r["prompts"]["reported"])) == 6 and r["text_sae"]["fvu/text"] < 0.5
    assert set(r["seconds"]) == {"diffusion", "probe", "prompts", "fit_text", "steering"}
    assert "Drawing, and steering what is drawn" in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_benchmark_card_is_there_and_linked(finished):
    out, _, _ = finished
    card = json.loads((out / "evaluation" / "results.json").read_text())
    assert card["skipped"] == {} and (out / "evaluation" / "report.html").exists()
    assert {r["head"] for r in card["rows"]} >= {"core", "probes", "ontology", "monosemanticity", "pairs", "stability"}
    fvu = {r["control"]: r["value"] for r in card["rows"] if (r["score"], r["set"]) == ("fvu", "test")}
    assert fvu[""] < fvu["pca"] < fvu["random"]
    html = (out / "report.html").read_text()
    assert "Benchmark card" in html and 'href="evaluation/report.html"' in html


@pytest.mark.slow
def test_the_report_is_one_file_with_pictures(finished):
    out, _, _ = finished
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") > 20 and "<svg" in html
    assert not any(f'{attr}="http' in html for attr in ("src", "href"))


@pytest.mark.slow
def test_another_demo_in_the_same_folder_is_refused(finished, capsys):
    from mmsae.cli import main

    out, _, _ = finished
    with pytest.raises(SystemExit) as error:
        main(["demo", "--out", str(out), "--profile", "default"])
    assert error.value.code == 2
    assert "holds a demo of another job: its profile is" in capsys.readouterr().err
