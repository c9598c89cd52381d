"""Whether this machine can take part: what `unimiss-site check` looks at besides the scans.

All that it sends is one empty question to the coordinator. Each look is a point: good, a warning, or bad, with what to
do about it.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from client.audit import site_log
from client.health import PROBLEMS, read_health
from client.home import Home
from client.ledger import ledger_of, require_one_ledger
from client.listening import listeners_of
from client.reachability import Reached, reach
from client.site_config import SiteConfig
from unimiss_core import bundle
from unimiss_core.certificates import days_left, read_certificate
from unimiss_core.device import devices_of, left_unused, memory_of
from unimiss_core.errors import AuditError, ConfigError, LedgerError

Mark = Literal["good", "warning", "bad"]

SOON_DAYS = 30.0
"""Before a certificate runs out."""
STATE_ROOM_GB = 20.0
"""For what is remembered of a run, the logs and the ledger: an encoder of 100 million parameters takes 4 GB."""
GPU_ROOM_GB = 8.0
AHEAD_S, BEHIND_S = 4.0, 240.0
"""How far this clock may be ahead of the coordinator's, and behind it: Flower takes signatures from 5 s in the future
to 300 s in the past."""


@dataclass(frozen=True)
class Point:
    mark: Mark
    what: str
    words: str


def points(home: Home, site: SiteConfig) -> Iterator[Point]:
    """All that is looked at, in the order in which a person would mend it. Raises ConfigError: keys are damaged."""
    yield _private(home)
    yield _audit_log(site)
    if site.ledger is not None:
        yield shared_ledger(site)
    yield Point("good", "code", f"the bundle that may run here has the sha256 {bundle.fab_hash()}")
    yield from _room(site)
    yield from _devices(site)
    yield _listening(site.state)
    if not home.welcome.is_file():
        yield Point("bad", "coordinator", "none is joined; `unimiss-site join WELCOME.yaml` does")
        return
    yield _certificate("certificate", home.certificate)
    yield _certificate("coordinator's authority", home.authority)
    reached = reach(home)
    yield _coordinator(reached)
    if reached.problem in (None, "no_run", "failed", "not_approved"):
        yield _clock(reached.clock_ahead_s)


def _private(home: Home) -> Point:
    """Keys must be readable by one user alone."""
    for path in (home.keys, home.private_key, home.tls_key):
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return Point("bad", "keys", f"{path.name} can be read by other users; take that away: chmod -R go= keys")
    return Point("good", "keys", "the private key can be read by this user alone")


def _audit_log(site: SiteConfig) -> Point:
    """Damaged, it lets no daemon begin."""
    try:
        lines = len(site_log(site.state).read().entries)
    except (AuditError, ConfigError) as error:
        return Point("bad", "audit log", str(error))
    return Point("good", "audit log", f"whole, {lines} lines")


def shared_ledger(site: SiteConfig) -> Point:
    """What cannot be charged does not leave; two operators see by the number whether theirs is one ledger."""
    folder = site.ledger_folder
    try:
        require_one_ledger(site)
        entries = ledger_of(site).entries
        files = [path for name in ("ledger.jsonl", "ledger.head") if (path := folder / name).exists()]
    except (LedgerError, ConfigError) as error:
        return Point("bad", "ledger", str(error))
    except OSError as error:
        return Point("bad", "ledger", f"{folder} cannot be looked into ({error.strerror})")
    if not os.access(folder, os.W_OK | os.X_OK) or not all(os.access(file, os.R_OK | os.W_OK) for file in files):
        return Point("bad", "ledger", f"{folder}, or a file in it, cannot be written to by this user")
    return Point("good", "ledger", f"{entries} entries in {folder.resolve()}, with every other site that names it")


def _room(site: SiteConfig) -> Iterator[Point]:
    cache, state = _existing(site.cache_folder), _existing(site.state)
    used = _size_gb(site.cache_folder)
    needs = {"cache": max(site.cache_limit_gb - used, 0.0), "state": STATE_ROOM_GB}
    if cache.stat().st_dev == state.stat().st_dev:
        needs = {"state and cache": needs["cache"] + STATE_ROOM_GB}
    for what, needed in needs.items():
        free = shutil.disk_usage(cache if what == "cache" else state).free / 1e9
        if free >= needed:
            yield Point(
                "good", f"disk, {what}", f"{free:.0f} GB are free; at most {needed:.0f} GB more will be written"
            )
        else:
            lower = "lower cache_limit_gb in the site file, or " if "cache" in what else ""
            yield Point(
                "warning",
                f"disk, {what}",
                f"{free:.0f} GB are free, and up to {needed:.0f} GB more may be written; {lower}make room",
            )


def _devices(site: SiteConfig) -> Iterator[Point]:
    try:
        devices = devices_of(site.devices)
    except ConfigError as error:
        yield Point("bad", "devices", str(error))
        return
    for gpu, why in left_unused(site.devices).items():
        yield Point("warning", f"device {gpu}", f"stays unused: {why}")
    for device in dict.fromkeys(devices):
        if device.type != "cuda":
            yield Point("good", f"device {device}", "trains; a GPU would be many times as fast")
            continue
        try:
            free, total = (size / 1e9 for size in memory_of(device))
        except ConfigError as error:
            yield Point("bad", f"device {device}", str(error))
            continue
        mark: Mark = "good" if free >= GPU_ROOM_GB else "warning"
        busy = "" if mark == "good" else "; another program holds the rest: the daemon needs the device for itself"
        yield Point(mark, f"device {device}", f"{free:.1f} of {total:.1f} GB of memory are free{busy}")


def _listening(state: Path) -> Point:
    from client.daemon import is_running  # here, because whoever only asks has no daemon to load

    health = read_health(state)
    if health is None or not is_running(state):
        return Point("good", "inbound", "the daemon does not run, so nothing of it listens; look again while it does")
    found = listeners_of(health.pid)
    if found is None:
        return Point("warning", "inbound", "this system does not tell what listens; look with its own tools")
    if open_ones := [str(listener) for listener in found if listener.is_open_to_a_network]:
        return Point("bad", "inbound", f"the daemon's processes listen on {', '.join(open_ones)}: report this")
    return Point("good", "inbound", "nothing of the daemon listens but on 127.0.0.1")


def _certificate(what: str, path: Path) -> Point:
    days = days_left(read_certificate(path), datetime.now(UTC))
    if days < 0:
        return Point("bad", what, f"ran out {-days:.0f} days ago; ask the coordinator's operator for a new welcome")
    mark: Mark = "good" if days > SOON_DAYS else "warning"
    ask = "" if mark == "good" else "; ask the coordinator's operator for a new welcome before that"
    return Point(mark, what, f"holds for {days:.0f} more days{ask}")


def _coordinator(reached: Reached) -> Point:
    if reached.problem is None:
        return Point("good", "coordinator", f"{reached.address} answers, {reached.way}, and knows this site's key")
    detail = f" ({reached.detail})" if reached.detail else ""
    mark: Mark = "warning" if reached.problem in ("no_run", "failed") or reached.nobody_listens else "bad"
    return Point(mark, "coordinator", f"{reached.address}, asked {reached.way}: {PROBLEMS[reached.problem]}{detail}")


def _clock(ahead_s: float | None) -> Point:
    if ahead_s is None:
        return Point("warning", "clock", "the coordinator did not tell the time; keep this machine's by NTP")
    if -BEHIND_S < ahead_s < AHEAD_S:
        return Point("good", "clock", f"within {max(1.0, abs(ahead_s)):.0f} s of the coordinator's")
    side = "ahead of" if ahead_s > 0 else "behind"
    return Point(
        "bad", "clock", f"{abs(ahead_s):.0f} s {side} the coordinator's, which will refuse this site; set it by NTP"
    )


def _existing(folder: Path) -> Path:
    """The folder, or the next above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _size_gb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
