"""Samples that a vision-language host refuses are counted by every job; questions without captions are read."""

import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmsae.activations import ActivationStore, extract
from mmsae.hosts.lvlm.prompt import Collator
from mmsae.jobs.processes import Local
from mmsae.lvlm.hallucination.answers import AnsweringHost, AskJob, Prompt, ask_all, probe_batches
from mmsae.lvlm.hallucination.questions import Question
from mmsae.lvlm.patches.command import patches
from mmsae.lvlm.weights.command import weights
from mmsae.options import OneProcessRun, call
from mmsae.shards import expand
from mmsae.types import InputError
from tests.helpers.filtering import filter_shards
from tests.helpers.lvlm_jobs import QUESTIONS, make_host, make_sae, picture

BANNER = (60, 1)  # pixels of the picture that is refused
REFUSED = ["refused_by_host", "q.tar", "00003", "ValueError: absolute aspect ratio must be smaller than 200"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A host, an SAE on its tokens, and seven questions in json without any caption, one about a banner."""
    root = tmp_path_factory.mktemp("refused")
    host = make_host(root)
    make_sae(host).save_pretrained(root / "sae")
    with tarfile.open(root / "q.tar", "w") as archive:
        for i in range(7):
            data = io.BytesIO()
            (Image.new("RGB", BANNER) if i == 3 else picture(i)).save(data, "PNG")
            meta = {"question": QUESTIONS[i % len(QUESTIONS)], "answer": "yes", "uid": f"{i:032x}"}
            for field, value in {"png": data.getvalue(), "json": json.dumps(meta).encode()}.items():
                info = tarfile.TarInfo(f"{i:05d}.{field}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))
    return {"root": root, "host": host, "sae": str(root / "sae"), "shards": str(root / "q.tar")}


@pytest.fixture(autouse=True)
def refusing(monkeypatch):
    """As Qwen2-VL's processor refuses pictures of extreme aspect ratio."""
    batch = Collator.batch

    def refuse(self, questions, images, *args, **kwargs):
        if any(image.size == BANNER for image in images):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return batch(self, questions, images, *args, **kwargs)

    monkeypatch.setattr(Collator, "batch", refuse)


def keys(found):
    return [f"{i:05d}" for i in found if i != 3]


def test_extract_and_filter(world, tmp_path):
    store = ActivationStore(extract(world["host"], world["shards"], tmp_path / "s", batch_size=3, workers=0,
                                    fault_limit=0.2, progress=False))  # fmt: skip
    assert store.keys == keys(range(7)) and store.captions[:2] == QUESTIONS[:2]
    assert store.spec.faults["counts"] == {"refused_by_host": 1} and store.spec.faults["examples"] == [REFUSED]
    out = filter_shards(
        world["sae"], world["shards"], str(tmp_path / "f"), host=world["host"].hint, score="l0", keep=1.0, batch_size=3,
        workers=0, fault_limit=0.2, progress=False, device="cpu",
    )  # fmt: skip
    assert pq.read_table(out / "scores.parquet")["key"].to_pylist() == keys(range(7))
    assert json.loads((out / "results.json").read_text())["faults"]["counts"] == {"refused_by_host": 1}
    with pytest.raises(
        InputError, match=r"1 of 7 samples .* refused_by_host 1; the first was refused_by_host q\.tar 00003"
    ):
        extract(world["host"], world["shards"], tmp_path / "t", batch_size=3, workers=0, progress=False)


def test_weights_and_patches(world, tmp_path):
    given = {"host": world["host"].hint, "fault_limit": 0.2, "batch_size": 3, "progress": False, "device": "cpu"}
    given |= {"sae": world["sae"], "shards": world["shards"]}
    found = call(weights, **given, out=str(tmp_path / "w"), samples=None, workers=0)
    assert found["faults"]["counts"] == {"refused_by_host": 1} and found["pairs"] == 6
    found = call(patches, **given, out=str(tmp_path / "p"), scores=["random"], keep=[0.5])
    assert found["questions"] == 6


def test_answers_and_probes(world, tmp_path):
    host, shards = world["host"], world["shards"]

    def prompts(sample):
        return [Prompt(f"{sample.key}/{q}", q) for q in QUESTIONS[:2]]

    def answer(batch):
        return ["yes"] * len(batch.uids)

    ready, run = AnsweringHost(host, {"a": answer, "b": answer}), OneProcessRun(batch_size=3, progress=False)
    found = ask_all(AskJob(ready, tmp_path / "o", {}, shards, prompts, 0, run), 0.2, Local(), print)
    assert {i.split("/")[0] for i in found["a"]} == set(keys(range(7))) and found["a"] == found["b"]
    (part,) = tmp_path.glob("o/parts/*.part")
    assert json.loads(part.read_text())["faults"] == [7, {"refused_by_host": 1}, [REFUSED]]
    asked = [Question(1, f"{i:032x}", "is there a red circle ?", "no") for i in (2, 3)]
    with pytest.raises(InputError, match=rf"question of the probe cannot be asked: .*{3:032x} .ValueError: absolute"):
        list(probe_batches(host, expand(shards), asked, "{question}", 2))
