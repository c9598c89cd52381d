"""Who may take part: `unimiss-server approve`, `revoke` and `renew`.

A name stands for one institution and one key for ever: neither is given twice, so that what a run's folder, a ledger or
an audit log says of a site goes on to mean that site. A site that lost its key comes back under a new name, with the
state folder that it had: ledgers are known here by name, so nothing here could tell what its patients have paid.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from server.founding import Note, make_server_certificate, unnoted
from server.home import Home
from server.registry import ApprovedSite, Registry
from server.revocations import Revocations
from unimiss_core import certificates, durable, keys
from unimiss_core.certificates import Authority
from unimiss_core.config import dump_yaml, load, parse
from unimiss_core.errors import AuditError, ConfigError
from unimiss_core.joining import UNDER_ANOTHER_NAME, host_and_port, in_yaml, read_join_request, read_welcome, welcome
from unimiss_core.yaml_files import read_yaml

RENEW_WITHIN_DAYS = 180
"""Certificates that run out sooner are made anew."""
ANOTHER_FOLDER = (
    "make a new coordinator's folder with `unimiss-server init`, which every site joins anew: " + UNDER_ANOTHER_NAME
)
"""What is left where the authority's own certificate runs out."""


@dataclass(frozen=True)
class Approved:
    site: str
    fingerprint: str
    welcome: Path
    is_new: bool
    """False: the name was approved before, with the same key."""


def approve(home: Home, name: str, key_file: Path, *, now: datetime, note: Note = unnoted) -> Approved:
    """Let the site `name` take part by the key of `key_file`, its join request or .pub file, and write its welcome.

    Raises ConfigError: the file is no such key, or another site's; the name or the key was given before.
    """
    key = _given_key(name, key_file)
    known = Registry(home).sites()
    is_new = _require_free(name, key, known)
    authority = _authority(home, now) if is_new or not _welcome_lasts(home, name, now) else None
    told = keys.fingerprint(key)
    note("approve", {"site": name, "fingerprint": told})
    if is_new:
        _write(home, _approved(name, key), key)
    if authority is not None:
        _write_welcome(home, authority, name, key, now)
    return Approved(name, told, home.welcome(name), is_new)


def revoke(home: Home, name: str, *, note: Note = unnoted) -> bool:
    """Shut the site `name` out, from its next request on; False where it was already. Raises ConfigError: no such
    site, or its key is not known any more; that one is out all the same.

    No file that cannot be read hinders it, be it the site's own or another's. The file comes first, so that a disk too
    full for the audit log keeps nobody in; what was cut off between the two, the same command again brings to its end.
    """
    require_known(home, name)
    site = _as_its_file_says(home, name) or _as_its_welcome_says(home, name)
    if site is None:
        _note_revoked(name, _given_to(home, name), note)
        _take_away_welcome(home, name)
        held = _put_aside(home.site(name))  # every command stumbles over it
        raise ConfigError(
            f"'{name}' is shut out; neither its file nor its welcome could be read, so that nothing here keeps its "
            f"name from being given again: do not. What its file held is in {held}"
        )
    key = keys.site_public_key(site.public_key, name)
    told = keys.fingerprint(key)
    if site.status == "revoked" and told in Revocations(home.audit).last():
        return False
    if home.site(name).is_dir():
        _put_aside(home.site(name))
    _write(home, site.model_copy(update={"status": "revoked"}), key)
    _take_away_welcome(home, name)
    _note_revoked(name, told, note)
    return True


def require_known(home: Home, name: str) -> None:
    """Raises ConfigError: no site of that name was approved."""
    if name not in (known := Registry(home).names()):
        there = f"there are: {', '.join(known)}" if known else "no site was ever approved here"
        raise ConfigError(f"'{name}' is no site of {home.path}; {there}")


def _as_its_file_says(home: Home, name: str) -> ApprovedSite | None:
    """None: the file cannot be read, or is another site's."""
    try:
        site = load(ApprovedSite, home.site(name))
        keys.site_public_key(site.public_key, name)
    except ConfigError:
        return None
    return site if site.name == name else None


