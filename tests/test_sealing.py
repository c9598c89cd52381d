"""What a site keeps under a key says nothing without it, and nothing of it can be changed or put in another's place."""

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from client.cache import open_library
from client.site_command import main
from client.site_config import load_site
from client.site_state import Remembered, SiteState
from tests.federation import RUN, small_study
from tests.test_private_rounds import Hospital, bytes_of, private_study, quick_accountant, request  # noqa: F401
from unimiss_core import sealing
from unimiss_core.errors import ConfigError
from unimiss_core.sealing import Damaged, Seal, make_key, read_seal
from unimiss_core.study import PlanConfig
from unimiss_core.wire import Hello, Refusal, arrays_in

KEY = bytes(range(32))
STUDY = small_study(rounds=3)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "PART", 100)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 200, 1234])
def test_what_was_sealed_comes_out_as_it_went_in_and_never_looks_the_same(length: int) -> None:
    payload = os.urandom(length)
    first, second = (Seal(KEY).seal(payload, "a") for _ in range(2))
    assert Seal(KEY).open(first, "a") == Seal(KEY).open(second, "a") == payload
    assert first[56:] != second[56:]
    assert length < 16 or payload[:16] not in first


@pytest.mark.usefixtures("small_parts")
def test_the_format_is_what_it_says_to_be() -> None:
    """Opened by hand, from the module's own description."""
    sealed = Seal(KEY).seal(b"x" * 150, "place")
    header, parts = sealed[:56], (sealed[56 : 56 + 116], sealed[56 + 116 :])
    assert header[:16] == b"unimiss sealed 1"
    cipher = AESGCM(hmac.digest(KEY, b"file key" + header + b"place", hashlib.sha256))
    nonces = (b"\0" + bytes(11), b"\1" + bytes(10) + b"\1")
    assert b"".join(cipher.decrypt(n, p, header) for n, p in zip(nonces, parts, strict=True)) == b"x" * 150


@pytest.mark.usefixtures("small_parts")
def test_every_changed_byte_every_cut_and_every_swap_is_found() -> None:
    payload, seal = os.urandom(250), Seal(KEY)
    sealed = seal.seal(payload, "a")
    for place in range(len(sealed)):
        changed = sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]
        with pytest.raises(ConfigError if 16 <= place < 24 else Damaged):  # there it says which key
            seal.open(changed, "a")
    for end in range(len(sealed)):
        with pytest.raises(Damaged):
            seal.open(sealed[:end], "a")
    parts = [sealed[56:172], sealed[172:288], sealed[288:]]
    for order in ((1, 0, 2), (0, 2), (0, 1), (0, 0, 1, 2), (0, 1, 2, 2)):
        with pytest.raises(Damaged):
            seal.open(sealed[:56] + b"".join(parts[n] for n in order), "a")
    with pytest.raises(Damaged):
        seal.open(sealed, "b")
    with pytest.raises(Damaged):
        seal.open(payload, "a")


def test_another_key_is_told_in_words() -> None:
    with pytest.raises(ConfigError, match="sealed with another key than state_key names"):
        Seal(bytes(32)).open(Seal(KEY).seal(b"x", "a"), "a")


# -- key files --------------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-key", str(tmp_path / "key")]) == 0
    assert "keep a copy elsewhere" in capsys.readouterr().out
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / "key").read_bytes()) == 32
    assert main(["make-key", str(tmp_path / "key")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (None, 0o600, "cannot be read"),
        (b"short", 0o600, "is no key: expected 32 bytes"),
        (KEY + b"\n", 0o600, "is no key"),
        (KEY, 0o640, "may be read by others"),
    ],
)
def test_a_key_that_is_none_is_refused(tmp_path: Path, content: bytes | None, mode: int, told: str) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=told):
        read_seal(tmp_path / "key")


# -- at a site --------------------------------------------------------------------------------------------------------


def sealed_hospital(folder: Path, key: str = "key") -> Hospital:
    folder.mkdir(exist_ok=True)
    if not (folder / key).exists():
        make_key(folder / key)
    return Hospital(folder, state_key=key)


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "state").rglob("*") if path.is_file()]


def test_a_sealed_site_answers_as_one_in_clear_and_keeps_nothing_in_clear(tmp_path: Path) -> None:
    clear, sealed = Hospital(tmp_path / "clear"), sealed_hospital(tmp_path / "sealed")
    updates = []
    for hospital in (clear, sealed):
        with hospital.asked() as ask:
            ask(Hello(STUDY, RUN).pack(), "query")
            updates.append([bytes_of(ask(request(STUDY, number), "train")) for number in (1, 2, 3)])
    assert updates[0] == updates[1]
    assert all(updates[0])
    assert not [path for path in files(sealed.folder) if path.suffix in (".npy", ".safetensors")]
    kept = [path for path in files(sealed.folder) if path.suffix == ".sealed"]
    assert len(kept) == 5 + 2  # scans, and the last two rounds
    for path in kept:
        assert sealing.is_sealed(path.read_bytes())
        assert b"learner/" not in path.read_bytes()


