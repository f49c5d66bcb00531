"""Every recipe of ``mmsae steer`` is understood by the command, and says one way to steer at most."""

from pathlib import Path

import pytest

from mmsae.cli import command_parser
from mmsae.options import take
from mmsae.steering.options import Edits
from mmsae.steering.recipe import method_of

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "steer").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_understood(path):
    parser, _ = command_parser("steer")
    more = ["--sae", "sae"] + ([] if "prompts:\n" in path.read_text() else ["--prompts", "a", "b"])
    got = parser.parse_args(["-c", str(path), *more])
    assert got.host.startswith("diffusers:") and 0 not in got.strengths and len(got.seeds) >= 3
    if got.words:
        assert method_of(take(Edits, got.as_dict())) == "words"


def test_there_are_recipes():
    assert len(RECIPES) >= 4
