"""Intervention score (oracle O6): no push gains nothing, strengths hit the KL, and controls stand beside."""

import numpy as np
import pytest
import torch

from mmsae import SAE, InputError
from mmsae.hosts import load_host
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.scripted import ScriptedClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.scores.intervention import LVLMSteerable, Push, gain, intervention, tuned
from mmsae.interpret.scores.job import ScoreJob
from mmsae.interpret.scores.options import Judging
from mmsae.sae import TopK
from tests.helpers.evidence import write_evidence
from tests.helpers.lvlm import llava, picture
from tests.interpret.scores.test_surprisal import expects

WORDS = ["red", "green", "blue"]


class Toy:
    """Says the word of the latent that it is pushed by, if pushed hard; its KL is the square of the strength."""

    def kl(self, push):
        return push.strength**2

    def say(self, push):
        pushed = push.kind == "latent" and push.strength > 0.1
        return [f"a {WORDS[push.latent]} thing {i}" if pushed else f"a thing {i}" for i in range(4)]


def asked():
    return Asked(ScriptedClient(score=lambda prefix, text: expects(prefix.replace("\n", " "), text)), None)


def test_names_gain_by_the_push_and_controls_do_not():
    found = intervention(Toy(), asked(), [0, 1, 2], WORDS, target=0.5)
    assert found.strength == pytest.approx([0.5**0.5] * 3, rel=0.1) and found.kl == pytest.approx([0.5] * 3, rel=0.11)
    assert (found.name == 2).all() and (found.zero == 0).all() and (found.random == 0).all()
    assert (found.shuffled == 0).all()
    s = found.scores()
    assert (s[""].value == 2).all() and s[""].chance == 0 and (s[""].n == 4).all() and (s["zero"].value == 0).all()
    assert gain(asked(), ["red"], ["a thing"], ["a thing"])[0] == 0
    assert len(intervention(Toy(), asked(), [], []).latents) == 0


def test_a_vision_language_model_is_pushed_to_the_target(tmp_path):
    host = load_host(llava(tmp_path / "llava"))
    torch.manual_seed(0)
    sae = SAE(32, 24, modalities=("image", "text"), selector=TopK(4)).eval()
    sae.sites = host.sites("layers.1:out")
    model = LVLMSteerable(host, sae, [picture(i) for i in range(5)], "what is there ?", tuning=3, max_tokens=3)
    assert model.kl(Push(0, 0.0)) == pytest.approx(0, abs=1e-6)
    clean = model.say(Push(0, 0.0))
    assert len(clean) == 2 and model.say(Push(0, 0.0)) == clean
    rising = [model.kl(Push(0, s)) for s in (1.0, 5.0, 25.0)]
    assert rising[0] < rising[1] < rising[2]
    for kind in ("latent", "random"):
        push, kl = tuned(model, 0, kind, 0.5 * rising[2])
        assert kl == pytest.approx(0.5 * rising[2], rel=0.25) and push.strength > 0 and push.kind == kind
    assert model.kl(Push(0, 0.0, "zero")) >= 0 and np.isfinite(model.kl(Push(0, 0.0, "zero")))


def test_the_job_scores_a_vision_language_model(tmp_path):
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
    where = {"sae": "s" * 32, "host": host.fingerprint, "hint": name}
    ev = Evidence(
        write_evidence(tmp_path / "e", {"image": z}, images=images, captions=captions, grid={"image": (3, 3)}, **where)
    )
    client = ScriptedClient(score=lambda prefix, text: expects(prefix.replace("\n", " "), text))
    job = ScoreJob(ev, None, Judging(scorers=("intervention",), each=3), Asked(client, None), 2, "cpu", sae)
    _, found, _ = job.run()
    kinds = {(r["scorer"], r["control"]): r for r in found["summary"] if r["which"] == "all"}
    assert set(kinds) == {
        ("intervention", ""),
        ("intervention", "shuffled"),
        ("intervention_random", ""),
        ("intervention_zero", ""),
    }
    assert all(r["chance"] == 0 and r["latents"] == 2 and r["outcomes"] == 3 for r in kinds.values())
    assert kinds["intervention_zero", ""]["mean"] == pytest.approx(0, abs=2)
    with pytest.raises(InputError, match="needs the SAE"):
        ScoreJob(ev, None, Judging(scorers=("intervention",)), Asked(client, None))
