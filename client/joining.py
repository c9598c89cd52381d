"""`unimiss-site init` and `join`: a site's folder, its key pair, and the trust in one coordinator."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.daemon import is_running
from client.home import Home
from client.site_config import state_folder
from unimiss_core import certificates, durable, keys
from unimiss_core.config import Config, Name, parse
from unimiss_core.errors import ConfigError
from unimiss_core.joining import UNDER_ANOTHER_NAME, Welcome, in_yaml, join_request, read_welcome
from unimiss_core.yaml_files import read_yaml

log = logging.getLogger(__name__)

Note = Callable[[str, Mapping[str, str | int | float]], None]
"""Writes down what an operator did: a kind and its facts."""

SITE_FILE = """\
# A site file: it never leaves the hospital. Relative paths count from this file's folder.
# Every setting and its meaning: client/site_config.py. When it is filled in: unimiss-site check
name: {name}
data:
  - folder: /path/to/dicom                   # DICOM says itself what it is and whose
  # - folder: /path/to/png                   # pictures do not: here the file name begins with the patient's number
  #   patient_pattern: "^(?P<patient>[0-9]+)_"
  #   modality: XR
state: {state:<37} # on local disk, readable by the daemon alone
devices: auto
policy:                                      # what may be asked of this site: docs/audit.md
  studies: []                                # which may come, by name or sha256; when another asks, it is told here
  losses_may_leave: true
privacy:                                     # docs/privacy.md; `unimiss-site check` says which studies may come
  holds: [images, volumes]                   # what this site trains on in private studies
  max_epsilon: 8.0                           # what a patient may cost in all private rounds of all studies together
  delta: 1.0e-6                              # below one over ten times the patients of this site
"""


class _Named(Config):
    """The only setting of a site file that joining looks at."""

    name: Name


@dataclass(frozen=True)
class Begun:
    home: Home
    join_request: Path
    """For the coordinator's operator."""
    fingerprint: str


@dataclass(frozen=True)
class Joined:
    site: str
    address: str
    fingerprint: str
    """Of the coordinator's signing key."""
    is_new: bool
    """False: another welcome of the same coordinator took the place of the one before."""


def unnoted(kind: str, facts: Mapping[str, str | int | float]) -> None:
    log.info("%s %s", kind, " ".join(f"{key}={value}" for key, value in facts.items()))


def begin(path: Path, name: str, *, state: Path | None = None, note: Note = unnoted) -> Begun:
    """Make a site's folder at `path`: its key pair, its join request, and a site file where there is none.

    state: the state folder of a site of the same patients, whose ledger and audit log go on under this name; None
    begins both. Raises ConfigError: the name cannot be one, the folder holds a site's keys or another site's file, or
    cannot be written to; `state` is no state folder, a daemon has it, or the site file that is there names another.
    """
    parse(_Named, {"name": name}, where="--name")
    home = Home(path.absolute())
    state = state and state.resolve()
    if home.keys.exists():
        raise ConfigError(
            f"{home.path}: holds a site's keys already; to join, give the .join.yaml in it, or keys/site.pub, to the "
            f"coordinator's operator. Another site needs another folder; of the same patients: {UNDER_ANOTHER_NAME}"
        )
    if home.site.exists() and (held := site_name(home)) != name:
        raise ConfigError(f"{home.site}: is of the site '{held}', not '{name}'; give that name, or another folder")
    if state is not None:
        _require_left(state)
        if home.site.exists() and state_folder(home.site).resolve() != state:
            raise ConfigError(f"{home.site}: is there already, and says another 'state' than --state {state}")
    key = keys.new_site_key()
    request = join_request(name, key.public_key())
    try:
        durable.make_folder(home.path)
        _write_pair(home, key, request.public_key)
        told = (
            f"For the coordinator's operator: unimiss-server approve {name} --key {name}.join.yaml. It holds no secret."
        )
        durable.write_text(home.join_request(name), in_yaml(request, told))
        if not home.site.exists():
            told = "state" if state is None else json.dumps(str(state))
            durable.write_text(home.site, SITE_FILE.format(name=name, state=told))
    except OSError as error:
        raise ConfigError(f"{home.path}: cannot be written to ({error.strerror}); mend that, then try again") from None
    note("init", {"site": name, "fingerprint": request.fingerprint})
    return Begun(home, home.join_request(name), request.fingerprint)


def join(home: Home, path: Path, *, note: Note = unnoted) -> Joined:
    """Trust the coordinator of the welcome at `path`, which must be for this site and its key.

    Raises ConfigError: it is another's, was changed, or another coordinator was joined before.
    """
    paper, signing_key = read_welcome(path)
    name = site_name(home)
    _require_ours(home, paper, name, str(path))
    before = read_welcome(home.welcome)[0] if home.welcome.exists() else None
    if before is not None and before.fingerprint != paper.fingerprint:
        raise ConfigError(
            f"{path}: is of another coordinator ({paper.fingerprint}) than this site has joined "
            f"({before.fingerprint}); a folder joins one. To change: unimiss-site leave, then {UNDER_ANOTHER_NAME}"
        )
    note("join", {"site": name, "coordinator": paper.fingerprint})
    try:
        durable.write_text(home.authority, paper.authority)
        durable.write_text(home.certificate, paper.certificate)
        durable.write_text(home.coordinator_key, keys.public_line(signing_key, "coordinator") + "\n")
        durable.write_text(home.welcome, in_yaml(paper))  # last: whoever finds it finds the others
    except OSError as error:
        raise ConfigError(f"{home.path}: cannot be written to ({error.strerror}); mend that, then try again") from None
    return Joined(name, paper.address, paper.fingerprint, is_new=before is None)


def site_name(home: Home) -> str:
    """As the site file says it. Raises ConfigError."""
    raw = read_yaml(home.site)
    return parse(_Named, {"name": raw.get("name")} if isinstance(raw, dict) else raw, where=str(home.site)).name


def _require_left(state: Path) -> None:
    """Raises ConfigError: this is no site's state folder, or its daemon runs."""
    try:
        if not (state / "audit.jsonl").is_file():
            raise ConfigError(
                f"--state {state}: is no site's state folder, for there is no audit.jsonl in it, which each has from "
                "`init` on; name the folder that 'state' says in the site file of before"
            )
        if is_running(state):
            raise ConfigError(
                f"--state {state}: a daemon runs with it; stop that first (`unimiss-site leave`, or systemctl stop). "
                "One state folder serves one daemon at a time"
            )
    except PermissionError as error:
        raise ConfigError(f"--state {state}: cannot be read ({error.strerror}); be the daemon's user") from None


def _write_pair(home: Home, key: keys.SiteKey, line: str) -> None:
    """Whole or not at all: a folder of keys that lacks one would be of no use, and could not be made anew."""
    with durable.new_folder(home.keys) as partial:
        partial.chmod(0o700)
        keys.write_private(partial / home.private_key.name, keys.in_openssh_form(key))
        keys.write_private(partial / home.tls_key.name, keys.in_pem_form(key))
        durable.write_text(partial / home.public_key.name, line + "\n")


def _require_ours(home: Home, paper: Welcome, name: str, where: str) -> None:
    if paper.site != name:
        raise ConfigError(
            f"{where}: is the welcome of the site '{paper.site}', and {home.site.name} says '{name}'; ask for this "
            "site's own"
        )
    certificates.check_site_certificate(
        certificates.certificate_of(paper.certificate, f"{where}: 'certificate'"),
        certificates.certificate_of(paper.authority, f"{where}: 'authority'"),
        keys.read_site_key(home.private_key).public_key(),
        site=name,
        where=where,
    )
