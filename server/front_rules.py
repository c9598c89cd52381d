"""What may pass from a site to Flower's SuperLink: ten requests of its Fleet API, in one form each.

SuperLink has no login on its Control API, which shares the Fleet API's port: whoever reaches it can run code on this
machine and, through it, at sites that check nothing. So the front lets through what is listed here and nothing like it:
paths are compared byte for byte, never decoded or tidied, and what goes on is built from this list, not copied.
"""

import binascii
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from server.server_config import FrontLimits

MEDIA_TYPE = b"application/protobuf"
HEAD_BYTES = 1 << 14
"""Of a request's headers; Flower's take about 1 kB."""
KEY_HEADER = b"flwr-public-key"
TIME_HEADER = b"flwr-timestamp"

MESSAGES = frozenset(
    b"/v1/fleet/" + name
    for name in (
        b"activate-node",
        b"deactivate-node",
        b"send-node-heartbeat",
        b"pull-messages",
        b"push-messages",
        b"get-run",
        b"get-fab",
        b"pull-object",
        b"confirm-message-received",
    )
)
OBJECTS = frozenset({b"/v1/fleet/push-object"})
"""Requests that hold a piece of an update."""

HEADERS = frozenset(
    {
        b"content-type",
        b"accept",
        KEY_HEADER,
        TIME_HEADER,
        b"flwr-signature",
        b"flwr-package-name",
        b"flwr-package-version",
        b"flwr-component-name",
    }
)
"""All that SuperLink is told of a request's headers, besides its length."""

ANSWER_HEADERS = frozenset({b"content-type", b"content-length", b"flwr-version-incompatibility-message"})

Reason = Literal[
    "no_certificate",  # none was shown
    "stranger",  # a certificate that our authority did not sign, or that has expired
    "not_tls",  # something else was spoken, or the connection was dropped: a scan of ports, mostly
    "not_approved",  # a certificate of ours whose key is no approved site's: it was revoked, or never was
    "wrong_key",  # the request names another key than the certificate
    "path",
    "method",
    "malformed",  # no HTTP/1.1, or headers that can be read in two ways
    "length",  # none told, or one above the limit; an answer of too many objects
    "forged",  # an answer that is not the site's own, or answers nothing; a part that is not the one announced
    "not_given",  # an object, or the receipt of a message, that was not for this site
    "not_taken",  # SuperLink did not: the node's number is another's, or the signature is wrong
    "slow",
    "busy",  # more connections or requests than are allowed at once
]

STATUS: Mapping[Reason, int] = {
    "not_approved": 401,
    "wrong_key": 401,
    "path": 403,
    "forged": 403,
    "not_given": 403,
    "method": 405,
    "malformed": 400,
    "length": 413,
    "slow": 408,
    "busy": 503,
}
"""HTTP's word for each. A SuperNode ends at 401 and goes on trying at 503. Of the others, those with a certificate get
SuperLink's own word, and the rest are cut off before HTTP."""

NOT_TAKEN = frozenset({400, 401, 404, 405, 422})
"""SuperLink's words for what no SuperNode sends. 403 is a run that is over, 412 a node that is held for live still."""
FAILED = 500
"""SuperLink's word where it failed, as on a full disk, or a database that is locked for more than 5 s. A SuperNode ends
at it and goes on trying at 503, which it is told in its place."""


class Refused(Exception):  # noqa: N818 - what became of a request, not a fault of ours
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Registry(Protocol):
    """Who is approved, as it stands on the disk now."""

    def holder_of(self, key: bytes) -> str | None:
        """The approved site of a public key (PEM, SubjectPublicKeyInfo)."""


@dataclass(frozen=True)
class Passage:
    """A request that may go on. path, headers: as they go on. length: bytes of its body, known beforehand."""

    path: str
    headers: Sequence[tuple[bytes, bytes]]
    length: int


def site_of(key: bytes, registry: Registry) -> str:
    """The name of the approved site whose certificate has this public key. Raises Refused."""
    if (name := registry.holder_of(key)) is None:
        raise Refused("not_approved")
    return name


def passage(
    method: bytes,
    target: bytes,
    version: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    key: bytes,
    most: FrontLimits,
) -> Passage:
    """What goes on of a request that came with the certificate of `key`. Raises Refused.

    target: as it stood in the request line. headers: names in lower case.
    """
    if version != b"1.1" or sum(len(name) + len(value) for name, value in headers) > HEAD_BYTES:
        raise Refused("malformed")
    if target not in MESSAGES | OBJECTS:
        raise Refused("path")
    if method != b"POST":
        raise Refused("method")
    told = _each_once(headers)
    if told.get(b"content-type") != MEDIA_TYPE or told.keys() & {b"transfer-encoding", b"upgrade", b"expect", b"te"}:
        raise Refused("malformed")
    limit = most.object_mb if target in OBJECTS else most.message_mb
    if (length := _length(told.get(b"content-length"))) > limit * 1e6:
        raise Refused("length")
    if _decoded(told.get(KEY_HEADER, b"")) != key:
        raise Refused("wrong_key")
    on = [(name, value) for name, value in told.items() if name in HEADERS]
    return Passage(target.decode("ascii"), [*on, (b"content-length", b"%d" % length)], length)


def clock_ahead_s(passed: Passage, now: datetime) -> float | None:
    """Seconds by which the site's clock is ahead of ours (the way took some), by the time that it signed."""
    told = dict(passed.headers).get(TIME_HEADER, b"")
    try:
        return (datetime.fromisoformat(told.decode("ascii")) - now).total_seconds()
    except (ValueError, TypeError):  # no time, or one without a zone: SuperLink will say no
        return None


def _each_once(headers: Sequence[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Whoever reads the first of two, and whoever reads the last, must read the same."""
    told = dict(headers)
    if len(told) != len(headers):
        raise Refused("malformed")
    return told


def _length(told: bytes | None) -> int:
    if told is None or not told.isdigit() or len(told) > 12:
        raise Refused("length")
    return int(told)


def _decoded(key: bytes) -> bytes:
    try:
        return b64decode(key, validate=True)
    except (ValueError, binascii.Error):
        raise Refused("wrong_key") from None
