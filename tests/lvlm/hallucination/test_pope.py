import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch

from mmsae.hosts.lvlm.host import LVLMHost
from mmsae.hosts.sites import Where
from mmsae.lvlm.decoding.directions import find_latents, save_edit, ssl_edit, unit_direction
from mmsae.lvlm.decoding.settings import Settings
from mmsae.lvlm.hallucination.answers import make_methods, probe_batches
from mmsae.lvlm.hallucination.chair import chair_command
from mmsae.lvlm.hallucination.pope import pope
from mmsae.lvlm.hallucination.questions import Question
from mmsae.metrics.host.hallucination import PARSERS
from mmsae.options import call
from mmsae.sae import SAE, Dictionary, DistanceEncoder, TopK
from mmsae.types import Codes, InputError
from tests.helpers.lvlm_jobs import make_host, make_sae, picture

SHORT = Settings(max_new_tokens=4, do_sample=False)
THINGS = ["red circle", "blue square", "green circle", "red square"]
QUIET = {"device": "cpu", "progress": False, "settings": SHORT, "object_names": ["colour", "shape"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A host, a pooled VL-SAE, an SAE on tokens, and two tars of labelled pictures."""
    root = tmp_path_factory.mktemp("pope")
    host = make_host(root)
    torch.manual_seed(0)
    sae = SAE(host.hidden_size, 64, encoder=DistanceEncoder(), selector=TopK(8),
              dictionaries={m: Dictionary("free") for m in ("image", "text")})  # fmt: skip
    sae.sites = {m: host.site(f"layers.1:out[{m}_mean]") for m in ("image", "text")}
    sae.save_pretrained(root / "vlsae")
    make_sae(host).save_pretrained(root / "tokens")
    (root / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as archive:
            for i in range(4 * shard, 4 * shard + 4):
                image = io.BytesIO()
                picture(i).save(image, "PNG")
                own = [dict(zip(("colour", "shape"), THINGS[j % 4].split(), strict=True)) for j in (i, i + 1)]
                meta = {"objects": own, "captions": ["the picture shows a red circle"], "uid": f"{i:032x}"}
                for suffix, data in {"png": image.getvalue(), "json": json.dumps(meta).encode(), "txt": b"a"}.items():
                    info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return root, host


def run(root, host, out, **options):
    given = {"host": host.hint, "shards": str(root / "shards"), "out": str(out), "min_objects": 2, "per_image": 2}
    return call(pope, **{**given, **QUIET, **options})


def captions_of(root, host, out, **options):
    return call(chair_command, host=host.hint, shards=str(root / "shards"), out=str(out), **options)


def test_pope_of_a_model(world, tmp_path):
    root, host = world
    found = run(root, host, tmp_path / "a", methods=["concept", "sample"], sae=str(root / "vlsae"))
    assert list(found["table"]) == ["random", "popular", "adversarial"]
    for own in found["table"].values():
        assert list(own) == ["greedy", "sample", "beta", "concept"] and set(own["greedy"]) == set(PARSERS)
        assert all(p["n"] == 32 for m in own.values() for p in m.values())
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "job.json", "answers.json", "results.json", "pope.png", "parts", "questions_random.json",
        "questions_popular.json", "questions_adversarial.json",
    }  # fmt: skip
    again = run(root, host, tmp_path / "a", methods=["concept", "sample"], sae=str(root / "vlsae"))
    assert again == found
    with pytest.raises(InputError, match="holds the unfinished work of another job: its methods"):
        run(root, host, tmp_path / "a")


def test_answers_do_not_depend_on_a_kill(world, tmp_path):
    root, host = world
    run(root, host, tmp_path / "a", methods=["sample"], strategies=["random"])
    run(root, host, tmp_path / "b", methods=["sample"], strategies=["random"])
    sorted((tmp_path / "b" / "parts").iterdir())[1].unlink()
    run(root, host, tmp_path / "b", methods=["sample"], strategies=["random"])
    assert (tmp_path / "a" / "answers.json").read_bytes() == (tmp_path / "b" / "answers.json").read_bytes()


def test_published_form_of_questions(world, tmp_path):
    root, host = world
    rows = [
        {"question_id": i, "image": f"{i:05d}", "text": f"is there a {t} ?", "label": "no"}
        for i, t in enumerate(THINGS)
    ]
    (tmp_path / "mine.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = run(root, host, tmp_path / "out", questions=str(tmp_path / "mine.json"))
    assert found["table"]["mine"]["greedy"]["official"]["n"] == 4
    (tmp_path / "other.json").write_text(json.dumps({**rows[0], "image": "elsewhere"}) + "\n")
    with pytest.raises(InputError, match="none of the questions is about a sample"):
        run(root, host, tmp_path / "none", questions=str(tmp_path / "other.json"))


def test_questions_about_a_key_that_two_pictures_have_are_refused(world, tmp_path):
    root, host = world
    for name in ("a", "b"):  # as img2dataset calls them
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes((root / "shards" / "0.tar").read_bytes().replace(b'"uid"', b'"vid"'))
    row = {"question_id": 1, "image": "00001", "text": "is there a red circle ?", "label": "no"}
    (tmp_path / "q.json").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"about 00001, which is a sample of a/0\.tar and one of b/0\.tar"):
        run(root, host, tmp_path / "o", shards=[str(tmp_path / n) for n in "ab"], questions=str(tmp_path / "q.json"))


def test_chair_of_a_model(world, tmp_path):
    root, host = world
    options = {**QUIET, "prompt": "what is left of the picture ?", "sae": str(root / "vlsae"), "methods": ["concept"]}
    found = captions_of(root, host, tmp_path / "c", **options)
    assert list(found["table"]) == ["greedy", "beta", "concept"]
    assert all(f["n"] == 8 and f["length"] > 0 for f in found["table"].values())
    details = json.loads((tmp_path / "c" / "captions.json").read_text())
    assert len(details["concept"]) == 8 and (tmp_path / "c" / "chair.png").stat().st_size > 1000
    with pytest.raises(InputError, match="methods ssl and save need --token-sae"):
        captions_of(root, host, tmp_path / "d", **{**options, "methods": ["ssl"]})


def test_directions_are_found_on_other_shards(world, tmp_path, monkeypatch):
    """The random host says neither yes nor no, so its probed answers are replaced: always yes."""
    root, host = world
    answer = LVLMHost.answer

    def probed(self, batch, **options):
        return ["Yes"] * len(batch.uids) if options["max_new_tokens"] == 8 else answer(self, batch, **options)

    monkeypatch.setattr(LVLMHost, "answer", probed)
    options = {"token_sae": str(root / "tokens"), "probe": str(root / "shards"), "strategies": ["random"], "gamma": 5.0}
    found = run(root, host, tmp_path / "a", methods=["ssl", "save"], **options)
    assert list(found["table"]["random"]) == ["greedy", "ssl", "save"] and found["probed"] == 16
    answers = json.loads((tmp_path / "a" / "answers.json").read_text())
    assert answers["greedy"] != answers["ssl"] != answers["save"]
    off = run(root, host, tmp_path / "b", methods=["ssl", "save"], **{**options, "gamma": 0.0})
    same = json.loads((tmp_path / "b" / "answers.json").read_text())
    assert same["ssl"] == same["save"] == same["greedy"] == answers["greedy"] and off["gamma"] == 0
    sae = SAE.from_pretrained(root / "tokens")
    sae.sites = {m: replace(s, host="f" * 32) for m, s in sae.sites.items()}
    sae.save_pretrained(tmp_path / "copy")
    options |= {"token_sae": str(tmp_path / "copy"), "methods": ["ssl"]}
    with pytest.raises(InputError, match=r"of host f{12}.*not on host .*--allow-other-site"):
        run(root, host, tmp_path / "c", **options)
    run(root, host, tmp_path / "c", **options, allow_other_site=True)
    assert json.loads((tmp_path / "c" / "answers.json").read_text())["ssl"] == answers["ssl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "Is {x} there?"}, "something else in braces than a and object"),
        ({"prompt": "Answer in one word."}, "has no {question} in it"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"settings": SHORT._replace(alpha_c=-3.0)}, "alpha_c is -3.0"),
        ({"settings": SHORT._replace(temperature=0.0)}, "temperature 0.0"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(world, tmp_path, options, words):
    root, host = world
    with pytest.raises(InputError, match=words):
        run(root, host, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_the_probe_that_is_broken_is_named(world):
    root, host = world
    lost = [Question(1, "f" * 32, "is there a dog ?", "no")]
    with pytest.raises(InputError, match="1 of 1 images of the probe"):
        next(probe_batches(host, str(root / "shards"), lost, "{question}", 1))


def test_methods_that_lack_something(world):
    _, host = world
    with pytest.raises(InputError, match="methods concept and beta need an SAE"):
        make_methods(["concept"], host, SHORT)
    with pytest.raises(InputError, match="method ssl needs an SAE on tokens"):
        make_methods(["ssl"], host, SHORT)
    with pytest.raises(InputError, match="method 'mine' is not one of"):
        make_methods(["mine"], host, SHORT)


def test_find_latents_on_planted_ones():
    """Latent 3 fires on right answers, 5 on wrong ones; sides of unequal size, in order."""
    right = torch.arange(60) < 45
    z = (torch.rand(60, 8, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    z[:, 3], z[:, 5] = right.float(), (~right).float()
    got = find_latents(Codes(z, None, 8), right, n=1)
    assert (got.faithful.item(), got.hallucination.item(), got.answers) == (3, 5, 15)
    assert got.difference[3] == 1 and got.difference[5] == -1 and got.difference.abs().argmax() in (3, 5)
    sparse = find_latents(Codes(*z.sort(descending=True), 8), right, n=1)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, sparse, strict=True))
    swapped = find_latents(Codes(z, None, 8), ~right, n=1)
    assert (swapped.faithful.item(), swapped.hallucination.item()) == (5, 3)
    with pytest.raises(InputError, match="60 answers are right and 0 wrong"):
        find_latents(Codes(z, None, 8), torch.ones(60, dtype=torch.bool))


def test_direction_edits(world):
    _, host = world
    x = torch.randn(4, 3)
    image, special = torch.tensor([False, True, True, False]), torch.tensor([True, False, False, False])
    prefill = Where(torch.zeros(4, dtype=torch.long), torch.arange(4), image, special, 0)
    decode = prefill._replace(image=torch.zeros(4, dtype=torch.bool), start=4)
    f, h = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    moved = ssl_edit(f, h, 0.5)(x, prefill)
    assert torch.equal(moved[[0, 3]], x[[0, 3]])
    torch.testing.assert_close((moved - x)[1], 0.5 * x[1].norm() * f)
    torch.testing.assert_close(ssl_edit(f, h, 0.5)(x, decode) - x, -0.5 * x.norm(dim=1, keepdim=True) * h)
    save = save_edit(f, h, 0.2)(x, prefill) - x
    assert not save[0].any()  # the first token
    torch.testing.assert_close(save[1:], 0.2 * x[1:].norm(dim=1, keepdim=True) * (f - h))
    torch.testing.assert_close(save_edit(f, h, 0.2, alpha=5.0)(x, prefill)[1] - x[1], 5 * (f - h))
    assert ssl_edit(f, h, 0.0)(x, prefill) is x and save_edit(f, h, 0.0)(x, prefill) is x
    sae = make_sae(host)
    one = unit_direction(sae, torch.tensor([4]))
    torch.testing.assert_close(one, torch.nn.functional.normalize(sae.dictionary("text").rows()[4].detach(), dim=0))
    assert unit_direction(sae, torch.arange(5)).norm().item() == pytest.approx(1)
