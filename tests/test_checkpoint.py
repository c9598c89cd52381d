"""A checkpoint comes back whole, equal runs give equal bytes, and any change is noticed."""

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.federation import random_tensors, saved_checkpoint, small_study, whole_layout
from unimiss_core import checkpoint
from unimiss_core.errors import CheckpointError

save = partial(saved_checkpoint, server_json='{"taught": {}}')


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "round-0007")
    found = checkpoint.load(tmp_path / "round-0007", to_resume=True)
    student = random_tensors(whole_layout(), 0)
    assert found.manifest.round == 7
    assert found.manifest.model == small_study().model
    assert found.server_json == '{"taught": {}}'
    assert found.student.keys() == student.keys()
    assert all(torch.equal(found.student[name], student[name]) for name in student)


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["student.safetensors", "teacher.safetensors", "server.json"])
def test_one_changed_byte_is_noticed(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    payload = bytearray((tmp_path / "c" / name).read_bytes())
    payload[-1] ^= 1
    (tmp_path / "c" / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match=f"{name} was changed"):
        checkpoint.load(tmp_path / "c", to_resume=True)
    with pytest.raises(CheckpointError, match=f"{name} was changed"):
        checkpoint.verify(tmp_path / "c")


def test_state_of_the_server_is_read_to_resume_and_needed_for_nothing_else(tmp_path: Path) -> None:
    name, tensor = next(iter(random_tensors(whole_layout(), 0).items()))
    saved_checkpoint(tmp_path / "c", server_tensors={f"momentum.{name}": tensor + 1})
    assert torch.equal(checkpoint.load(tmp_path / "c", to_resume=True).server_tensors[f"momentum.{name}"], tensor + 1)
    for own in checkpoint.SERVERS_OWN:
        (tmp_path / "c" / own).unlink()
    assert checkpoint.load(tmp_path / "c").server_tensors == {}
    assert checkpoint.verify(tmp_path / "c")[1] == checkpoint.SERVERS_OWN
    with pytest.raises(CheckpointError, match=r"server\.(safetensors|json) is missing"):
        checkpoint.load(tmp_path / "c", to_resume=True)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_all_its_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """Whoever may read the manifest may read what it tells of."""
    before = os.umask(umask)
    try:
        save(tmp_path / "c", server_tensors={})
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "c").iterdir()} == dict.fromkeys(
        ("manifest.json", "student.safetensors", "teacher.safetensors", "server.json"), 0o666 & ~umask
    )


@pytest.mark.parametrize("name", ["manifest.json", "student.safetensors"])
def test_what_another_user_may_not_read_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path / "c")
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(Permission denied\); have its owner let you"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("odd", ["momentum.nothing.of.that.name", "without_prefix"])
def test_state_of_no_parameter_is_told(tmp_path: Path, odd: str) -> None:
    saved_checkpoint(tmp_path / "c", server_tensors={odd: torch.ones(2)})
    with pytest.raises(CheckpointError, match=f"server holds {odd}, which is the state of no tensor"):
        checkpoint.load(tmp_path / "c", to_resume=True)


def test_missing_file_is_told(tmp_path: Path) -> None:
    save(tmp_path / "c")
    (tmp_path / "c" / "teacher.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors is missing"):
        checkpoint.load(tmp_path / "c")


def test_other_version_no_manifest_and_outside_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json there"):
        checkpoint.load(tmp_path)
    save(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 99, "of_a_later_version": True}))
    with pytest.raises(CheckpointError, match="has format version 99, this program reads 1"):
        checkpoint.load(tmp_path / "c")
    path.write_text(json.dumps(manifest | {"sha256": {"../secret": "00"}}))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize(
    "written", ["[" * 50_000, '{"format_version":' * 50_000, "[1]"], ids=["list", "object", "other"]
)
def test_a_manifest_that_is_none_is_told(tmp_path: Path, written: str) -> None:
    save(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(written)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is not a manifest of this program; take another copy"):
        checkpoint.load(tmp_path / "c")


def test_latest_is_the_highest_finished_round(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for round in (2, 10):
        save(tmp_path / checkpoint.folder_name(round), round)
    (tmp_path / "round-0011.partial").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "round-0010"


def test_name_and_manifest_must_agree(tmp_path: Path) -> None:
    save(tmp_path / "round-0003", round=4)
    with pytest.raises(CheckpointError, match="the name says round 3, the manifest 4"):
        checkpoint.latest(tmp_path)


def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "round-0001", round=1)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "round-0002", round=2)
    assert checkpoint.latest(tmp_path) == tmp_path / "round-0001"
