"""Files are written whole or not at all."""

import os
from pathlib import Path

import pytest

from tinydpo.files import write_atomic


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    other = tmp_path / ".file.half"  # of another process
    other.write_text("")

    def replace(source: Path, target: Path) -> None:
        assert source != other, "two processes write one temporary file"
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted([path, other]), "half a file stays on a full disk"
