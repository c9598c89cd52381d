"""`unimiss-server init`: a coordinator's folder, with keys and certificates of its own."""

import logging
import secrets
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from server import examples
from server.home import Home
from server.server_config import usually_bound
from unimiss_core import certificates, durable, keys
from unimiss_core.errors import ConfigError
from unimiss_core.joining import HostAndPort, host_and_port

log = logging.getLogger(__name__)

Note = Callable[[str, Mapping[str, str | int | float]], None]
"""Writes down what an operator did: a kind and its facts."""


def unnoted(kind: str, facts: Mapping[str, str | int | float]) -> None:
    log.info("%s %s", kind, " ".join(f"{key}={value}" for key, value in facts.items()))


def found(path: Path, address: str, *, now: datetime, note: Note = unnoted) -> Home:
    """Make the folder `path`, for a coordinator that sites reach at `address`, HOST:PORT.

    server.yaml is written last: a folder that has none was cut off. Raises ConfigError: the address is none, the folder
    holds something, or cannot be written to.
    """
    public = _parsed(address)
    home = Home(path.absolute())
    try:
        durable.make_folder(home.path)
        if home.server.is_file():  # it is written last
            raise ConfigError(
                f"{home.path}: is a coordinator's folder already, and every site relies on its keys; use it as it is, "
                "or give a new folder"
            )
        if any(home.path.iterdir()):
            raise ConfigError(
                f"{home.path}: holds something already; give a new folder, or delete what an `init` that was cut off "
                "left there"
            )
        _make_secrets(home)
        _make_certificates(home, public.host, now)
        for folder in (home.sites, home.runs, home.flower):
            folder.mkdir()
        home.flower.chmod(0o700)  # SuperLink's database holds updates while they travel
        durable.write_text(home.study, examples.STUDY)
        durable.write_text(home.coordinator, examples.COORDINATOR)
        durable.write_text(home.server, examples.SERVER.format(address=address, listen=usually_bound(public.host)))
    except OSError as error:
        raise ConfigError(f"{home.path}: cannot be written to ({error.strerror}); mend that, then delete it") from None
    note("init", {"address": address})
    return home


def _parsed(address: str) -> HostAndPort:
    try:
        return host_and_port(address)
    except ValueError as error:
        raise ConfigError(f"--address: {error}") from None


def _make_secrets(home: Home) -> None:
    keys.make_private_folder(home.secrets)
    keys.write_private(home.authority_key, keys.in_pem_form(keys.new_site_key()))
    keys.write_private(home.server_key, keys.in_pem_form(keys.new_site_key()))
    keys.write_private(home.signing_key, keys.in_openssh_form(keys.new_signing_key()))
    keys.write_private(home.superexec_secret, secrets.token_hex(32).encode())


def _make_certificates(home: Home, host: str, now: datetime) -> None:
    home.certificates.mkdir()
    authority = certificates.new_authority(keys.read_site_key(home.authority_key), host=host, now=now)
    durable.write_text(home.authority_certificate, certificates.as_pem(authority.certificate))
    make_server_certificate(home, authority, host, now)
    signing = keys.read_signing_key(home.signing_key).public_key()
    durable.write_text(home.signing_public_key, keys.public_line(signing, "coordinator") + "\n")


def make_server_certificate(home: Home, authority: certificates.Authority, host: str, now: datetime) -> None:
    key = keys.read_site_key(home.server_key).public_key()
    certificate = certificates.server_certificate(authority, key, host=host, now=now)
    durable.write_text(home.server_certificate, certificates.as_pem(certificate))
