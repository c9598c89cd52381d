"""`unimiss-site leave`: stop the daemon and destroy the keys, by which nothing can take part under this site's name.

What stays is what the hospital answers for: the ledger, because what patients have cost is not undone by leaving, and
would count from zero again in the next study; and the audit log, which says what has left. The scans' cache, what
was learned and patient_secret stay, too, in the state folder: they may be deleted, and are nobody else's.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from client.daemon import is_running
from client.health import read_health
from client.home import Home
from client.site_config import SiteConfig
from client.supervision import Note
from unimiss_core.errors import ConfigError

PATIENCE_S = 60.0
"""For a daemon that was asked to stop: it signs off at the coordinator, and ends what trains."""
START_S = 10.0
"""For a daemon that has just begun, until it has written which process it is."""
LOOK_S = 0.2


def leave(home: Home, site: SiteConfig, note: Note) -> None:
    """Raises ConfigError: the daemon does not end, or the keys cannot be removed."""
    stop(site.state)
    note("leave", {"site": site.name})
    try:
        for path in (home.private_key, home.tls_key, home.certificate, home.welcome):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{home.keys}: cannot be removed ({error.strerror}); do so by hand") from None


def stop(state: Path, sleep: Callable[[float], None] = time.sleep) -> bool:
    """End the daemon of this state folder; False where none ran. Raises ConfigError: it does not end, or does not say
    which process it is."""
    if not is_running(state):
        return False
    _wait(lambda: read_health(state) is not None or not is_running(state), START_S, sleep)
    if (health := read_health(state)) is None:
        if is_running(state):
            raise ConfigError(
                "a daemon runs, and has not written which process it is: its disk may be full. Stop it where it was "
                "started, or: systemctl stop unimiss-site"
            )
        return False
    try:
        os.kill(health.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise ConfigError(
            "the daemon runs as another user; stop it as that user, or: systemctl stop unimiss-site"
        ) from None
    if not _wait(lambda: not is_running(state), PATIENCE_S, sleep):
        raise ConfigError(f"the daemon (process {health.pid}) did not end in {PATIENCE_S:.0f} s; see its log")
    return True


def _wait(condition: Callable[[], bool], longest_s: float, sleep: Callable[[float], None]) -> bool:
    """Whether it came true."""
    waited = 0.0
    while not (is_true := condition()) and waited < longest_s:
        sleep(LOOK_S)
        waited += LOOK_S
    return is_true
