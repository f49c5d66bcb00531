"""Files that are whole or not there, and what is said where the disk is full."""

import errno
import os

import pytest
from safetensors import SafetensorError

from mmsae import InputError
from mmsae.activations.generated import read_prompts as prompts_of_generation
from mmsae.evaluation.labels import read_classes, read_lines, read_templates
from mmsae.evaluation.ontology.tree import Tree
from mmsae.evaluation.suite import load_suite
from mmsae.files import atomic_folder, check_writable, disk_errors, lines_of, read_text
from mmsae.lvlm.hallucination.questions import load_questions
from mmsae.metrics.concepts.names import read_names
from mmsae.metrics.host.chair import Objects
from mmsae.recipes import find_recipe
from mmsae.steering.recipe import read_anchors, read_prompts


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos: No space left on device"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_full_disk_is_one_sentence_whoever_reports_it(tmp_path, error):
    target = tmp_path / "a" / "b"
    with pytest.raises(InputError, match=rf"{target}: no space left to write to .*B are free") as said:
        with disk_errors(target):
            raise ValueError("while writing") from error
    assert "needed" not in str(said.value)
    with pytest.raises(InputError, match=r"about 1\.5 kB more are needed and"), disk_errors(target, 1500):
        raise error


def test_other_errors_pass(tmp_path):
    for error in (PermissionError(errno.EACCES, "denied"), InputError("No space left in this sentence"), KeyError("x")):
        with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
            raise error
        assert raised.value is error


def test_a_folder_that_fails_leaves_the_old_one_and_no_trace(tmp_path):
    with atomic_folder(tmp_path / "x") as temp:
        (temp / "deep").mkdir()
        (temp / "deep" / "file").write_text("old")
        (temp / "deep" / "file").chmod(0o600)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "x") as temp:
        (temp / "file").write_text("new")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    file = tmp_path / "x" / "deep" / "file"
    assert file.read_text() == "old" and file.stat().st_mode & 0o777 == (tmp_path / "x").stat().st_mode & 0o666


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / "file" / "below" / "out")
    check_writable(tmp_path / "new" / "out")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["new"] and not any((tmp_path / "new").iterdir())


TEXT = "caf\u00e9 {}\r\na red\u2028circle\u0085{}\r\n"
LINES = ["caf\u00e9 {}", "a red\u2028circle\u0085{}"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_as_other_programs_write_it(tmp_path, encoding):
    file = tmp_path / "x.txt"
    file.write_bytes(TEXT.encode(encoding))
    assert lines_of(read_text(file)) == LINES
    for read in (read_templates, read_lines, read_prompts, prompts_of_generation):
        assert read(str(file)) == LINES
    assert read_classes(str(file)).names == LINES
    assert lines_of("a\n\nb") == ["a", "", "b"] and lines_of("") == []


def readers():
    """Everything that reads text which a person wrote."""
    return [read_templates, read_lines, read_prompts, prompts_of_generation, read_classes, read_anchors, read_names,
            load_questions, Objects.read, Tree.load, load_suite, find_recipe]  # fmt: skip


@pytest.mark.parametrize("read", readers(), ids=lambda f: f"{f.__module__}.{f.__qualname__}")
def test_text_in_another_encoding_is_refused_by_name(tmp_path, read):
    file = tmp_path / "x.txt"
    file.write_bytes("caf\u00e9 {}\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"x\.txt cannot be read: byte 3 is not UTF-8 text; save it as UTF-8") as said:
        read(str(file))
    assert "\n" not in str(said.value)
    file.unlink()
    with pytest.raises(InputError, match=r"x\.txt"):
        read(str(file))


def test_utf_16_without_a_mark_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes("red\n".encode("utf-16-le"))
    with pytest.raises(InputError, match="zero bytes"):
        read_text(tmp_path / "x.txt")
