"""Files that are whole or not there, and what is said where the disk is full."""

import errno
import os

import pytest
from safetensors import SafetensorError

from mmsae import InputError
from mmsae.files import atomic_folder, check_writable, disk_errors


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