def test_without_its_key_or_with_another_a_site_says_so_and_trains_nothing(tmp_path: Path) -> None:
    hospital = sealed_hospital(tmp_path)
    with hospital.asked() as ask:
        ask(request(STUDY, 1), "train")
        key = (tmp_path / "key").read_bytes()
        for replaced in (None, os.urandom(32)):
            (tmp_path / "key").unlink(missing_ok=True)
            if replaced is not None:
                (tmp_path / "key").write_bytes(replaced)
                (tmp_path / "key").chmod(0o600)
            read_seal.cache_clear()
            assert Refusal.found_in(ask(request(STUDY, 2), "train")) == Refusal("site_setup")
        (tmp_path / "key").write_bytes(key)
        read_seal.cache_clear()
        assert arrays_in(ask(request(STUDY, 2), "train"))


def test_a_key_among_what_it_seals_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    hospital = sealed_hospital(tmp_path, "state/key")
    with pytest.raises(ConfigError, match="lies among what it seals"):
        load_site(hospital.folder / "site.yaml").seal()


def state_of(folder: Path, run: str = RUN, seal: Seal | None = None) -> SiteState:
    return SiteState(folder, run=run, study_digest="a" * 64, seal=seal)


def test_no_round_takes_the_place_of_another_nor_of_another_run(tmp_path: Path) -> None:
    seal = Seal(KEY)
    memory, other = state_of(tmp_path, seal=seal), state_of(tmp_path, "f" * 16, seal)
    for number in (1, 2):
        memory.remember(Remembered(number, {"x": torch.full((3,), float(number))}, {"n": number}))
    other.remember(Remembered(2, {"x": torch.zeros(3)}, {}))
    assert memory.before(3).tensors["x"].tolist() == [2.0] * 3  # type: ignore[union-attr]
    first, second = (tmp_path / "runs" / RUN / f"round-000{number}.sealed" for number in (1, 2))
    elsewhere = tmp_path / "runs" / ("f" * 16) / "round-0002.sealed"
    for source in (first, elsewhere):
        whole = second.read_bytes()
        second.write_bytes(source.read_bytes())
        assert memory.before(3).round == 1  # type: ignore[union-attr]
        second.write_bytes(whole)


def test_what_lies_in_clear_counts_for_nothing_under_a_key_and_goes(tmp_path: Path) -> None:
    """Who can write to the folder could put anything there."""
    state_of(tmp_path).remember(Remembered(1, {"x": torch.ones(3)}, {}))
    memory = state_of(tmp_path, seal=Seal(KEY))
    assert memory.before(2) is None
    memory.remember(Remembered(2, {"x": torch.ones(3)}, {}))
    assert [path.name for path in (tmp_path / "runs" / RUN).iterdir()] == ["round-0002.sealed"]


def test_scans_are_the_same_before_under_and_after_a_key(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    make_key(tmp_path / "key")
    file = tmp_path / "site.yaml"
    clear = file.read_text()

    def crops() -> list[np.ndarray]:
        library = open_library(load_site(file), PlanConfig())
        return [scan.crop((slice(3, 30), slice(2, 21))) for scan in library.scans]

    before = crops()
    file.write_text(clear + "state_key: key\n")
    under = crops()
    file.write_text(clear)
    after = crops()
    for first, second, third in zip(before, under, after, strict=True):
        assert np.array_equal(first, second)
        assert np.array_equal(first, third)
    assert hospital.entries == []


def test_a_scan_that_was_changed_is_refused_in_words(tmp_path: Path) -> None:
    hospital = sealed_hospital(tmp_path)
    library = open_library(load_site(hospital.folder / "site.yaml"), PlanConfig())
    first, second = (scan.path for scan in library.scans[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(ConfigError, match="a scan of the cache was changed since it was sealed; delete the cache"):
        library.scans[0].crop((slice(0, 5), slice(0, 5)))


def test_the_replies_that_are_kept_are_sealed_and_sent_again_bit_for_bit(tmp_path: Path) -> None:
    study, hospital = private_study(), sealed_hospital(tmp_path)
    with hospital.asked() as ask:
        first, again = ask(request(study), "train"), ask(request(study), "train")
    assert bytes_of(first) == bytes_of(again) != {}
    assert [entry["kind"] for entry in hospital.entries] == ["reserved", "replied"]
    (kept,) = (tmp_path / "state" / "runs" / RUN).glob("reply-*.bin")
    assert sealing.is_sealed(kept.read_bytes())
    assert bytes_of(first)["update/shared"][:64] not in kept.read_bytes()
