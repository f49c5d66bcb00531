"""The world's other conditions: whose captions are wrong is known, and asked with the right rows."""

import pytest
import torch

from mmsae.activations import ActivationStore, extract
from mmsae.bench.multimodal.conditions import DAMAGED, NoisyWorld, PartialWorld, write_noisy
from mmsae.bench.multimodal.data import World
from mmsae.bench.sized import PAIR, Size, fit, sae_recipes
from mmsae.demo.stages import SEEDS
from mmsae.hosts import load_host
from mmsae.options import call
from mmsae.world.generator.captions import full_captions
from mmsae.world.generator.scene import sample_scenes
from mmsae.world.generator.shards import write_world
from mmsae.world.models.command import pretrain_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a CLIP, its pairs of the world, and the noisy world."""
    root = tmp_path_factory.mktemp("conditions")
    write_noisy(root / "noisy", 200)
    for split, n in (("train", 150), ("test", 100)):
        write_world(root / split, n, SEEDS[split], split, progress=False)
    call(pretrain_clip, shards=str(root / "train"), out=str(root / "clip"), steps=2, progress=False)
    for name in ("noisy", "train", "test"):
        extract(f"local-dir:{root / 'clip'}", str(root / name), root / "store" / name, progress=False)
    return root


def trained(data):
    size = Size(data.train["image"].shape[1], 16, 3, PAIR, 20, 64)
    return fit(sae_recipes()["paired_topk"], size, data.train, 5e-3, 0)


def test_a_known_share_of_the_noisy_captions_is_wrong(made):
    noisy = NoisyWorld(made / "store" / "noisy")
    assert abs(noisy.wrong.double().mean() - DAMAGED) < 0.1
    told = ActivationStore(made / "store" / "noisy").captions
    true = full_captions(sample_scenes(200, 21, siblings=False))
    changed = [sum(a != b for a, b in zip(t.split(), s.split(), strict=False)) for t, s in zip(told, true, strict=True)]
    assert all((n > 0) == bool(w) for n, w in zip(changed, noisy.wrong, strict=True))


def test_the_noisy_world_is_asked_about_itself(made):
    noisy = NoisyWorld(made / "store" / "noisy")
    sae = trained(noisy)
    found = noisy.score(sae)
    image, text = noisy.train["image"], noisy.train["text"]
    cosine = torch.cosine_similarity(image.double(), text.double())
    good, bad = cosine[~noisy.wrong], cosine[noisy.wrong]
    by_hand = (good[:, None] > bad).double().mean() + (good[:, None] == bad).double().mean() / 2
    assert found["wrong_host"] == pytest.approx(float(by_hand), abs=1e-6)
    noisy.wrong = ~noisy.wrong
    assert noisy.score(sae)["wrong_weighted"] == pytest.approx(1 - found["wrong_weighted"], abs=1e-9)


def test_partial_captions_differ_in_one_word_where_they_are_asked(made):
    host = load_host(f"local-dir:{made / 'clip'}")
    world = World(made / "store" / "train", made / "store" / "test", host, (150, 100))
    partial = PartialWorld(world, host)
    n = len(partial.image)
    assert 40 < n < 100 and len(partial.clean) == len(partial.wrong) == n  # about .3 do not tell what is changed
    assert (partial.clean != partial.wrong).any(1).all()
    found = partial.score(trained(world))
    assert set(found) == {"wrong_code", "wrong_weighted", "wrong_host", "wrong_centred"}
    partial.clean, partial.wrong = partial.wrong, partial.clean
    swapped = partial.score(trained(world))
    assert all(swapped[k] == pytest.approx(1 - v, abs=1e-6) for k, v in found.items())
