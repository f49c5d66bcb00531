"""Recipes that include others: what is laid over what, where names are looked up, and what is refused."""

import pytest
import yaml

from mmsae.recipes import command_recipe, laid_over, read_recipe, whole_recipe
from mmsae.types import InputError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a recipe; the working folder is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def recipe(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return recipe


def test_mappings_are_laid_over_each_other_and_all_else_replaces():
    under = {"a": {"x": 1, "y": [1, 2]}, "b": 2, "c": {"z": 3}}
    assert laid_over(under, {"a": {"y": [3]}, "b": None, "c": 4, "d": 5}) == {
        "a": {"x": 1, "y": [3]},
        "b": None,
        "c": 4,
        "d": 5,
    }


def test_arguments_of_another_class_are_not_kept():
    under = {"class_path": "A", "init_args": {"k": 1, "strict": True}}
    assert laid_over(under, {"init_args": {"k": 2}}) == {"class_path": "A", "init_args": {"k": 2, "strict": True}}
    assert laid_over(under, {"class_path": "A", "init_args": {"k": 2}})["init_args"] == {"k": 2, "strict": True}
    assert laid_over(under, {"class_path": "B", "init_args": {"k": 2}}) == {"class_path": "B", "init_args": {"k": 2}}


def test_later_recipes_and_own_lines_win(write):
    write("parts/a.yaml", "x: a\ny: a\nz: a\n")
    write("parts/b.yaml", "include: [a.yaml]\ny: b\n")
    path = write("own.yaml", "include: [parts/b.yaml, configs/run/store.yaml]\nz: own\n")
    found = read_recipe(path)
    assert (found["x"], found["y"], found["z"]) == ("a", "b", "own"), "beside the recipe"
    assert found["trainer"]["max_steps"] == 5000, "else where -c looks"
    assert yaml.safe_load(whole_recipe(path)) == found and "include" not in found


def test_a_recipe_without_include_is_handed_over_as_it_is(write):
    path = write("plain.yaml", "x: 1\n")
    assert whole_recipe(path) == command_recipe(path) == path
    assert whole_recipe(write("broken.yaml", "include: [")).endswith("broken.yaml")


def test_the_job_of_a_recipe_may_be_included(write):
    write("job.yaml", "model: {class_path: some.Job, init_args: {keep: 0.5, score: clip}}\n")
    path = write("mine.yaml", "include: [job.yaml]\nmodel: {init_args: {keep: 0.1}}\n")
    assert yaml.safe_load(command_recipe(path)) == {"keep": 0.1, "score": "clip"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("include: [nowhere.yaml]", "no recipe nowhere.yaml"),
        ("include: nowhere.yaml", "include is 'nowhere.yaml', not a list of recipes"),
        ("include: [own.yaml]", "includes itself: .*own.yaml -> .*own.yaml"),
        ("include: [list.yaml]", "list.yaml, which .*own.yaml includes, is not a mapping"),
        ("include: [broken.yaml]", "broken.yaml, which .*own.yaml includes, is not a mapping"),
    ],
)
def test_what_cannot_be_included_is_named(write, text, said):
    write("list.yaml", "[1, 2]")
    write("broken.yaml", "a: [")
    with pytest.raises(InputError, match=said):
        whole_recipe(write("own.yaml", text))
