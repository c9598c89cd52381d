"""The two papers by which a site joins a coordinator, handed over by people: neither holds a secret.

    site                                               coordinator
    unimiss-site init            ──site.join.yaml──▶   unimiss-server approve SITE --key site.join.yaml
    unimiss-site join WELCOME    ◀─site.welcome.yaml─

Each side reads the fingerprint of the other's key to the other by telephone: nothing in between can then put a key of
its own in the place of theirs.
"""

from typing import Annotated

from pydantic import Field

from unimiss_core.config import Config, Name

Fingerprint = Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
"""Of a public key, as `ssh-keygen -l` prints it."""


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
    address: str
    """HOST:PORT of the coordinator's public side."""
    authority: str
    """PEM: the certificate that signs the coordinator's, and the site's below; it is trusted for nothing else."""
    certificate: str
    """PEM: says to the coordinator's front that the site's key is an approved site's."""
    signing_key: str
    """One line in OpenSSH's form, Ed25519: signs the manifests of checkpoints."""
    fingerprint: Fingerprint
    """Of `signing_key`."""
