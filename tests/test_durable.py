"""Files that appear whole, and stay whose they were."""

import os
from pathlib import Path

import pytest

from unimiss_core import durable

AN_OTHER = 65534


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can write for another user")
def test_what_root_replaces_stays_its_owners(tmp_path: Path) -> None:
    """`sudo unimiss-site clear` must not take the daemon's files away from it."""
    kept, new = tmp_path / "audit.head", tmp_path / "new"
    kept.write_text("old")
    kept.chmod(0o640)
    os.chown(kept, AN_OTHER, AN_OTHER)
    before = os.umask(0o077)
    try:
        for path in (kept, new):
            durable.write_text(path, "content")
    finally:
        os.umask(before)
    assert kept.read_text() == "content"
    found = kept.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (AN_OTHER, AN_OTHER, 0o640)
    assert (new.stat().st_uid, new.stat().st_mode & 0o777) == (0, 0o600)


def test_what_stands_in_a_files_place_is_replaced_or_left_with_nothing_beside_it(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    durable.write_text(loop, "content")
    assert (loop.read_text(), loop.is_symlink()) == ("content", False)
    (folder := tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write_text(folder, "content")
    assert sorted(tmp_path.iterdir()) == [folder, loop]


def test_of_a_folder_nothing_stays_where_what_comes_before_its_name_fails(tmp_path: Path) -> None:
    """As a line of metrics on a full disk."""

    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"), durable.new_folder(tmp_path / "round", before=fail) as folder:
        (folder / "weights").write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []
