"""Options as dataclasses: flat on the command line, grouped in the help, assembled for the function."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import yaml
from jsonargparse import ArgumentParser

from mmsae.cli import COMMANDS, Command, command_parser
from mmsae.options import OneProcessRun, Run, SAERun, call, flat, groups


@dataclass(frozen=True)
class Taste:
    """How it tastes."""

    sweet: bool
    """Whether there is sugar in it."""
    spices: tuple[str, ...] = ("salt",)
    """What is put in."""


def cook(what: str, taste: Taste, run: SAERun = SAERun(batch_size=8)) -> tuple[str, Taste, SAERun]:
    """Cook.

    Args:
        what: The dish.
    """
    return what, taste, run


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setitem(COMMANDS, "cook", Command(f"{__name__}:cook", "cook", "mmsae cook --what soup"))
    return command_parser("cook")[0]


def test_a_command_is_called_with_flat_keywords():
    assert call(cook, what="soup", sweet=True) == ("soup", Taste(True), SAERun(batch_size=8))
    assert call(cook, what="soup", sweet=True, spices=["a", "b"], device="cpu") == (
        *("soup", Taste(True, ("a", "b"))),
        SAERun(device="cpu", batch_size=8),
    )
    assert call(cook, what="soup", taste=Taste(False), run=SAERun()) == ("soup", Taste(False), SAERun())
    with pytest.raises(TypeError, match="sweet"):
        call(cook, what="soup")
    with pytest.raises(TypeError, match="sour"):
        call(cook, what="soup", sweet=True, sour=True)


def test_a_field_that_is_fixed_is_no_option():
    assert OneProcessRun(batch_size=2).workers == 0 and isinstance(OneProcessRun(), Run)
    with pytest.raises(TypeError):
        OneProcessRun(workers=2)


def test_options_are_flat_in_arguments_and_yaml(parser, tmp_path):
    assert list(groups(cook)) == ["taste", "run"]
    values = parser.parse_args(["--what", "soup", "--sweet", "--spices", "a", "b", "--allow-other-site"]).as_dict()
    values.pop("config"), values.pop("threads")
    said = call(cook, **values)
    assert said == ("soup", Taste(True, ("a", "b")), SAERun(batch_size=8, allow_other_site=True))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"what": "soup", "sweet": False, "batch_size": 3}))
    values = parser.parse_args(["-c", str(tmp_path / "c.yaml"), "--spices", "a"]).as_dict()
    assert (values["batch_size"], values["spices"], values["sweet"]) == (3, ["a"], False)


def test_the_help_has_a_group_for_each_and_an_example(parser):
    said = parser.format_help()
    at = [
        said.index(s) for s in ("  --what", "How it tastes:", "  --sweet", "Where and how", "--batch-size", "example:")
    ]
    assert at == sorted(at) and "--spices SPICES [SPICES ...]" in said and "default: 8" in said
    assert "`cpu`, `cuda` or `auto`." in said and said.startswith(
        "usage: mmsae cook --what WHAT --sweet SWEET [-c FILE]"
    )


@flat
class Kitchen:
    """Where one cooks.

    Args:
        name: Whose it is.
    """

    def __init__(self, name: str, taste: Taste = Taste(sweet=True), run: Run = Run()) -> None:
        self.name, self.taste, self.run = name, taste, run


def test_a_class_takes_its_options_side_by_side():
    assert Kitchen("a").taste == Taste(True) and Kitchen("a", sweet=False).taste == Taste(False)
    assert Kitchen("a", taste=Taste(False, ())).taste == Taste(False, ()) and Kitchen(name="b").name == "b"
    with pytest.raises(TypeError, match="sour"):
        Kitchen("a", sour=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Kitchen, "data")
    given = parser.parse_args([f"--data={__name__}.Kitchen", "--data.name=a", "--data.device=cpu"])
    made = parser.instantiate(given).data
    assert made.run == Run(device="cpu") and made.taste == Taste(True)
    assert given.data.init_args.spices == ("salt",)
    assert "    sweet: Whether there is sugar in it.\n" in Kitchen.__doc__
