"""Signatures of checkpoints, from the round that makes one to who is handed it: what was changed on the way is told."""

import base64
import errno
import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from client import research_command
from client.beginning import begin
from client.finetune_config import FromCheckpoint
from server import server_command
from server.artefacts import read_artefacts
from server.coordinator_config import CoordinatorConfig
from server.founding import found
from server.home import Home
from server.local_grid import LocalGrid
from server.model_card import privacy_in_words
from server.rounds import Federation
from server.run_folder import RunFolder
from tests.federation import StubSite, saved_checkpoint, small_study, stub_app
from tests.test_certificates import NOW
from unimiss_core import checkpoint, keys
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.study import StudyConfig

KEY = keys.new_signing_key()
OTHER = keys.new_signing_key()


save = partial(saved_checkpoint, signing_key=KEY)


def put_in_other_weights(folder: Path) -> None:
    """As who can write to the folder would: with digests that fit."""
    path = folder / "teacher.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["teacher.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def public_file(folder: Path, key: keys.SigningKey = KEY) -> Path:
    path = folder / "signing.pub"
    path.write_text(keys.public_line(key.public_key(), "coordinator") + "\n")
    return path


def test_the_signature_is_over_purpose_and_manifest(tmp_path: Path) -> None:
    folder = save(tmp_path / "c")
    signature = base64.b64decode((folder / "manifest.sig").read_text())
    signed = b"unimiss checkpoint manifest 1\0" + (folder / "manifest.json").read_bytes()
    KEY.public_key().verify(signature, signed)  # cryptography's own; raises where it is not


def test_signed_checkpoints_of_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a"), save(tmp_path / "b")
    assert (a / "manifest.sig").read_bytes() == (b / "manifest.sig").read_bytes()


def test_each_reader_takes_what_the_key_signed(tmp_path: Path) -> None:
    folder, key = save(tmp_path / "c"), KEY.public_key()
    assert checkpoint.load(folder, key=key).manifest.round == 7
    assert checkpoint.load(folder, to_resume=True, key=key).server_json == "{}"
    assert checkpoint.read_manifest(folder, key=key).round == 7
    assert checkpoint.verify(folder, key=key)[1] == frozenset()


def test_other_weights_with_digests_that_fit_are_told_by_the_key_alone(tmp_path: Path) -> None:
    folder = save(tmp_path / "c")
    put_in_other_weights(folder)
    checkpoint.load(folder)  # digests alone do not show it
    for read in (checkpoint.load, checkpoint.read_manifest, checkpoint.verify):
        with pytest.raises(CheckpointError, match=r"was changed after it was signed"):
            read(folder, key=KEY.public_key())  # type: ignore[operator]
    (tmp_path / "signing.pub").write_text(keys.public_line(KEY.public_key()))
    with pytest.raises(CheckpointError, match=r"was changed after it was signed"):
        begin(FromCheckpoint(folder=folder, key=tmp_path / "signing.pub"))


@pytest.mark.parametrize("signature", [b"", b"\xff\xfe", b"AAAA", b"not base64!", base64.b64encode(bytes(64))])
def test_a_damaged_signature_is_none(tmp_path: Path, signature: bytes) -> None:
    folder = save(tmp_path / "c")
    (folder / "manifest.sig").write_bytes(signature)
    with pytest.raises(CheckpointError, match="is not of the key SHA256:"):
        checkpoint.load(folder, key=KEY.public_key())


def test_a_signature_of_another_key_checkpoint_or_purpose_is_none(tmp_path: Path) -> None:
    folder, later = save(tmp_path / "c"), save(tmp_path / "d", round=8)
    key, manifest = KEY.public_key(), (folder / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match=re.escape(keys.fingerprint(OTHER.public_key()))):
        checkpoint.load(folder, key=OTHER.public_key())
    shutil.copy(later / "manifest.sig", folder / "manifest.sig")
    with pytest.raises(CheckpointError, match="is not of the key"):
        checkpoint.load(folder, key=key)
    (folder / "manifest.sig").write_bytes(base64.b64encode(keys.sign(KEY, "unimiss welcome 1", manifest)))
    with pytest.raises(CheckpointError, match="is not of the key"):
        checkpoint.load(folder, key=key)


def test_a_key_given_and_no_signature_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", signing_key=None)
    assert not (folder / "manifest.sig").exists()
    with pytest.raises(CheckpointError, match=r"holds no manifest\.sig, and should be signed by SHA256:"):
        checkpoint.load(folder, key=KEY.public_key())


# -- runs -----------------------------------------------------------------------------------------------------------


def signing_file(folder: Path, key: keys.SigningKey = KEY) -> Path:
    path = folder / f"signing-{keys.fingerprint(key.public_key())[7:12].replace('/', '_')}.key"
    if not path.exists():
        keys.write_private(path, keys.in_openssh_form(key))
    return path