def _as_its_welcome_says(home: Home, name: str) -> ApprovedSite | None:
    """None: there is none, or it is not of the key that the audit log knows."""
    try:
        paper, _ = read_welcome(home.welcome(name))
        key = certificates.certificate_of(paper.certificate, name).public_key()
    except ConfigError:
        return None
    if not isinstance(key, keys.SitePublicKey) or paper.site != name:
        return None
    if _given_to(home, name) not in (None, keys.fingerprint(key)):
        return None
    return _approved(name, key)


def _approved(name: str, key: keys.SitePublicKey) -> ApprovedSite:
    """Raises ConfigError: that cannot be a name."""
    told = {"name": name, "public_key": keys.public_line(key, name), "status": "approved"}
    return parse(ApprovedSite, told, where="SITE")


def _given_to(home: Home, name: str) -> str | None:
    """The fingerprint that the audit log knows of a site."""
    try:
        return Revocations(home.audit).given_to(name)
    except ConfigError:  # to shut out must not wait for that
        return None


def _note_revoked(name: str, fingerprint: str | None, note: Note) -> None:
    try:
        note("revoke", {"site": name} | ({"fingerprint": fingerprint} if fingerprint else {}))
    except AuditError as error:
        out = f"'{name}' is shut out, and that could not be written down: {error}"
        raise type(error)(f"{out}; after that revoke it again, so that it is remembered") from None


def renew(home: Home, *, now: datetime, every: bool = False, note: Note = unnoted) -> list[str]:
    """Make anew what runs out within RENEW_WITHIN_DAYS, or everything: the server's certificate, and the welcomes of
    approved sites; what was made, in words. Keys and the authority stay. Raises ConfigError."""
    authority, made = _authority(home, now), list[str]()
    server = certificates.read_certificate(home.server_certificate)
    is_servers_due = every or certificates.days_left(server, now) < RENEW_WITHIN_DAYS
    due = [site for site in Registry(home).approved() if every or not _welcome_lasts(home, site.name, now)]
    note("renew", {"certificates": is_servers_due + len(due)})
    if is_servers_due:
        make_server_certificate(home, authority, host_and_port(address_of(home)).host, now)
        made.append(
            f"{home.server_certificate}; with a run at work, `unimiss-server stop` and `run` before the old one runs "
            "out: the public side shows it at once, SuperLink from its next start on"
        )
    for site in due:
        key = keys.site_public_key(site.public_key, site.name)
        _write_welcome(home, authority, site.name, key, now)
        made.append(f"{home.welcome(site.name)}, for `unimiss-site join` at the site")
    return made


