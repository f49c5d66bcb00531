"""Intervention score (oracle O6): no push gains nothing, strengths hit the KL, and controls stand beside."""

import numpy as np
import pytest
import torch

from mmsae import SAE, InputError
from mmsae.cli import main
from mmsae.hosts import load_host
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores.intervention import KINDS, LVLMSteerable, Push, gain, intervention, tuned
from mmsae.interpret.scores.job import ScoreJob
from mmsae.interpret.scores.options import Judging
from mmsae.interpret.scores.proposals import best_of
from mmsae.sae import TopK, random_control
from mmsae.sae.fingerprint import sae_fingerprint
from tests.helpers.evidence import write_evidence
from tests.helpers.lvlm import llava, picture
from tests.interpret.scores.test_surprisal import expects

WORDS = ["red", "green", "blue"]


class Toy:
    """Says the word of the latent that it is pushed by, if pushed hard; its KL is the square of the strength."""

    def kl(self, push):
        return push.strength**2

    def risen(self, push):
        return ["thing", WORDS[push.latent]] if push.kind == "latent" else ["thing"]

    def say(self, push, tuning=False):
        pushed = push.kind == "latent" and push.strength > 0.1
        return [f"a {WORDS[push.latent]} thing {i}" if pushed else f"a thing {i}" for i in range(2 if tuning else 4)]


def likes(prefix, text):
    return expects(prefix.replace("\n", " "), text)


CLIENT = ScriptedClient(score=likes)


def asked(chat=None):
    return Asked(ScriptedClient(chat, score=likes), None)


def test_names_gain_by_the_push_and_controls_do_not():
    found = intervention(Toy(), asked(), [0, 1, 2], WORDS, target=0.5)
    about, t = found.about, found.tables
    assert [a["strength"] for a in about] == pytest.approx([0.5**0.5] * 3, rel=0.1)
    assert [a[k] for a in about for k in ("kl", "random_kl")] == pytest.approx([0.5] * 6, rel=0.11)
    assert (t["", ""] == 2).all() and (t["zero", ""] == 0).all() and (t["random", ""] == 0).all()
    assert (t["", "shuffled"] == 0).all()
    s = found.scores()
    assert (s["", ""].value == 2).all() and s["", ""].chance == 0 and (s["", ""].n == 4).all()
    assert set(s) == set(KINDS) and (s["zero", ""].value == 0).all()
    assert not found.missed() and gain(asked(), ["red"], ["a thing"], ["a thing"])[0] == 0
    assert len(intervention(Toy(), asked(), [], []).latents) == 0


def test_explanations_come_from_what_the_push_changes_whatever_the_latents_are_called():
    """The word that rises is found though names are wrong; "thing" rises, too, but is said without the push as well."""
    found = intervention(Toy(), asked(), [0, 1, 2], ["dog", "cat", "car"])
    assert [a["found"] for a in found.about] == WORDS and [a["risen"] for a in found.about] == [
        ["thing", w] for w in WORDS
    ]
    assert (found.tables["", ""] == 0).all() and (found.tables["found", ""] == 2).all()
    assert (found.tables["found", "shuffled"] == 0).all() and (found.tables["found_random", ""] == 0).all()
    assert [a["random_found"] for a in found.about] == ["thing"] * 3


def test_a_model_that_is_asked_proposes_and_its_best_is_taken_by_the_tuning_prompts():
    seen = []

    def chat(messages):
        seen.append(messages[-1].text)
        answers = {"red": '["cold", "a red red thing"]', "green": "I see nothing", "blue": "[]"}
        return next((said for word, said in answers.items() if f", {word}." in seen[-1]), '["thing"]')

    judge = asked(chat)
    found = intervention(Toy(), judge, [0, 1, 2], WORDS)
    assert "the most first: thing, red." in seen[0] and "1. before: a thing 0\n   after: a red thing 0" in seen[0]
    assert [a["found"] for a in found.about] == ["a red red thing", "green", "blue"]
    assert judge.counts["nonsense"] == judge.counts["abstained"] == 1
    assert (found.tables["found", ""][0] == 4).all() and (found.tables["found_random", ""] == 0).all()


