"""Certificates that run out: told long before, and never the cause of a silence."""

import asyncio
import re
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server import superlink
from server.approval import approve, renew
from server.expiry import ending_soon
from server.founding import found
from server.front import Front, bound_socket
from server.home import Home
from server.run_command import run
from server.running import status
from tests.coordinator_home import server_certificate_ends, write_study
from tests.front_peers import Authority, identified, running_front
from unimiss_core import keys
from unimiss_core.errors import ConfigError

NOW = datetime.now(UTC)
UNIT = Path(__file__).parents[1] / "deploy" / "unimiss-server@.service"


def made(path: Path, *, authority: float = 3000.0, server: float = 700.0, **sites: float) -> Home:
    """A coordinator's folder. Numbers: days from NOW to the end of a certificate; sites: approved, with such ones."""
    home = found(path / "home", "localhost:9443", now=NOW + timedelta(days=authority - 3650))
    home.coordinator.write_text("min_sites: 1\n")
    for name, left in sites.items():
        file = path / f"{name}.pub"
        file.write_text(keys.public_line(keys.new_site_key().public_key(), name) + "\n")
        approve(home, name, file, now=NOW + timedelta(days=left - 730))
    server_certificate_ends(home, NOW + timedelta(days=server))
    return home


def told(home: Home) -> list[str]:
    return list(ending_soon(home, now=NOW))


def test_nothing_is_said_while_all_last(tmp_path: Path) -> None:
    assert told(made(tmp_path, authority=181, server=31, alpha=31)) == []


def test_what_ends_soon_is_named_with_its_days_and_what_to_do(tmp_path: Path) -> None:
    home = made(tmp_path, authority=179.5, server=12.5, alpha=1.5, beta=-3.5, gamma=31, delta=0.5)
    authority, server, sites = told(home)
    assert "the authority's certificate lasts 179 days" in authority
    assert "unimiss-server init" in authority
    assert "the server's certificate lasts 12 days" in server
    assert "unimiss-server renew" in server
    assert "alpha lasts 1 day, beta has run out 3 days ago, delta lasts less than a day:" in sites
    assert "unimiss-server renew" in sites
    assert "gamma" not in sites
    assert {authority, server, sites} <= set(status(home, at_work=False, now=NOW))
    renew(home, now=NOW)
    assert told(home) == [authority]


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    home = made(tmp_path, server=12.5, alpha=1.5)
    home.server_certificate.write_text("")
    (line,) = told(home)
    assert "alpha" in line


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ({"server": -3.5}, r"server\.crt: has run out 3 days ago; `unimiss-server renew`"),
        ({"server": -0.1}, r"server\.crt: has run out; `unimiss-server renew`"),
        (
            {"authority": -0.5, "server": -0.5, "alpha": -0.5},
            r"authority\.crt: has run out; make a new .* `unimiss-server init`",
        ),
    ],
)
def test_none_is_begun_behind_one_that_has_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, float], says: str
) -> None:
    """And the unit does not try again for ever what only a person can mend."""
    monkeypatch.setattr(superlink, "prepare", lambda *_: pytest.fail("it was begun"))
    home = made(tmp_path, **{"alpha": 100.0, **ends})
    with pytest.raises(ConfigError, match=says) as error:
        run(home, write_study(tmp_path / "study.yaml"))
    stays_down = re.search(r"^RestartPreventExitStatus=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert stays_down is not None
    assert str(error.value.exit_code) in stays_down[1].split()


def test_the_front_looks_for_a_renewed_certificate_while_it_stands(tmp_path: Path) -> None:
    async def stand() -> None:
        looked, stop = asyncio.Event(), asyncio.Event()
        async with running_front(tmp_path, Authority(tmp_path)) as running:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            front = Front(running.house, tls, identified, tmp_path / "status.json", looked.set)
            standing = asyncio.create_task(front.run(bound_socket("127.0.0.1", 0), stop))
            try:
                await asyncio.wait_for(looked.wait(), 10)
            finally:
                stop.set()
                await standing

    asyncio.run(stand())
