"""Files that say nothing without a key, and are refused where they were changed, cut or put in another's place.

AES-256-GCM by the library `cryptography`, under a key of its own for each file: HMAC-SHA-256, under the site's key, of
a random salt and the file's name. So no nonce is ever used twice, and a file is whole under its own name alone. Long
files are sealed in parts, of which each knows its number and the last that it is the last (the STREAM construction,
Hoang et al. 2015, https://eprint.iacr.org/2015/189).

    magic (16 bytes) | which key (8) | salt (32) | parts: ciphertext of PART bytes, the last of fewer, and 16 more each
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from unimiss_core.errors import ConfigError

KEY_BYTES = 32
PART = 2**20
"""Bytes of a part: the library takes less than 2^31 at once, and what fits a core's cache is quicker."""

_MAGIC = b"unimiss sealed 1"
_TAG_BYTES, _WHICH_BYTES, _SALT_BYTES = 16, 8, 32
_HEADER = len(_MAGIC) + _WHICH_BYTES + _SALT_BYTES


class Damaged(ValueError):  # noqa: N818 - what a file is
    """It is no sealed file, was changed or cut, or is another file than its name says."""


class Seal:
    """What a key does to files."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes")
        self._key = key
        self._which = hmac.new(key, b"which key", hashlib.sha256).digest()[:_WHICH_BYTES]

    def seal(self, payload: bytes | memoryview, name: str) -> bytes:
        """name: the file's role and place, under which alone it can be opened."""
        header = _MAGIC + self._which + secrets.token_bytes(_SALT_BYTES)
        cipher, held = self._cipher(header, name), memoryview(payload).cast("B")
        parts = [held[start : start + PART] for start in range(0, len(held), PART)] or [held]
        sealed = [cipher.encrypt(_nonce(n, n == len(parts) - 1), part, header) for n, part in enumerate(parts)]
        return b"".join([header, *sealed])

    def open(self, content: bytes, name: str) -> bytes:
        """The payload that was sealed as `name`. Raises Damaged; ConfigError: it was sealed with another key."""
        header = content[:_HEADER]
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise Damaged("not a sealed file")
        if header[len(_MAGIC) : len(_MAGIC) + _WHICH_BYTES] != self._which:
            raise ConfigError(
                "what this site keeps was sealed with another key than state_key names: give that key; or, where it is "
                "lost, delete the folders 'runs' and 'cache', and the site begins anew"
            )
        cipher, parts = self._cipher(header, name), list(_sealed_parts(content))
        try:
            opened = [cipher.decrypt(_nonce(n, n == len(parts) - 1), part, header) for n, part in enumerate(parts)]
        except InvalidTag:
            raise Damaged("changed, cut, or another file's") from None
        return b"".join(opened)

    def _cipher(self, header: bytes, name: str) -> AESGCM:
        return AESGCM(hmac.new(self._key, b"file key" + header + name.encode(), hashlib.sha256).digest())


def is_sealed(beginning: bytes) -> bool:
    return beginning.startswith(_MAGIC)


@lru_cache(maxsize=8)
def read_seal(path: Path) -> Seal:
    """The seal of the key at `path`. Raises ConfigError: it is not there, is no key, or others may read it."""
    try:
        with path.open("rb") as file:
            mode, key = os.fstat(file.fileno()).st_mode, file.read(KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"state_key: {path} cannot be read ({error.strerror}); put the key back, without which nothing that was "
            "sealed can be opened, or make one with `unimiss-site make-key`"
        ) from None
    if len(key) != KEY_BYTES:
        raise ConfigError(f"state_key: {path} is no key: expected {KEY_BYTES} bytes, as `unimiss-site make-key` writes")
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"state_key: {path} may be read by others than its owner; chmod 600 it")
    return Seal(key)


def make_key(path: Path) -> None:
    """A new key at `path`, for its owner alone. Raises ConfigError: there is a file, or it cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(
            f"{path}: is there already, and what was sealed with it could never be opened again; give another name"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _nonce(number: int, is_last: bool) -> bytes:
    return bytes([is_last]) + number.to_bytes(11, "big")


def _sealed_parts(content: bytes) -> Iterator[memoryview]:
    held = memoryview(content)[_HEADER:]
    for start in range(0, max(1, len(held)), PART + _TAG_BYTES):
        yield held[start : start + PART + _TAG_BYTES]
