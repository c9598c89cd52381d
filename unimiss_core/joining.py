"""The two papers by which a site joins a coordinator, handed over by people: neither holds a secret.

    site                                               coordinator
    unimiss-site init            ──site.join.yaml──▶   unimiss-server approve SITE --key site.join.yaml
    unimiss-site join WELCOME    ◀─site.welcome.yaml─

Each side reads the fingerprint of the other's key to the other by telephone: nothing in between can then put a key of
its own in the place of theirs. A welcome's fingerprint is that of the coordinator's signing key, and covers the rest of
the welcome by the signature in it: whoever replaced the address or the authority would have to sign anew.
"""

import base64
import binascii
import ipaddress
import re
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, Field

from unimiss_core.config import Config, Name, load
from unimiss_core.errors import ConfigError
from unimiss_core.keys import (
    SigningKey,
    SigningPublicKey,
    SitePublicKey,
    fingerprint,
    is_signed,
    public_line,
    sign,
    signing_public_key,
    site_public_key,
)
from unimiss_core.yaml_files import read_yaml

Fingerprint = Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
"""Of a public key, as `ssh-keygen -l` prints it."""

_DNS_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_PURPOSE = "unimiss welcome 1"

UNDER_ANOTHER_NAME = (
    "unimiss-site init FOLDER --name NAME --state STATE, where STATE is the state folder of before, so that what its "
    "patients have cost goes on to count"
)
"""How a site that lost its key, or whose name was revoked, comes back: to stand in a message."""


class HostAndPort(NamedTuple):
    host: str
    """A DNS name in lower case, or an IP address; without brackets."""
    port: int


def host_and_port(address: str) -> HostAndPort:
    """Of HOST:PORT or [IPv6]:PORT. Raises ValueError, in words."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError(f"expected HOST:PORT, such as unimiss.example.org:443, got {address!r}")
    if not 0 < int(port) < 65536:
        raise ValueError(f"a port is a number from 1 to 65535, got {port}")
    if not _is_ip(bare) and (not _DNS_NAME.fullmatch(bare) or bare.replace(".", "").isdigit()):
        raise ValueError(f"expected a DNS name in lower case or an IP address before the port, got {host!r}")
    if (":" in bare) != (host != bare):
        raise ValueError(f"an IPv6 address, and nothing else, stands in brackets: [::1]:443, got {address!r}")
    return HostAndPort(bare, int(port))


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _checked(address: str) -> str:
    host_and_port(address)
    return address


PublicAddress = Annotated[str, AfterValidator(_checked)]
"""HOST:PORT under which sites reach a coordinator."""


class JoinRequest(Config):
    """What a site gives to the coordinator's operator."""

    site: Name
    public_key: str
    """One line in OpenSSH's form, NIST P-384: the site's key for Flower's node authentication and for TLS."""
    fingerprint: Fingerprint
    """Of `public_key`."""


class Welcome(Config):
    """What the coordinator's operator gives back to an approved site."""

    site: Name
    address: PublicAddress
    """HOST:PORT of the coordinator's public side."""
    authority: str
    """PEM: the certificate that signs the coordinator's, and the site's below; it is trusted for nothing else."""
    certificate: str
    """PEM: says to the coordinator's front that the site's key is an approved site's."""
    signing_key: str
    """One line in OpenSSH's form, Ed25519: signs the manifests of checkpoints."""
    fingerprint: Fingerprint
    """Of `signing_key`."""
    signature: str
    """Base64: Ed25519 by `signing_key`, over all that stands above."""

    @property
    def signed(self) -> bytes:
        """What the signature is over: the canonical JSON of all other fields."""
        unsigned = self.model_copy(update={"signature": ""})
        return unsigned.canonical().encode()


def join_request(site: str, key: SitePublicKey) -> JoinRequest:
    return JoinRequest(site=site, public_key=public_line(key, site), fingerprint=fingerprint(key))


def welcome(*, site: str, address: str, authority: str, certificate: str, signing_key: SigningKey) -> Welcome:
    public = signing_key.public_key()
    unsigned = Welcome(
        site=site,
        address=address,
        authority=authority,
        certificate=certificate,
        signing_key=public_line(public, "coordinator"),
        fingerprint=fingerprint(public),
        signature="",
    )
    signature = base64.b64encode(sign(signing_key, _PURPOSE, unsigned.signed)).decode()
    return unsigned.model_copy(update={"signature": signature})


def read_join_request(path: Path) -> tuple[JoinRequest, SitePublicKey]:
    """The paper and its key. Raises ConfigError: another file, or its fingerprint is not its key's."""
    paper = _read(JoinRequest, path)
    key = site_public_key(paper.public_key, f"{path}: 'public_key'")
    _require_fingerprint(paper.fingerprint, key, path)
    return paper, key


def read_welcome(path: Path) -> tuple[Welcome, SigningPublicKey]:
    """The paper and the key that signs. Raises ConfigError: another file, or something in it was changed."""
    paper = _read(Welcome, path)
    key = signing_public_key(paper.signing_key, f"{path}: 'signing_key'")
    _require_fingerprint(paper.fingerprint, key, path)
    try:
        signature = base64.b64decode(paper.signature, validate=True)
    except binascii.Error:
        signature = b""
    if not is_signed(key, _PURPOSE, paper.signed, signature):
        raise ConfigError(f"{path}: was changed after the coordinator signed it; have the file sent again")
    return paper, key


def in_yaml(paper: JoinRequest | Welcome, *told: str) -> str:
    """A paper as a file, led by comments for whoever opens it."""
    comments = "".join(f"# {line}\n" for line in told)
    return comments + yaml.dump(paper.model_dump(mode="json"), Dumper=_InBlocks, sort_keys=False, width=_NEVER_BROKEN)


class _InBlocks(yaml.SafeDumper):
    """Text of several lines as it is, below a `|`."""


_NEVER_BROKEN = 1 << 16
_InBlocks.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


PaperT = TypeVar("PaperT", JoinRequest, Welcome)


def _read(kind: type[PaperT], path: Path) -> PaperT:
    raw = read_yaml(path)
    if isinstance(raw, dict) and kind is JoinRequest and "certificate" in raw:
        raise ConfigError(f"{path}: is a welcome, which goes to the site; expected the site's own NAME.join.yaml")
    if isinstance(raw, dict) and kind is Welcome and "public_key" in raw:
        raise ConfigError(
            f"{path}: is a join request, which goes to the coordinator; expected the NAME.welcome.yaml that came back"
        )
    return load(kind, path)


def _require_fingerprint(told: str, key: SitePublicKey | SigningPublicKey, path: Path) -> None:
    if (found := fingerprint(key)) != told:
        raise ConfigError(
            f"{path}: its key has the fingerprint {found}, and the file says {told}: one of the two was changed; have "
            "the file sent again"
        )
