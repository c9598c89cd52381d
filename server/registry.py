"""The sites that a coordinator has approved, one file for each in its folder.

`unimiss-server approve` and `revoke` write them; the front reads them at every request, so that a site that was revoked
is out at once. A file that cannot be read lets nobody in; nor does one that was put back from before its site was
revoked, for the coordinator's audit log remembers that.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import DirEntry, scandir
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
    there is no site. is_put_back: it says approved of a site that was revoked since; `site` says revoked."""

    stamp: tuple[int, ...]
    site: ApprovedSite | None
    key: bytes = b""
    problem: str = ""
    is_put_back: bool = False


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
        raises: a damaged file is logged when it is read, and its site is refused."""
        self._refresh()
        return self._holders.get(key)

    def _refresh(self) -> None:
        found = {file.name: stamp for file in self._files() if (stamp := _stamp(file))}
        known = {name: entry for name, entry in self._entries.items() if found.get(name) == entry.stamp}
        put_back = {name for name, entry in known.items() if entry.is_put_back}  # it may be approved since
        if known.keys() == found.keys() == self._entries.keys() and not put_back:
            return
        self._entries = {
            name: known[name] if name in known.keys() - put_back else self._read(name, stamp)
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
        path = self._folder / name
        try:
            site = load(ApprovedSite, path)
            if f"{site.name}.yaml" != name:
                raise ConfigError(f"{path}: is of the site '{site.name}'; rename one of the two")
            key = site_public_key(site.public_key, f"{path}: 'public_key'")
            if is_put_back := site.status == "approved" and fingerprint(key) in self._revocations.last():
                if not (name in self._entries and self._entries[name].is_put_back):  # it is said once
                    log.error("%s", PUT_BACK.format(path=path, site=site.name))
                site = site.model_copy(update={"status": "revoked"})
            return _Entry(stamp, site, pem_of_public(key), is_put_back=is_put_back)
        except ConfigError as error:
            log.error("the file of a site cannot be read, the site is refused: %s", name)
            return _Entry(stamp, None, problem=str(error))


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
