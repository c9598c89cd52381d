"""Keys against OpenSSH's and OpenSSL's own commands, and against the files that people send by mistake."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from unimiss_core import keys
from unimiss_core.errors import ConfigError

needs_ssh_keygen = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="OpenSSH is not installed here")
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="the openssl command is not installed here")


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@needs_ssh_keygen
@pytest.mark.parametrize("new", [keys.new_site_key, keys.new_signing_key])
def test_openssh_reads_both_halves_and_prints_the_same_fingerprint(tmp_path: Path, new: object) -> None:
    key = new()  # type: ignore[operator]
    line = keys.public_line(key.public_key(), "st-elsewhere")
    (tmp_path / "a.pub").write_text(line + "\n")
    keys.write_private(tmp_path / "a", keys.in_openssh_form(key))
    assert said("ssh-keygen", "-l", "-f", tmp_path / "a.pub").split()[1] == keys.fingerprint(key.public_key())
    derived = said("ssh-keygen", "-y", "-f", tmp_path / "a")
    assert derived.split()[:2] == line.split()[:2]


@needs_ssh_keygen
def test_a_pair_that_ssh_keygen_made_is_read(tmp_path: Path) -> None:
    said("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "ops@hospital", "-f", tmp_path / "site")
    public = keys.site_public_key(keys.read_text(tmp_path / "site.pub"), "site.pub")
    assert keys.fingerprint(public) == said("ssh-keygen", "-l", "-f", tmp_path / "site.pub").split()[1]
    assert keys.pem_of_public(keys.read_site_key(tmp_path / "site").public_key()) == keys.pem_of_public(public)


def test_flower_reads_the_private_file_as_it_does_its_own(tmp_path: Path) -> None:
    key = keys.new_site_key()
    keys.write_private(tmp_path / "site.key", keys.in_openssh_form(key))
    read = load_ssh_private_key((tmp_path / "site.key").read_bytes(), None)  # flwr.supernode.cli.flower_supernode
    assert isinstance(read, ec.EllipticCurvePrivateKey)
    assert read.private_numbers() == key.private_numbers()


def test_both_forms_of_a_private_file_hold_one_key(tmp_path: Path) -> None:
    key = keys.new_site_key()
    for name, payload in {"ssh": keys.in_openssh_form(key), "pem": keys.in_pem_form(key)}.items():
        keys.write_private(tmp_path / name, payload)
        assert keys.read_site_key(tmp_path / name).private_numbers() == key.private_numbers()


def test_a_private_file_is_for_its_owner_alone_and_never_written_over(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.make_private_folder(tmp_path / "secrets")
        keys.write_private(tmp_path / "secrets" / "a", b"first")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "secrets" / "a").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        keys.write_private(tmp_path / "secrets" / "a", b"second")
    assert (tmp_path / "secrets" / "a").read_bytes() == b"first"


@pytest.mark.parametrize("odd", ["{line}\r\n", "\ufeff{line}\n", "\n\n  {line}  \n", "{bare}"])
def test_what_editors_and_mail_do_to_a_line_is_borne(tmp_path: Path, odd: str) -> None:
    key = keys.new_site_key().public_key()
    line = keys.public_line(key, "a comment")
    (tmp_path / "site.pub").write_bytes(odd.format(line=line, bare=keys.public_line(key)).encode())
    read = keys.site_public_key(keys.read_text(tmp_path / "site.pub"), "site.pub")
    assert keys.pem_of_public(read) == keys.pem_of_public(key)


def rsa_line() -> str:
    key = rsa.generate_private_key(65537, 2048).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def p256_line() -> str:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


SITE = keys.new_site_key()
LINE = keys.public_line(SITE.public_key(), "alpha")

MISTAKES = {
    "empty": ("", "is empty"),
    "cut off": (LINE[:100], "is cut off or damaged"),
    "one letter changed": (LINE[:60] + ("A" if LINE[60] != "A" else "B") + LINE[61:], "is cut off or damaged"),
    "base64 alone": (LINE.split()[1], "is not a key"),
    "of RSA": (rsa_line(), "kind 'ssh-rsa'; expected ecdsa-sha2-nistp384"),
    "on another curve": (p256_line(), "kind 'ecdsa-sha2-nistp256'"),
    "the signing key": (keys.public_line(keys.new_signing_key().public_key()), "kind 'ssh-ed25519'"),
    "private, OpenSSH": (keys.in_openssh_form(SITE).decode(), "holds a PRIVATE key, which must not leave"),
    "private, PEM": (keys.in_pem_form(SITE).decode(), "holds a PRIVATE key, which must not leave"),
    "public, PEM": (keys.pem_of_public(SITE.public_key()).decode(), "is PEM or a certificate"),
    "two keys": (f"{LINE}\n{LINE}\n", "holds 2 lines"),
    "broken by mail": (LINE[:90] + "\n" + LINE[90:], "holds 2 lines"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_file_than_a_public_key_is_told(mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    with pytest.raises(ConfigError, match=re.escape(expected)) as raised:
        keys.site_public_key(text, "site.pub")
    assert str(raised.value).startswith("site.pub: ")
    secret = keys.in_pem_form(SITE).decode().splitlines()[1]
    assert secret not in str(raised.value)


def test_a_file_of_utf16_as_shells_of_windows_write_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "site.pub").write_text(LINE, encoding="utf-16")
    with pytest.raises(ConfigError, match="is not plain text"):
        keys.read_text(tmp_path / "site.pub")


def test_a_private_file_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    locked = SITE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pw"))
    other = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    whole = keys.in_openssh_form(SITE)
    for payload, expected in (
        (locked, "has a passphrase"),
        (whole[: len(whole) // 2], "is damaged"),
        (other, "of another kind"),
        (keys.in_openssh_form(keys.new_signing_key()), "of another kind"),
        (LINE.encode(), "holds no private key"),
    ):
        (tmp_path / "site.key").write_bytes(payload)
        with pytest.raises(ConfigError, match=expected):
            keys.read_site_key(tmp_path / "site.key")
    with pytest.raises(ConfigError, match="cannot be read"):
        keys.read_site_key(tmp_path / "absent")


def test_a_signature_is_of_one_key_purpose_and_message() -> None:
    key, other = keys.new_signing_key(), keys.new_signing_key()
    signature = keys.sign(key, "manifest", b"message")
    public = key.public_key()
    assert keys.is_signed(public, "manifest", b"message", signature)
    assert not keys.is_signed(other.public_key(), "manifest", b"message", signature)
    assert not keys.is_signed(public, "manifes", b"tmessage", signature)
    assert not keys.is_signed(public, "welcome", b"message", signature)
    assert not keys.is_signed(public, "manifest", b"messages", signature)
    assert not keys.is_signed(public, "manifest", b"message", signature[:-1])
    assert not keys.is_signed(public, "manifest", b"message", b"")


@needs_openssl
def test_openssl_verifies_a_signature(tmp_path: Path) -> None:
    key = keys.new_signing_key()
    (tmp_path / "public.pem").write_bytes(keys.pem_of_public(key.public_key()))
    (tmp_path / "signed").write_bytes(b"manifest\0message")
    (tmp_path / "signature").write_bytes(keys.sign(key, "manifest", b"message"))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "public.pem", "-rawin"]
    assert "Successfully" in said(*command, "-in", tmp_path / "signed", "-sigfile", tmp_path / "signature")