def run(out: Path, study: StudyConfig, *, resume: bool = False, **settings: Path | None) -> int:
    config = CoordinatorConfig(study=Path("unused"), out=out, retry_s=0.0, round_tries=1, **settings)
    with LocalGrid(stub_app({"a": StubSite("a", {2: 3})}), {"a": {"name": "a"}}, run_config={}) as grid:
        return Federation(grid, study, config).run(resume=resume).round


def test_a_run_signs_every_round_and_goes_on_from_what_it_signed(tmp_path: Path) -> None:
    signing_key = signing_file(tmp_path)
    run(tmp_path / "out", small_study(), signing_key=signing_key)
    folder = RunFolder(tmp_path / "out")
    for round in range(3):
        checkpoint.load(folder.checkpoint_of(round), key=KEY.public_key())
    shutil.rmtree(folder.checkpoint_of(2))
    assert run(tmp_path / "out", small_study(), resume=True, signing_key=signing_key) == 2
    checkpoint.load(folder.checkpoint_of(2), key=KEY.public_key())


def test_a_run_does_not_go_on_from_what_it_did_not_sign(tmp_path: Path) -> None:
    run(tmp_path / "out", small_study(), signing_key=signing_file(tmp_path))
    newest = RunFolder(tmp_path / "out").checkpoint_of(2)
    put_in_other_weights(newest)
    with pytest.raises(CheckpointError, match="was changed after it was signed"):
        run(tmp_path / "out", small_study(), resume=True, signing_key=signing_file(tmp_path))
    (newest / "manifest.sig").unlink()
    with pytest.raises(CheckpointError, match=r"holds no manifest\.sig"):
        run(tmp_path / "out", small_study(), resume=True, signing_key=signing_file(tmp_path))


def test_a_run_does_not_go_on_from_another_studys_round_that_it_signed(tmp_path: Path) -> None:
    signing_key = signing_file(tmp_path)
    for study, out in {"a": small_study(seed=1), "b": small_study(seed=2)}.items():
        run(tmp_path / study, out, signing_key=signing_key)
    ours, theirs = (RunFolder(tmp_path / study).checkpoint_of(2) for study in "ab")
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(CheckpointError, match="is of another study"):
        run(tmp_path / "a", small_study(seed=1), resume=True, signing_key=signing_key)


def test_a_start_must_be_signed_by_the_key_that_is_named(tmp_path: Path) -> None:
    start, key = save(tmp_path / "start"), public_file(tmp_path)
    assert run(tmp_path / "out", small_study(), start=start, start_key=key) == 2
    put_in_other_weights(start)
    with pytest.raises(CheckpointError, match="was changed after it was signed"):
        run(tmp_path / "again", small_study(), start=start, start_key=key)
    with pytest.raises(ValueError, match="start_key has no meaning without start"):
        run(tmp_path / "none", small_study(), start_key=key)


def test_a_signing_key_that_cannot_be_read_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no private key"):
        run(tmp_path / "out", small_study(), signing_key=public_file(tmp_path))
    assert not (tmp_path / "out").exists()


# -- what people type -----------------------------------------------------------------------------------------------


def test_verify_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, key = save(tmp_path / "c"), public_file(tmp_path)
    assert research_command.main(["verify", str(folder), "--key", str(key)]) == 0
    told = capsys.readouterr().out
    assert f"round 7 of study {small_study().digest()}" in told
    assert f"signed by {keys.fingerprint(KEY.public_key())}" in told
    assert research_command.main(["verify", str(folder)]) == 0
    assert "give --key" in capsys.readouterr().out
    (folder / "server.json").unlink()
    assert research_command.main(["verify", str(folder)]) == 0
    assert re.search(r"server\.json +not here: only resuming needs it", capsys.readouterr().out)
    (folder / "student.safetensors").unlink()
    assert research_command.main(["verify", str(folder)]) == 4
    assert "student.safetensors is missing" in capsys.readouterr().err


def test_verify_tells_an_unsigned_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "c", signing_key=None)
    assert research_command.main(["verify", str(folder)]) == 0
    assert "not signed" in capsys.readouterr().out
    assert research_command.main(["verify", str(folder), "--key", str(public_file(tmp_path))]) == 4


def test_embedding_asks_for_the_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, key = save(tmp_path / "c"), public_file(tmp_path)
    np.save(tmp_path / "scans.npy", np.zeros((1, 1, 64, 64), np.float32))
    words = ["embed", str(folder), str(tmp_path / "scans.npy"), "--out", str(tmp_path / "f.npz"), "--key", str(key)]
    assert research_command.main(words) == 0
    put_in_other_weights(folder)
    assert research_command.main(words) == 4
    assert "was changed after it was signed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's folder with a finished run of the study `toy`."""
    home = found(tmp_path_factory.mktemp("finished") / "coordinator", "a.example.org:443", now=NOW)
    run(home.run("toy"), small_study(), signing_key=home.signing_key)
    return home.path


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Home:
    """A copy of it, to be spoilt."""
    shutil.copytree(finished, tmp_path / "coordinator")
    return Home(tmp_path / "coordinator")


