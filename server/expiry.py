"""When the certificates of a coordinator's folder run out: told long before, and none is begun or gone on with after.

All that speak with SuperLink, `run` itself among them, know it by the server's certificate: once that has run out, each
of them only hears nothing. So it is looked at here, by its date.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

from server.approval import ANOTHER_FOLDER, days_left
from server.home import Home
from server.registry import Registry
from server.wording import counted
from unimiss_core import certificates
from unimiss_core.errors import ConfigError

TOLD_DAYS = 30
"""Before the end of the server's certificate, or a site's."""
AUTHORITY_TOLD_DAYS = 180
"""Before the authority's: every site must then join anew."""


class RunOut(ConfigError):  # noqa: N818 - what a certificate does
    """Nothing can speak with SuperLink until there is another certificate."""

    def __init__(self, message: str, *, resumes: bool) -> None:
        super().__init__(message)
        self.resumes = resumes


def require_lasting(home: Home, *, now: datetime) -> None:
    """Raises RunOut: the server's certificate or the authority's has run out. ConfigError: one cannot be read."""
    if (left := _of_authority(home, now)) <= 0:
        raise RunOut(f"{home.authority_certificate}: {_since(left)}; {ANOTHER_FOLDER}", resumes=False)
    if (left := _of_server(home, now)) <= 0:
        raise RunOut(f"{home.server_certificate}: {_since(left)}; `unimiss-server renew` makes another", resumes=True)


def ending_soon(home: Home, *, now: datetime) -> Iterator[str]:
    """Lines of certificates that run out soon, or have: which, when, and what to do. None of a file that cannot be
    read: `run` and `unimiss-server sites` say so."""
    for lines in (_authority_line, _server_line, _sites_line):
        with suppress(ConfigError):
            yield from lines(home, now)


def _authority_line(home: Home, now: datetime) -> Iterator[str]:
    if (left := _of_authority(home, now)) < AUTHORITY_TOLD_DAYS:
        yield f"the authority's certificate {_when(left)}: {ANOTHER_FOLDER}"


def _server_line(home: Home, now: datetime) -> Iterator[str]:
    if (left := _of_server(home, now)) < TOLD_DAYS:
        yield f"the server's certificate {_when(left)}: unimiss-server renew; with a run at work then stop and run it"


def _sites_line(home: Home, now: datetime) -> Iterator[str]:
    """One line for all: they were approved in one week, and end in one."""
    ending = []
    for site in Registry(home).approved():
        with suppress(ConfigError):  # its welcome is gone: `sites` says so
            if (left := days_left(home, site.name, now)) < TOLD_DAYS:
                ending.append(f"{site.name} {_when(left)}")
    if ending:
        yield f"certificates of sites: {', '.join(ending)}: unimiss-server renew, and they join their new welcome"


def _of_authority(home: Home, now: datetime) -> float:
    return certificates.days_left(certificates.read_certificate(home.authority_certificate), now)


def _of_server(home: Home, now: datetime) -> float:
    return certificates.days_left(certificates.read_certificate(home.server_certificate), now)


def _since(left: float) -> str:
    return f"has run out {counted(int(-left), 'day')} ago" if left <= -1 else "has run out"


def _when(left: float) -> str:
    if left <= 0:
        return _since(left)
    return f"lasts {counted(int(left), 'day')}" if left >= 1 else "lasts less than a day"
