"""The public side of a coordinator: a process between the sites' networks and Flower's SuperLink on loopback.

    python -m server.front --home FOLDER

site ──TLS, both sides with a certificate──▶ front ──TLS on 127.0.0.1──▶ SuperLink's Fleet API

front_door.py lets in who has a certificate of our authority, front_conversation.py speaks HTTP with them, and
front_rules.py says what may pass. The registry of sites is asked at every request, so that `unimiss-server revoke`
works at once, on connections that are open already, too. Ends at SIGTERM, after what is in work.
"""

import argparse
import asyncio
import logging
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from server.audit import coordinator_log
from server.front_conversation import Conversation, House
from server.front_door import BACKLOG, Caller, Door
from server.home import Home
from server.refusals import Note, Refusals
from server.registry import Registry
from server.server_config import FrontLimits, ServerConfig
from unimiss_core import durable, tether
from unimiss_core.certificates import identity
from unimiss_core.config import load
from unimiss_core.errors import ConfigError, UnimissError
from unimiss_core.tls import Shown, coordinator_side

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""For requests in work when the front is asked to end."""
WRITE_S = 5.0
"""Between two looks at what is to be noted or written."""


def upstream_client(port: int, authority: Path, limits: FrontLimits) -> httpx.AsyncClient:
    """Speaks to SuperLink on loopback and to nothing else: no proxy, no redirect, no headers of its own."""
    tls = ssl.create_default_context(cafile=str(authority))
    client = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{port}",
        verify=tls,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(limits.answer_s, connect=5.0),
        # SuperLink closes what was idle for 5 s; a connection is given up before, so that none is found closed.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
    )
    client.headers.clear()
    return client


Identify = Callable[[bytes], tuple[bytes, str]]
"""DER of a certificate that our authority signed -> PEM of its public key, name of its subject."""


class Front:
    """A door and the house behind it. status: the file that `unimiss-server status` reads. renew: called now and then,
    takes up another certificate where there is one."""

    def __init__(
        self,
        house: House,
        tls: ssl.SSLContext,
        identify: Identify,
        status: Path,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        self._house = house
        self._renew = renew
        self._identify = identify
        self._status = status
        self._door = Door(tls, house.limits, house.refusals, self._talk)

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Until `stop` is set. listener: as `bound_socket` gives it."""
        with self._house.refusals.told_in_background():
            async with asyncio.TaskGroup() as standing:
                tasks = [standing.create_task(self._door.stand(listener)), standing.create_task(self._keep_account())]
                await stop.wait()
                listener.close()
                for task in tasks:
                    task.cancel()
            await self._door.close(PATIENCE_S)
            self._house.refusals.tell_due(all_of_them=True)
            await self._write_status()

    async def _talk(self, caller: Caller) -> None:
        await Conversation(self._house, caller, *self._identify(caller.certificate)).hold()

    async def _keep_account(self) -> None:
        while True:
            self._house.refusals.tell_due()
            self._renew()
            await self._write_status()
            await asyncio.sleep(WRITE_S)

    async def _write_status(self) -> None:
        text = self._house.contacts.as_text(self._house.refusals.counts, self._house.now())
        try:
            await asyncio.to_thread(durable.write_text, self._status, text)  # a busy disk must not hold up sites
        except OSError as error:  # nor may a full one shut them out
            log.warning("%s cannot be written (%s)", self._status.name, error.strerror)


def bound_socket(host: str, port: int) -> socket.socket:
    """Listening, not blocking. Raises OSError: the port is taken, or not ours to take."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By its protocol asyncio knows that small answers must not wait to be sent together: they took 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def allow_descriptors(wanted: int) -> None:
    """Raise this process' limit of open files to `wanted`, as far as the system lets it; many begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


async def serve(home: Home, config: ServerConfig, note: Note) -> None:
    """The front of a coordinator's folder, until SIGTERM or SIGINT. Raises ConfigError: it cannot begin."""
    tls = coordinator_side(
        certificate=home.server_certificate, key=home.server_key, authority=home.authority_certificate
    )
    try:
        listener = bound_socket(config.host, config.port)
    except OSError as error:
        raise ConfigError(
            f"{home.server}: the public side cannot begin on {config.host} port {config.port} ({error.strerror})"
        ) from None
    allow_descriptors(4 * config.limits.connections)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with upstream_client(config.superlink_port, home.authority_certificate, config.limits) as upstream:
        house = House(Registry(home), upstream, config.limits, Refusals(note), home.passage)
        shown = Shown(tls, home.server_certificate, home.server_key)
        await Front(house, tls, identity, home.front_status, shown.renew).run(listener, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m server.front", description="The public side of a coordinator.")
    parser.add_argument("--home", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would write a line for each request
    try:
        home = Home.chosen(options.home)
        asyncio.run(serve(home, load(ServerConfig, home.server), coordinator_log(home.audit).record))
    except UnimissError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    tether.watch()
    sys.exit(main())
