"""The demo, end to end at the tiny profile: killed in the middle, started again, and its figures beside random ones."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

METHODS = ("paired_topk", "vl_sae", "shared_topk", "random")


def command(out, log):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    args = [sys.executable, "-m", "mmsae.cli", "demo", "--out", str(out), "--profile", "tiny", "--progress", "false"]
    return subprocess.Popen(args, stdout=log.open("w"), stderr=subprocess.STDOUT, env=env)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that was killed while its second SAE trained (or soon after) and started again."""
    out = tmp_path_factory.mktemp("demo") / "run"
    log = out.with_name("log")
    process = command(out, log)
    while process.poll() is None and not (out / "vl_sae").exists():
        time.sleep(0.05)
    assert process.poll() is None, log.read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    assert set(results["seconds"]) >= {"clip", "fit_vl_sae", "score"}


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
    assert "holds a demo of" in capsys.readouterr().err