def test_a_host_that_cannot_be_pushed_so_far_is_said():
    class Stiff(Toy):
        def kl(self, push):
            return 0.02 if push.latent == 1 else super().kl(push)

    found = intervention(Stiff(), asked(), [0, 1, 2], WORDS)
    assert found.missed().startswith("1 of 3 latents do not move the host to a KL of 0.5 but to 0.02 in")


def test_a_push_that_suggests_nothing_is_missing_and_not_a_score():
    class Mute(Toy):
        def risen(self, push):
            return [] if push.latent == 1 else super().risen(push)

    found = intervention(Mute(), asked(), [0, 1, 2], WORDS)
    scores = found.scores()["found", ""]
    assert np.isnan(scores.value[1]) and scores.n.tolist() == [4, 0, 4] and found.about[1]["found"] == ""
    assert best_of(["a", "b", "c"], np.array([[1.0, np.nan], [2, 2], [2, 2]])) == "b"
    assert best_of(["a"], np.full((1, 2), np.nan)) is None and best_of([], np.zeros((0, 2))) is None


def next_words(model, host, push):
    """``{word: its probability of being next}``, the mean over the words of what is said of tuning images."""
    with model._attached(push):
        p = model._logs().exp().mean(0)
    vocabulary = host.processor.tokenizer.get_vocab()
    special = host.processor.tokenizer.all_special_tokens
    return {w: float(p[i]) for w, i in vocabulary.items() if w not in special and w.isalpha()}


def test_a_vision_language_model_is_pushed_to_the_target(tmp_path):
    host = load_host(llava(tmp_path / "llava"))
    torch.manual_seed(0)
    sae = SAE(32, 24, modalities=("image", "text"), selector=TopK(4)).eval()
    sae.sites = host.sites("layers.1:out")
    model = LVLMSteerable(host, sae, [picture(i) for i in range(5)], "what is there ?", tuning=3, max_tokens=3)
    assert model.kl(Push(0, 0.0)) == pytest.approx(0, abs=1e-6)
    said = model.say(Push(0, 0.0), tuning=True)
    ids = [host.processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in said]
    naive = []  # word by word, from what stands before it
    for i, words in enumerate(ids):
        batch = host.collate.batch(["what is there ?"], [picture(i)])
        for k in range(len(words)):
            inputs = batch.inputs | {n: torch.cat([batch.inputs[n], torch.tensor([v[:k]])], 1).long()
                                     for n, v in (("input_ids", words), ("attention_mask", [1] * k))}  # fmt: skip
            naive.append(torch.log_softmax(host.model(**{n: inputs[n] for n in ("input_ids", "attention_mask",
                                                         "pixel_values")}).logits[0, -1], -1))  # fmt: skip
    assert torch.allclose(model.clean, torch.stack(naive), atol=1e-4) and len(naive) > 3
    clean = model.say(Push(0, 0.0))
    assert len(clean) == 2 and model.say(Push(0, 0.0)) == clean
    rising = [model.kl(Push(0, s)) for s in (1.0, 5.0, 25.0)]
    assert rising[0] < rising[1] < rising[2]
    for kind in ("latent", "random"):
        push, kl = tuned(model, 0, kind, 0.5 * rising[2])
        assert kl == pytest.approx(0.5 * rising[2], rel=0.25) and push.strength > 0 and push.kind == kind
        words = model.risen(push)
        assert 0 < len(words) <= 5 and len(set(words)) == len(words) and len(model.say(push, tuning=True)) == 3
    before, after = (next_words(model, host, Push(0, s)) for s in (0.0, 25.0))
    rise = {w: after[w] - before[w] for w in after}
    assert model.risen(Push(0, 25.0)) == sorted((w for w in rise if rise[w] > 0), key=lambda w: -rise[w])[:5]
    assert model.risen(Push(0, 0.0)) == []
    assert model.kl(Push(0, 0.0, "zero")) >= 0 and np.isfinite(model.kl(Push(0, 0.0, "zero")))


