"""The sites that a coordinator has approved, one file for each in its folder.

`unimiss-server approve` and `revoke` write them; the front reads them at every request, so that a site that was revoked
is out at once. A file that cannot be read lets nobody in that was not in before: an editor may have saved half of it,
and a site that is told that it is not approved ends what it does. Nor does one let in that was put back from before its
site was revoked, for the coordinator's audit log remembers that.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import DirEntry, scandir
from pathlib import Path
from typing import Literal

from server.coordinator_config import RegisteredSite
from server.home import Home
from server.revocations import Revocations
from unimiss_core.config import load
from unimiss_core.errors import ConfigError
from unimiss_core.keys import fingerprint, pem_of_public, site_public_key

log = logging.getLogger(__name__)

_WELCOME = ".welcome.yaml"
PUT_BACK = (
    "{path}: says approved, and the audit log says that this site's key was revoked since; it is not let in. An older "
    "file was put back: `unimiss-server revoke {site} --yes` mends it"
)


class ApprovedSite(RegisteredSite):
    """A site as `unimiss-server approve` wrote it down; after `revoke` the file stays, so that a name is not given
    twice."""

    public_key: str
    status: Literal["approved", "revoked"] = "approved"


@dataclass(frozen=True)
class _Entry:
    """A file as it was read: `stamp` changes with it; `key` is the site's as Flower gives a node's; `problem` says why
    it cannot be read: then `site` is None, or what it said before. is_put_back: it says approved of a site that was
    revoked since; `site` says revoked."""

    stamp: tuple[int, ...]
    site: ApprovedSite | None
    key: bytes = b""
    problem: str = ""
    is_put_back: bool = False

    @property
    def is_unsettled(self) -> bool:
        """Whether the audit log may change what it means."""
        return self.is_put_back or (self.problem != "" and self.site is not None)


class Registry:
    """The sites of a coordinator's folder. Each question looks at the files' stamps, and reads those that changed: some
    microseconds for a site. For one thread."""

    def __init__(self, home: Home) -> None:
        self._folder = home.sites
        self._revocations = Revocations(home.audit)
        self._entries: dict[str, _Entry] = {}
        self._holders: dict[bytes, str] = {}

    def sites(self) -> Mapping[str, ApprovedSite]:
        """All by name, revoked ones among them. Raises ConfigError: a file is damaged."""
        self._refresh()
        if problems := [entry.problem for entry in self._entries.values() if entry.problem]:
            raise ConfigError("; ".join(problems))
        return {entry.site.name: entry.site for entry in self._entries.values() if entry.site is not None}

    def approved(self) -> tuple[ApprovedSite, ...]:
        """By name. Raises as `sites`."""
        return tuple(site for _, site in sorted(self.sites().items()) if site.status == "approved")

    def put_back(self) -> frozenset[str]:
        """Names of sites that were revoked, and whose files say approved."""
        self._refresh()
        return frozenset(entry.site.name for entry in self._entries.values() if entry.site and entry.is_put_back)

    def holder_of(self, key: bytes) -> str | None:
        """The approved site of a public key (PEM, as `unimiss_core.keys.pem_of_public` gives it), or None. Never
        raises: a damaged file is logged when it is read, and goes on to mean what it said before."""
        self._refresh()
        return self._holders.get(key)

    def _refresh(self) -> None:
        found = {file.name: stamp for file in self._files() if (stamp := _stamp(file))}
        known = {name: entry for name, entry in self._entries.items() if found.get(name) == entry.stamp}
        unsettled = {name for name, entry in known.items() if entry.is_unsettled}
        if known.keys() == found.keys() == self._entries.keys() and not unsettled:
            return
        self._entries = {
            name: known[name] if name in known.keys() - unsettled else self._read(name, stamp)
            for name, stamp in sorted(found.items())
        }
        held = Counter(entry.key for entry in self._entries.values())  # a key of two is a key of none
        self._holders = {
            entry.key: entry.site.name
            for entry in self._entries.values()
            if entry.site is not None and entry.site.status == "approved" and held[entry.key] == 1
        }

    def _files(self) -> list[DirEntry[str]]:
        try:
            with scandir(self._folder) as files:
                return [file for file in files if file.name.endswith(".yaml") and not file.name.endswith(_WELCOME)]
        except OSError:
            log.error("the folder of approved sites cannot be read: no site is let in")
            return []

    def _read(self, name: str, stamp: tuple[int, ...]) -> _Entry:
        path, before = self._folder / name, self._entries.get(name)
        try:
            site = load(ApprovedSite, path)
            key = site_public_key(site.public_key, f"{path}: 'public_key'")
        except ConfigError as error:
            return self._of_before(before, path, stamp, str(error))
        if f"{site.name}.yaml" != name:
            return self._refused(name, stamp, f"{path}: is of the site '{site.name}'; rename one of the two")
        try:
            was_revoked = fingerprint(key) in self._revocations.last()
        except ConfigError as error:
            return self._refused(name, stamp, str(error))
        if is_put_back := site.status == "approved" and was_revoked:
            if before is None or not before.is_put_back:  # it is said once
                log.error("%s", PUT_BACK.format(path=path, site=site.name))
            site = site.model_copy(update={"status": "revoked"})
        return _Entry(stamp, site, pem_of_public(key), is_put_back=is_put_back)

    def _of_before(self, before: _Entry | None, path: Path, stamp: tuple[int, ...], problem: str) -> _Entry:
        """Of a file that cannot be read: what it said before, unless that, or what can be read of it, or the audit log
        says that the site is revoked."""
        site = before.site if before else None
        if before is None or site is None or site.status != "approved" or _denies(path) or self._is_revoked(site):
            return self._refused(path.name, stamp, problem)
        if stamp != before.stamp:  # it is said once
            log.error("the file of a site cannot be read, what it said before holds: %s", path.name)
        return replace(before, stamp=stamp, problem=problem)

    def _is_revoked(self, site: ApprovedSite) -> bool:
        try:
            return fingerprint(site_public_key(site.public_key, site.name)) in self._revocations.last()
        except ConfigError:  # nobody knows
            return True

    def _refused(self, name: str, stamp: tuple[int, ...], problem: str) -> _Entry:
        log.error("the file of a site cannot be read, the site is refused: %s", name)
        return _Entry(stamp, None, problem=problem)


def _denies(path: Path) -> bool:
    """Whether a file that cannot be read as a whole names another status than approved, of which it may hold the
    beginning: whoever mistypes one means to shut the site out."""
    try:
        told = re.findall(rb"""\bstatus["']?\s*:\s*["']?(\w*)""", path.read_bytes())
    except OSError:
        return False
    return not all(b"approved".startswith(status) for status in told)


def registered(site: ApprovedSite) -> RegisteredSite:
    """As a coordinator file lists it."""
    return RegisteredSite(**{name: getattr(site, name) for name in RegisteredSite.model_fields})


def _stamp(file: DirEntry[str]) -> tuple[int, ...]:
    """Of a file's state; empty where it has gone. A file that is replaced is another inode."""
    try:
        seen = file.stat()
    except OSError:
        return ()
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino
