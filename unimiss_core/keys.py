"""Keys: two kinds, how they are written, read, named by a fingerprint, and what signs what.

    kind                 whose                       private file              its form
    ecdsa-sha2-nistp384  a site's, and TLS servers'  site.key, server.key ...  OpenSSH's (Flower), PKCS 8 (TLS)
    ssh-ed25519          a coordinator's, to sign    signing.key               OpenSSH's

Flower's node authentication takes NIST curves alone, in OpenSSH's form; TLS libraries read no such private file, hence
the second form of the same key. No private file has a passphrase: who reads it has the key, so that it is made with
mode 0600, in a folder of mode 0700, and never written over.
"""

import base64
import binascii
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHPrivateKeyTypes,
    SSHPublicKeyTypes,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from unimiss_core import durable
from unimiss_core.errors import ConfigError

SITE_KIND = "ecdsa-sha2-nistp384"
SIGNING_KIND = "ssh-ed25519"

LONGEST_FILE = 1 << 16
"""Bytes of a key file or certificate beyond which it is none."""

SiteKey = ec.EllipticCurvePrivateKey
SitePublicKey = ec.EllipticCurvePublicKey
SigningKey = Ed25519PrivateKey
SigningPublicKey = Ed25519PublicKey


def new_site_key() -> SiteKey:
    """On NIST P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def new_signing_key() -> SigningKey:
    return Ed25519PrivateKey.generate()


def public_line(key: SitePublicKey | SigningPublicKey, comment: str = "") -> str:
    """The one line of a .pub file, without its end: kind, base64, comment."""
    return f"{key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {comment}".rstrip()


def fingerprint(key: SitePublicKey | SigningPublicKey) -> str:
    """As `ssh-keygen -l` prints it: of OpenSSH's own binary form, the base64 part of the line."""
    body = base64.b64decode(public_line(key).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(body).digest()).decode().rstrip("=")


def pem_of_public(key: SitePublicKey | SigningPublicKey) -> bytes:
    """SubjectPublicKeyInfo as PEM: as Flower gives a node's key."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def site_public_key(text: str, where: str) -> SitePublicKey:
    """The key of a line in OpenSSH's form. Raises ConfigError, which begins with `where`, a file or a setting."""
    key = _public(text, where, SITE_KIND)
    assert isinstance(key, SitePublicKey)
    return key


def signing_public_key(text: str, where: str) -> SigningPublicKey:
    """As `site_public_key`, of the key that signs manifests."""
    key = _public(text, where, SIGNING_KIND)
    assert isinstance(key, SigningPublicKey)
    return key


def read_signing_public_key(path: Path) -> SigningPublicKey:
    """Of a .pub file. Raises ConfigError."""
    return signing_public_key(read_text(path), str(path))


def read_site_key(path: Path) -> SiteKey:
    """Of a private file in OpenSSH's form or as PEM. Raises ConfigError."""
    key = _private(path, SITE_KIND)
    assert isinstance(key, SiteKey)
    return key


def read_signing_key(path: Path) -> SigningKey:
    """Of a private file in OpenSSH's form. Raises ConfigError."""
    key = _private(path, SIGNING_KIND)
    assert isinstance(key, SigningKey)
    return key


def in_openssh_form(key: SiteKey | SigningKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def in_pem_form(key: SiteKey) -> bytes:
    """PKCS 8, as TLS libraries read it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def sign(key: SigningKey, purpose: str, message: bytes) -> bytes:
    """64 bytes, Ed25519 (RFC 8032).

    purpose: what kind of thing is signed; a signature of one kind is none of another, whatever the bytes are.
    """
    return key.sign(_bound(purpose, message))


def is_signed(key: SigningPublicKey, purpose: str, message: bytes, signature: bytes) -> bool:
    """Whether `sign` made the signature, of the same purpose and message, with the key's private half."""
    try:
        key.verify(signature, _bound(purpose, message))
    except InvalidSignature:
        return False
    return True


def _bound(purpose: str, message: bytes) -> bytes:
    """A purpose holds no zero byte, so that no two pairs give the same bytes."""
    return purpose.encode() + b"\0" + message


def make_private_folder(path: Path) -> None:
    """Mode 0700. Raises FileExistsError."""
    path.mkdir(mode=0o700)


def write_private(path: Path, payload: bytes) -> None:
    """Make a file of mode 0600. Raises FileExistsError: a key is never written over."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(descriptor)
    durable.sync_folder(path.parent)


def read_text(path: Path) -> str:
    """Of a key, a certificate or a paper. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            payload = file.read(LONGEST_FILE + 1)
        text = payload.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not plain text; copy the file itself, do not paste it into another") from None
    if len(payload) > LONGEST_FILE:
        raise ConfigError(f"{path}: is too large for a key or certificate; check the path")
    return text


def _public(text: str, where: str, kind: str) -> SSHPublicKeyTypes:
    """Of this kind. Raises ConfigError."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if found := _other_thing(text, lines):
        raise ConfigError(f"{where}: {found}; expected the one line of a .pub file, which begins with {kind}")
    if (given := lines[0].split()[0]) != kind:
        raise ConfigError(f"{where}: is a key of the kind {_short(given)}; expected {kind}, as our `init` makes it")
    if len(lines) > 1:
        raise ConfigError(
            f"{where}: holds {len(lines)} lines; expected one key on one line, which mail may have broken"
        )
    try:
        return load_ssh_public_key(lines[0].encode())
    except (ValueError, UnsupportedAlgorithm, binascii.Error):
        raise ConfigError(f"{where}: the key is cut off or damaged; have the file sent again") from None


def _other_thing(text: str, lines: list[str]) -> str:
    """What stands there instead of a public key's line; empty where it may be one."""
    if not lines:
        return "is empty"
    if "PRIVATE KEY" in text:
        return "holds a PRIVATE key, which must not leave where it was made: make a new pair instead of this one"
    if lines[0].startswith("-----BEGIN") or lines[0].startswith("---- BEGIN"):
        return "is PEM or a certificate"
    return "" if len(lines[0].split()) >= 2 else "is not a key"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _private(path: Path, kind: str) -> SSHPrivateKeyTypes | PrivateKeyTypes:
    """Of this kind. Raises ConfigError."""
    payload = read_text(path).encode()
    if b"PRIVATE KEY" not in payload:
        raise ConfigError(f"{path}: holds no private key; expected the private half of a pair of the kind {kind}")
    try:
        load = load_ssh_private_key if b"OPENSSH" in payload else load_pem_private_key
        key = load(payload, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it has a passphrase
        raise ConfigError(
            f"{path}: the private key is damaged, or has a passphrase; expected one of the kind {kind} without"
        ) from None
    if not isinstance(key, SiteKey | SigningKey) or public_line(key.public_key()).split()[0] != kind:
        raise ConfigError(f"{path}: is a private key of another kind; expected {kind}")
    return key