@pytest.fixture
def lvlm(tmp_path):
    """``(evidence, evidence of random weights, SAE, its random control)`` on a tiny vision-language model."""
    name = llava(tmp_path / "llava")
    host = load_host(name)
    torch.manual_seed(0)
    sae = SAE(32, 24, modalities=("image", "text"), selector=TopK(4)).eval()
    sae.sites = host.sites("layers.1:out")
    rng = np.random.default_rng(0)
    z, red = np.zeros((120, 9, 24), np.float32), rng.random(120) < 0.4
    z[red, 2, 0], z[::2, 3, 1] = 5, 5
    images = rng.integers(0, 255, (120, 24, 24, 3), dtype=np.uint8)
    captions = ["a red circle" if r else "a blue square" for r in red]
    fresh, where = random_control(sae, 1), {"host": host.fingerprint, "hint": name}
    out = []
    for folder, model in (("e", sae), ("random", fresh)):
        given = {"images": images, "captions": captions, "grid": {"image": (3, 3)}}
        out.append(write_evidence(tmp_path / folder, {"image": z}, **given, **where, sae=sae_fingerprint(model)))
    return *map(Evidence, out), sae, fresh


def test_the_job_scores_a_vision_language_model_and_random_weights(lvlm):
    ev, other, sae, fresh = lvlm
    judging = Judging(scorers=("intervention",), each=3)

    def run(*saes):
        job = ScoreJob(ev, other, judging, asked(), 1, "cpu", *saes)
        rows, found, _ = job.run()
        return rows, found, {(r["scorer"], r["control"]): r for r in found["summary"] if r["which"] == "all"}

    first, found, kinds = run(sae)
    names = [("intervention" + (f"_{k}" if k else ""), control) for k, control in KINDS]
    assert set(kinds) == set(names)
    assert all(r["chance"] == 0 and r["outcomes"] == 3 for r in kinds.values())
    assert all(r["latents"] + r["missing"] == 1 for r in kinds.values())
    assert kinds["intervention_zero", ""]["mean"] == pytest.approx(0, abs=2)
    assert found["left_out"] == {"intervention of random weights": "no --control-sae"}
    assert len(found["pushes"]) == 1 and {"kl", "random_kl", "strength", "found", "risen"} < set(found["pushes"][0])
    rows, found, kinds = run(sae, fresh)
    assert set(kinds) == set(names) | {(n, "random") for n, control in names if not control}
    assert [p["control"] for p in found["pushes"]] == ["", "random"] and not found["left_out"]
    same = rows.rows(rows.control != "random")
    assert (same.latent == first.latent).all() and np.array_equal(same.value, first.value, equal_nan=True)
    with pytest.raises(InputError, match="needs the SAE"):
        ScoreJob(ev, None, judging, Asked(ScriptedClient(score=likes), None))
    with pytest.raises(InputError, match="client script gives no log-probabilities of a text"):
        ScoreJob(ev, None, judging, Asked(ScriptedClient(lambda m: "?"), None), 2, "cpu", sae).run()


def test_the_command_takes_the_sae_of_the_control(lvlm, tmp_path, capsys):
    ev, other, sae, fresh = lvlm
    for name, model in (("sae", sae), ("fresh", fresh)):
        model.save_pretrained(tmp_path / name)
    args = ["score", str(ev.folder), "--sae", str(tmp_path / "sae"), "--client", f"script:{__name__}:CLIENT",
            "--scorers", "[intervention]", "--each", "2", "--asked", "1", "--device", "cpu"]  # fmt: skip
    main([*args, "--control", str(other.folder), "--control-sae", str(tmp_path / "fresh")])
    said = capsys.readouterr().out
    assert "intervention_found, images, random weights" in said and "intervention_found_random, images, names" in said
    for more, words in (
        (["--control-sae", str(tmp_path / "fresh")], "control_sae is given without its evidence"),
        (["--control", str(other.folder), "--control-sae", str(tmp_path / "sae")], "is evidence of sae"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*args, *more])
        assert e.value.code == 2 and words in capsys.readouterr().err