def address_of(home: Home) -> str:
    """HOST:PORT of server.yaml. Raises ConfigError."""
    raw = read_yaml(home.server)
    try:
        address = str(raw["address"])
        host_and_port(address)
    except (TypeError, KeyError):
        raise ConfigError(
            f"{home.server}: missing key 'address', HOST:PORT under which sites reach this machine"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{home.server}: 'address': {error}") from None
    return address


def standing(home: Home, *, now: datetime) -> list[str]:
    """The coordinator's own fingerprint, and a line for each site: name, status, fingerprint, and how long its
    certificate lasts. Raises ConfigError."""
    known = Registry(home).sites()
    width = max(map(len, known), default=0)
    own = keys.fingerprint(keys.read_signing_public_key(home.signing_public_key))
    sites = [
        f"{name:{width}}  {site.status:8}  {_fingerprint(site)}  {_lasts(home, site, now)}".rstrip()
        for name, site in sorted(known.items())
    ]
    return [f"this coordinator: {own}, which sites compare with their welcome's"] + (
        sites or ["no site was approved yet"]
    )


def _lasts(home: Home, site: ApprovedSite, now: datetime) -> str:
    if site.status == "revoked":
        return ""
    try:
        left = days_left(home, site.name, now)
    except ConfigError:
        return "no welcome: approve it again"
    return f"certificate lasts {left:.0f} days" if left > 0 else "certificate has run out: unimiss-server renew"


def days_left(home: Home, name: str, now: datetime) -> float:
    """Until the certificate in a site's welcome runs out. Raises ConfigError: it is gone, or damaged."""
    paper, _ = read_welcome(home.welcome(name))
    where = f"{home.welcome(name)}: 'certificate'"
    return certificates.days_left(certificates.certificate_of(paper.certificate, where), now)


def _given_key(name: str, file: Path) -> keys.SitePublicKey:
    if file.suffix not in (".yaml", ".yml"):
        return keys.site_public_key(keys.read_text(file), str(file))
    paper, key = read_join_request(file)
    if paper.site != name:
        raise ConfigError(f"{file}: is the join request of the site '{paper.site}', not of '{name}'; give its own name")
    return key


def _require_free(name: str, key: keys.SitePublicKey, known: Mapping[str, ApprovedSite]) -> bool:
    """Whether name and key are both new; False where they were given together and still stand. Raises ConfigError."""
    for site in known.values():
        same_key = keys.pem_of_public(keys.site_public_key(site.public_key, site.name)) == keys.pem_of_public(key)
        if site.status == "revoked" and (same_key or site.name == name):
            what = "name" if site.name == name else f"key, of '{site.name}',"
            raise ConfigError(
                f"'{name}': this {what} was revoked and is not given again; let the site come back under another name: "
                f"{UNDER_ANOTHER_NAME}"
            )
        if site.name == name and not same_key:
            raise ConfigError(
                f"'{name}': was approved with another key ({_fingerprint(site)}); if the site made a new one, revoke "
                f"this name and let it join under another: {UNDER_ANOTHER_NAME}"
            )
        if site.name != name and same_key:
            raise ConfigError(f"'{name}': the site '{site.name}' has this key already; each site makes its own")
    return name not in known


def _fingerprint(site: ApprovedSite) -> str:
    return keys.fingerprint(keys.site_public_key(site.public_key, site.name))


def _authority(home: Home, now: datetime) -> Authority:
    """Raises ConfigError: it is not of its key, or has run out."""
    certificate, key = certificates.read_certificate(home.authority_certificate), keys.read_site_key(home.authority_key)
    if certificates.key_of(certificate) != keys.pem_of_public(key.public_key()):
        raise ConfigError(f"{home.authority_certificate}: is not of the key in {home.secrets}; put back a backup")
    if certificates.days_left(certificate, now) <= 0:
        raise ConfigError(f"{home.authority_certificate}: has run out; {ANOTHER_FOLDER}")
    return Authority(certificate, key)


def _write(home: Home, site: ApprovedSite, key: keys.SitePublicKey) -> None:
    _write_over(home.site(site.name), f"# {keys.fingerprint(key)}\n{dump_yaml(site)}")


def _write_welcome(home: Home, authority: Authority, name: str, key: keys.SitePublicKey, now: datetime) -> None:
    signing = keys.read_signing_key(home.signing_key)
    paper = welcome(
        site=name,
        address=address_of(home),
        authority=certificates.as_pem(authority.certificate),
        certificate=certificates.as_pem(certificates.site_certificate(authority, key, site=name, now=now)),
        signing_key=signing,
    )
    told = (
        f"For the site {name}: unimiss-site join {name}.welcome.yaml. It holds no secret.",
        f"By telephone, compare with the coordinator's operator: {paper.fingerprint}",
    )
    _write_over(home.welcome(name), in_yaml(paper, *told))


def _write_over(path: Path, text: str) -> None:
    """Raises ConfigError: a folder stands there."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, where a file belongs; move it away")
    durable.write_text(path, text)


def _take_away_welcome(home: Home, name: str) -> None:
    """A folder in its place is no welcome, and stays."""
    if not home.welcome(name).is_dir():
        home.welcome(name).unlink(missing_ok=True)


def _put_aside(path: Path) -> Path:
    """Rename what can be neither read nor written over; where it is now."""
    names = (path.with_suffix(f".unreadable{number or ''}") for number in count())
    return path.replace(next(name for name in names if not name.exists()))


def _welcome_lasts(home: Home, name: str, now: datetime) -> bool:
    try:
        return days_left(home, name, now) >= RENEW_WITHIN_DAYS
    except ConfigError:  # it is gone, or damaged
        return False
