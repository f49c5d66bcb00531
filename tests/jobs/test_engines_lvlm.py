"""Jobs of vision-language hosts in parts of a batch queue and on workers of Ray: the bytes of one process."""

import pytest

from mmsae.filtering.command import filter_command
from mmsae.lvlm.decoding.settings import Settings
from mmsae.lvlm.hallucination.chair import chair_command
from mmsae.lvlm.hallucination.pope import pope
from mmsae.lvlm.patches.command import patches
from mmsae.lvlm.weights.command import weights
from mmsae.options import call
from tests.helpers.filtering import tree
from tests.helpers.lvlm_jobs import make_host, make_sae, shard

QUIET = {"device": "cpu", "progress": False, "batch_size": 4}
ASK = {"settings": Settings(max_new_tokens=3, do_sample=False), "object_names": ["colour", "shape"]}
JOBS = {
    "weights": (weights, {"samples": None, "n_side": 2}, 1),
    "patches": (patches, {"scores": ["l0"], "keep": [0.5]}, 1),
    "pope": (pope, {**ASK, "strategies": ["random"], "min_objects": 2, "per_image": 2}, 1),
    "chair": (chair_command, ASK, 1),
    # cross-modal weights, names of latents, scores
    "filter": (filter_command, {"score": "cos_code", "report": False, "workers": 0, "fit_samples": 8}, 3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    make_sae(make_host(root)).save_pretrained(root / "sae")
    (root / "shards").mkdir()
    things = [{"colour": c, "shape": s} for c, s in (("red", "circle"), ("blue", "square"), ("green", "circle"))]
    for i in range(3):
        shard(root / "shards" / f"{i}.tar", 4, start=4 * i, objects=[things[i], things[i - 1]])
    return root


def asked(name, root):
    command, options, rounds = JOBS[name]
    whose = {"host": f"lvlm:{root / 'llava'}"} if name in ("pope", "chair") else {"sae": str(root / "sae")}
    return command, {**whose, "shards": str(root / "shards"), **QUIET, **options}, rounds


@pytest.fixture(scope="module")
def whole(root):
    """What a job gives in one process; made when it is first asked for."""
    made = {}

    def result(name):
        if name not in made:
            command, given, _ = asked(name, root)
            call(command, **given, out=str(root / name))
            made[name] = tree(root / name)
        return made[name]

    return result


@pytest.mark.parametrize("name", list(JOBS))
def test_parts_that_are_merged_are_the_whole(name, root, whole, tmp_path):
    command, given, rounds = asked(name, root)
    for i in range(rounds):
        for part in ("2/2", "1/2"):
            assert call(command, **given, out=str(tmp_path / "parts"), part=part) is None
        made = call(command, **given, out=str(tmp_path / "parts"), merge=True)
        assert (made is None) == (i + 1 < rounds)
    assert tree(tmp_path / "parts") == whole(name)


@pytest.mark.long
@pytest.mark.parametrize("name", list(JOBS))
def test_workers_of_ray_give_the_same(name, root, whole, tmp_path, ray_of_one):
    command, given, _ = asked(name, root)
    call(command, **given, out=str(tmp_path / "ray"), engine="ray")
    assert tree(tmp_path / "ray") == whole(name)
