"""What a site remembers between rounds: which states are kept, and what a damaged file or a full disk costs."""

import errno
import os
from pathlib import Path

import pytest
import torch

from client.site_state import Remembered, SiteState
from unimiss_core.errors import ConfigError

DIGEST = "5" * 64


def state_of(round: int) -> Remembered:
    return Remembered(round, {"a": torch.full((3, 5), float(round))}, {"steps": round})


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/archive/DOE^JANE")

    monkeypatch.setattr(os, "fsync", refuse)


def test_the_last_two_rounds_are_kept_and_nothing_unfinished(tmp_path: Path) -> None:
    memory = SiteState(tmp_path, DIGEST)
    for round in (1, 2, 3):
        memory.remember_unfinished(state_of(round))
        memory.remember(state_of(round))
    assert files(tmp_path) == {"round-0002.safetensors", "round-0003.safetensors"}
    assert memory.unfinished(3) is None
    assert memory.before(1) is memory.before(2) is None
    for asked, found in ((3, 2), (4, 3), (9, 3)):
        state = memory.before(asked)
        assert state is not None
        assert (state.round, state.facts) == (found, {"steps": found})
        assert torch.equal(state.tensors["a"], state_of(found).tensors["a"])


@pytest.mark.parametrize("damaged", [b"", b"\x08", b"not a file of tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_passed_over_for_an_older_one(tmp_path: Path, damaged: bytes) -> None:
    memory = SiteState(tmp_path, DIGEST)
    for round in (1, 2):
        memory.remember(state_of(round))
    (newest,) = tmp_path.rglob("round-0002.safetensors")
    newest.write_bytes(damaged)
    (state, newer) = (memory.before(3), memory.unfinished(2))
    assert state is not None
    assert (state.round, newer) == (1, None)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_with_a_way_out_and_without_a_path(tmp_path: Path) -> None:
    memory = SiteState(tmp_path, DIGEST)
    for write in (memory.remember, memory.remember_unfinished):
        with pytest.raises(ConfigError, match=r"No space left on device; make room, or point 'state' to") as error:
            write(state_of(1))
        assert "DOE" not in str(error.value)
    assert files(tmp_path) == set()  # what was half written would keep the disk full


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    memory = SiteState(tmp_path, DIGEST)
    memory.remember(state_of(1))
    request.getfixturevalue("full_disk")
    with pytest.raises(ConfigError):
        memory.remember(state_of(1))
    state = memory.before(2)
    assert state is not None
    assert state.round == 1