def export(home: Home, out: Path, *words: str, study: str = "toy") -> int:
    return server_command.main(["export", study, "--out", str(out), "--home", str(home.path), *words])


def test_what_is_handed_on_is_verified_by_the_coordinators_key_and_holds_nothing_of_its_own(
    home: Home, tmp_path: Path
) -> None:
    assert export(home, tmp_path / "out") == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"student.safetensors", "teacher.safetensors"}
    assert files == weights | {"manifest.json", "manifest.sig", "study.yaml", "README.md", "trained_by.json"}
    key = home.signing_public_key
    assert research_command.main(["verify", str(tmp_path / "out"), "--key", str(key)]) == 0
    newest = RunFolder(home.run("toy")).checkpoint_of(2)
    for name in weights:
        assert (tmp_path / "out" / name).read_bytes() == (newest / name).read_bytes()
    teacher = begin(FromCheckpoint(folder=tmp_path / "out", key=key)).encoder().state_dict()
    held = checkpoint.load(newest).teacher
    assert all(torch.equal(tensor, held[f"backbone.{name}"]) for name, tensor in teacher.items())


def test_the_card_says_what_it_is_and_names_no_site(home: Home, tmp_path: Path) -> None:
    export(home, tmp_path / "out", "--round", "1")
    card = (tmp_path / "out" / "README.md").read_text()
    public = keys.read_signing_public_key(home.signing_public_key)
    for told in (
        "# toy, round 1",
        "at 1 site by",
        "1 of 2, 2 steps each",
        small_study().digest(),
        keys.fingerprint(public),
        "Nothing is promised.",
        "volume_spacing_mm",
        "All of a scan is then resized to",
    ):
        assert told in card, told
    assert str(home.path) not in card


@pytest.mark.parametrize(
    ("privacy", "told"),
    [
        (
            {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 4.0, "centre_noise": 2.0},
            "epsilon of at most 8 at delta 1e-05 over all rounds of the study, by each site's own ledger",
        ),
        (
            {"mode": "site", "max_epsilon": 900.0, "noise_multiplier": 1.0, "clip_norm": 1.0, "sites": 1},
            "any one site's archive was used: epsilon of at most 900 at delta 1e-05",
        ),
    ],
)
def test_the_card_says_what_is_promised(tmp_path: Path, privacy: dict[str, object], told: str) -> None:
    aggregation = {"weighting": "uniform", "max_size_ratio": None}
    objective = {"centre_momentum": 0.9999}
    study = small_study(privacy=privacy, aggregation=aggregation, objective=objective)
    assert told in privacy_in_words(study, 1, read_artefacts(tmp_path))


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("student.safetensors", 4, "round-0002: student.safetensors cannot be read (Permission denied)"),
        ("study.yaml", 2, "runs/toy/study.yaml: cannot be read (Permission denied); nothing was exported"),
    ],
)
def test_what_may_not_be_read_is_named_and_not_the_folder_to_write(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, code: int, told: str,
) -> None:  # fmt: skip
    copy = shutil.copyfile

    def refused(source: Path, target: Path) -> None:
        if source.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", refused)
    assert export(home, tmp_path / "out") == code
    said = capsys.readouterr().err
    assert told in said
    assert "--out" not in said
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_told_by_its_option(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert export(home, tmp_path / "file" / "out") == 2
    assert f"--out {tmp_path / 'file' / 'out'}: cannot be written (Not a directory)" in capsys.readouterr().err


def test_nothing_is_exported_that_cannot_be_written_down(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.path / "audit.head").write_text("another\n")
    assert export(home, tmp_path / "out") == 8
    assert "audit.head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_handed_on_is_told(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(home, tmp_path / "out", study="other") == 2
    assert "there are: toy" in capsys.readouterr().err
    assert export(home, tmp_path / "out", study="../toy") == 2
    assert export(home, tmp_path / "out", "--round", "9") == 4
    assert "the newest is round 2" in capsys.readouterr().err
    assert export(home, tmp_path / "out", "--round", "0") == 4
    newest = RunFolder(home.run("toy")).checkpoint_of(2)
    put_in_other_weights(newest)
    assert export(home, tmp_path / "out") == 4
    (newest / "manifest.sig").unlink()
    assert export(home, tmp_path / "out") == 4
    assert "holds no manifest.sig" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert export(home, tmp_path / "out", "--round", "1") == 2
    assert "exists and is not empty" in capsys.readouterr().err
