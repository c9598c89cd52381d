"""The sites that a coordinator has approved, one file for each in its folder.

`unimiss-server approve` and `revoke` write them; the front reads them at every request, so that a site that was revoked
is out at once. A file that cannot be read lets nobody in, but for the moment that an editor takes to save it, which
empties the file and fills it again: a site that was told meanwhile that it is not approved would end the round at work.
Nor does one let in that was put back from before its site was revoked, for the coordinator's audit log remembers that.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
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
HOLD_S = 5.0
"""How long the beginning of a site's file, or nothing, goes on to mean what the whole did: an editor takes
milliseconds. Whoever empties the file to shut a site out waits no longer."""
PUT_BACK = (
    "{path}: says approved, and the audit log says that this site's key was revoked since; it is not let in. An older "
    "file was put back: `unimiss-server revoke {site} --yes` mends it"
)


class ApprovedSite(RegisteredSite):
    """A site as `unimiss-server approve` wrote it down; after `revoke` the file stays, so that a name is not given
    twice."""

    public_key: str
    status: Literal["approved", "revoked"]
    """Never by default: a file that was cut before it would let a revoked site in."""


@dataclass(frozen=True)
class _Entry:
    """A file as it was read: `stamp` changes with it; `key` is the site's as Flower gives a node's; `problem` says why
    it cannot be read: then `site` is None, or, for HOLD_S, what it said before, in `text`. is_put_back: it says
    approved of a site that was revoked since; `site` says revoked."""

    stamp: tuple[int, ...]
    site: ApprovedSite | None
    text: bytes = b""
    key: bytes = b""
    problem: str = ""
    is_put_back: bool = False

    @property
    def is_unsettled(self) -> bool:
        """Whether time or the audit log may change what it means."""
        return self.is_put_back or (self.problem != "" and self.site is not None)


class Registry:
    """The sites of a coordinator's folder. Each question looks at the files' stamps, and reads those that changed: some
    microseconds for a site. now: in seconds since 1970, as the files' dates. For one thread."""

    def __init__(self, home: Home, *, now: Callable[[], float] = time.time) -> None:
        self._folder = home.sites
        self._revocations = Revocations(home.audit)
        self._now = now
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

    def names(self) -> list[str]:
        """All that were given, whether their files can be read or not."""
        return sorted(file.name.removesuffix(".yaml") for file in self._files())

    def holder_of(self, key: bytes) -> str | None:
        """The approved site of a public key (PEM, as `unimiss_core.keys.pem_of_public` gives it), or None. Never
        raises: a damaged file is logged when it is read."""
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
        text = _content(path)  # first: whole where `load` then finds half, and never the other way round
        try:
            site = load(ApprovedSite, path)
            key = site_public_key(site.public_key, f"{path}: 'public_key'")
        except ConfigError as error:
            return self._of_before(before, name, stamp, text, str(error))
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
        return _Entry(stamp, site, text or b"", pem_of_public(key), is_put_back=is_put_back)

    def _of_before(
        self, before: _Entry | None, name: str, stamp: tuple[int, ...], text: bytes | None, problem: str
    ) -> _Entry:
        """Of a file that cannot be read: what it said before, where it is a beginning of that, and has just been saved,
        and the audit log does not say that the site is revoked."""
        if before is None or text is None or not before.text.startswith(text) or not self._is_of_now(stamp):
            return self._refused(name, stamp, problem)
        if before.site is None or before.site.status != "approved" or self._is_revoked(before.site):
            return self._refused(name, stamp, problem)
        if stamp != before.stamp:  # it is said once
            log.error("the file of a site cannot be read, what it said before holds for %g s: %s", HOLD_S, name)
        return replace(before, stamp=stamp, problem=problem)

    def _is_of_now(self, stamp: tuple[int, ...]) -> bool:
        """Whether the file changed within HOLD_S. A date to come is none of this clock's."""
        return abs(self._now() - stamp[1] / 1e9) < HOLD_S

    def _is_revoked(self, site: ApprovedSite) -> bool:
        try:
            return fingerprint(site_public_key(site.public_key, site.name)) in self._revocations.last()
        except ConfigError:  # nobody knows
            return True

    def _refused(self, name: str, stamp: tuple[int, ...], problem: str) -> _Entry:
        log.error("the file of a site cannot be read, the site is refused: %s", name)
        return _Entry(stamp, None, problem=problem)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def registered(site: ApprovedSite) -> RegisteredSite:
    """As a coordinator file lists it."""
    return RegisteredSite(**{name: getattr(site, name) for name in RegisteredSite.model_fields})


def _stamp(file: DirEntry[str]) -> tuple[int, ...]:
    """Of a file's state, second when it changed; empty where it has gone. A file that is replaced is another inode. A
    link that leads nowhere has its own: it is a file that cannot be read, and its site's name stays given."""
    for followed in (True, False):
        with suppress(OSError):
            seen = file.stat(follow_symlinks=followed)
            return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino
    return ()
