"""Names by putting a latent into a vision-language model: a tiny random one, and what is made of answers."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmsae import SAE, InputError
from mmsae.hosts import load_host
from mmsae.interpret.clients.asked import Asked
from mmsae.interpret.clients.local import LocalClient
from mmsae.interpret.evidence.folder import Evidence
from mmsae.interpret.names.job import Naming
from mmsae.interpret.names.options import Holding, Looking
from mmsae.interpret.names.spoken import spoken_candidates
from mmsae.interpret.names.steering import GREY, brief, mosaic, steered_answers
from mmsae.sae import TopK
from mmsae.sae.fingerprint import sae_fingerprint
from mmsae.steering.edits.attach import active_sites
from tests.helpers.evidence import write_evidence
from tests.helpers.lvlm import llava, picture

pytestmark = pytest.mark.filterwarnings("ignore:.*dx")  # random SAEs push far


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("This image shows a red circle.", "red circle"), ("I see a dog, and a cat", "dog"),
        ("The images are of cats", "cats"), ("There are the stripes", "stripes"), ("Red", "red"), ("", ""), ("...", ""),
        ("one two three four five six seven", "one two three four five six"),
    ],
)  # fmt: skip
def test_answers_as_names(answer, want):
    assert brief(answer) == want


def test_a_mosaic_has_up_to_nine_images():
    assert np.asarray(mosaic([])).reshape(-1, 3).min(0).tolist() == list(GREY)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (np.asarray(mosaic([red] * 9, 30))[..., 0] == 255).all()
    assert (np.asarray(mosaic([red], 30)) == [255, 0, 0]).all()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    name = llava(tmp_path_factory.mktemp("llava"))
    host = load_host(name)
    torch.manual_seed(0)
    sae = SAE(32, 24, modalities=("image", "text"), selector=TopK(4)).eval()
    sae.sites = host.sites("layers.1:out")
    return name, host, sae


def test_a_latent_changes_what_the_model_says_and_leaves_nothing_behind(made):
    _, host, sae = made
    before = host.answer(host.collate.batch(["what"], [picture(0)]), max_new_tokens=4)
    found = steered_answers(
        host, sae, [0, 1, 2], [30.0, 30.0, 0.0], lambda j: [picture(j)], times=(4.0, 40.0), max_tokens=4
    )
    assert set(found) == {0, 1, 2} and found[0] != found[2]
    assert host.answer(host.collate.batch(["what"], [picture(0)]), max_new_tokens=4) == before and not active_sites(
        host
    )
    blank = steered_answers(host, sae, [2], [0.0], lambda j: [], max_tokens=4)
    assert blank[2] == [] or len(blank[2]) == 1  # without a change the blank image's own answer is no name


def test_the_method_needs_the_saes_own_host(made, tmp_path):
    name, host, sae = made
    z = np.zeros((60, 9, 24), np.float32)
    z[::2, 3, 0], z[::3, 2, 1] = 20, 20
    images = np.random.default_rng(0).integers(0, 255, (60, 24, 24, 3), dtype=np.uint8)
    where = {"sae": sae_fingerprint(sae), "host": host.fingerprint, "hint": name}
    place = write_evidence(
        tmp_path / "e", {"image": z}, images=images, captions=["yes no"] * 60, grid={"image": (3, 3)}, **where
    )
    looking = Looking(methods=("steering",))
    naming = Naming(Evidence(place), looking, Holding(), sae, cache=False)
    asked = Asked(LocalClient.around(host, 4), None)
    found = spoken_candidates(naming, asked, 0)
    said = naming.run(asked=found)
    kept = Asked(LocalClient.around(host, 4), tmp_path / "answers")
    own = Naming(
        Evidence(place), Looking(methods=("steering",), question="what is there ?"), Holding(), sae, cache=False
    )
    first = spoken_candidates(own, kept, 0)
    assert kept.counts["new"] == 2 and first[0].phrase.tolist() != found[0].phrase.tolist()
    again = Asked(LocalClient.around(host, 4), tmp_path / "answers")
    second = spoken_candidates(own, again, 0)  # a killed run goes on where it was
    assert again.counts["new"] == 0 and again.counts["cached"] == 2
    assert second[0].phrase.tolist() == first[0].phrase.tolist()
    assert naming.speakers == {"steering": name} and all(n.name is None for n in said.names.values())
    with pytest.raises(InputError, match="needs the SAE"):
        spoken_candidates(Naming(Evidence(place), looking, Holding(), cache=False), asked, 0)
    other = write_evidence(tmp_path / "o", {"image": z}, images=images, captions=["yes no"] * 60, host="0" * 32)
    with pytest.raises(InputError, match="is another model"):
        spoken_candidates(Naming(Evidence(other), looking, Holding(), sae, cache=False), asked, 0)
