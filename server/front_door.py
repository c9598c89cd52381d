"""Who comes in: TLS with a certificate of our authority, within ten seconds, and not too many at a time.

Connections are accepted here and not by a web server's own loop, so that a handshake that fails is known and told, and
so that those who have shown no certificate yet, of whom there may be thousands, share a small number of places.
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from server.front_rules import Reason
from server.refusals import Refusals
from server.server_config import FrontLimits
from unimiss_core.errors import where

log = logging.getLogger(__name__)

BACKLOG = 128
NO_DESCRIPTOR_PAUSE_S = 0.5


@dataclass(frozen=True)
class Caller:
    """A connection whose certificate our authority signed. certificate: DER."""

    host: str
    certificate: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Door:
    """Lets callers in to `talk`, each in a task of its own."""

    def __init__(
        self,
        tls: ssl.SSLContext,
        limits: FrontLimits,
        refusals: Refusals,
        talk: Callable[[Caller], Awaitable[None]],
    ) -> None:
        self._tls = tls
        self._limits = limits
        self._refusals = refusals
        self._talk = talk
        self._greeting: Counter[str] = Counter()
        """IP address -> connections that have not shown a certificate yet."""
        self._open: set[asyncio.Task[None]] = set()

    async def stand(self, listener: socket.socket) -> None:
        """Accept for ever. listener: bound, listening, not blocking."""
        while True:
            try:
                connection, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # a peer that is gone already, or no descriptor is left: then others must end first
                await asyncio.sleep(NO_DESCRIPTOR_PAUSE_S)
                continue
            host = str(address[0]).partition("%")[0]  # without the scope of a link-local address
            if self._is_full(host):
                connection.close()
                self._refusals.add("busy", host, is_stranger=True)
                continue
            task = asyncio.create_task(self._receive(connection, host))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def close(self, patience_s: float) -> None:
        """Let those that are in work finish for a while."""
        if self._open:
            await asyncio.wait(self._open, timeout=patience_s)
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _is_full(self, host: str) -> bool:
        return (
            len(self._open) >= self._limits.connections
            or self._greeting.total() >= self._limits.handshakes
            or self._greeting[host] >= self._limits.handshakes_of_address
        )

    async def _receive(self, connection: socket.socket, host: str) -> None:
        try:
            with self._counted(host):
                caller = await self._greet(connection, host)
        except OSError as error:  # ssl.SSLError is one, and what asyncio says of slow handshakes
            self._refusals.add(_reason_of(error), host, is_stranger=True)
            return
        try:
            await self._talk(caller)
            await self._hang_up(caller)
        except Exception as error:  # one peer's connection, whatever came over it, must not end the others'
            log.error("a connection ended by a fault of ours: %s", where(error))
        finally:
            caller.writer.transport.abort()

    async def _hang_up(self, caller: Caller) -> None:
        """Close when the last answer is with the caller, who may take its time over it."""
        caller.writer.close()
        with suppress(OSError):
            async with asyncio.timeout(self._limits.stall_s):
                await caller.writer.wait_closed()

    @contextmanager
    def _counted(self, host: str) -> Iterator[None]:
        self._greeting[host] += 1
        try:
            yield
        finally:
            self._greeting[host] -= 1
            if not self._greeting[host]:
                del self._greeting[host]

    async def _greet(self, connection: socket.socket, host: str) -> Caller:
        """The handshake. Raises OSError."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            connection,
            ssl=self._tls,
            ssl_handshake_timeout=self._limits.handshake_s,
            ssl_shutdown_timeout=self._limits.stall_s,
        )
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return Caller(host, certificate, reader, asyncio.StreamWriter(transport, protocol, reader, loop))


def _reason_of(error: OSError) -> Reason:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "stranger"
    if isinstance(error, ssl.SSLError) and error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "no_certificate"
    if isinstance(error, ConnectionAbortedError):  # asyncio: the handshake takes longer than it may
        return "slow"
    return "not_tls"
