"""HTTP with one caller: requests are read, held against the rules, and passed on piece by piece, and so are answers."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import h11
import httpx

from server.contacts import Contacts
from server.front_answers import PUSH_MESSAGES, announced
from server.front_door import Caller
from server.front_given import CONFIRM, PULL_MESSAGES, PULL_OBJECT, Given
from server.front_replies import PUSH_OBJECT, NoRoom, NotTaken, Replies
from server.front_rules import (
    ANSWER_HEADERS,
    FAILED,
    HEAD_BYTES,
    MEDIA_TYPE,
    NOT_TAKEN,
    STATUS,
    Passage,
    Reason,
    Refused,
    Registry,
    clock_ahead_s,
    passage,
    site_of,
)
from server.front_shares import OBJECT_BYTES, Allowance, counted
from server.refusals import Refusals
from server.server_config import FrontLimits

PIECE = 1 << 16
LINGER_S = 2.0
"""How long what a refused caller still sends is thrown away: closed upon at once, it would never read why."""


class Gone(Exception):  # noqa: N818 - of a peer
    """The caller is not there any more."""


class Broken(Exception):  # noqa: N818 - of a connection
    """An answer that had begun cannot be ended."""


@dataclass
class House:
    """What all conversations share. upstream: a client whose base is SuperLink. folder: of what sites are given, and
    of what is on its way from them."""

    registry: Registry
    upstream: httpx.AsyncClient
    limits: FrontLimits
    refusals: Refusals
    folder: Path
    contacts: Contacts = field(default_factory=Contacts)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    connections: Counter[bytes] = field(default_factory=Counter)
    """Key -> open connections."""
    requests: Counter[str] = field(default_factory=Counter)
    """Site -> requests in work."""
    allowance: Allowance = field(init=False)
    given: Given = field(init=False)
    replies: Replies = field(init=False)

    def __post_init__(self) -> None:
        self.allowance = Allowance(self.limits.site_gb_per_hour * 1e9)
        self.given = Given(self.folder)
        self.replies = Replies(self.upstream, self.folder, most_objects=self.limits.objects_of_answer)


class Conversation:
    """One connection from its first request to its end.

    key, name: of the caller's certificate; the key as PEM, the name as its subject.
    """

    def __init__(self, house: House, caller: Caller, key: bytes, name: str) -> None:
        self._house = house
        self._limits = house.limits
        self._caller = caller
        self._key = key
        self._name = name
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._ends_at = time.monotonic() + house.limits.connection_s

    async def hold(self) -> None:
        """Returns when either side has ended it, or when it was refused."""
        try:
            with counted(self._house.connections, self._key, self._limits.connections_of_site):
                while time.monotonic() < self._ends_at and (request := await self._next_request()) is not None:
                    await self._answer(request)
                    if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                        break
                    self._http.start_next_cycle()
        except Refused as refused:
            await self._refuse(refused.reason)
        except (Gone, Broken):
            self._caller.writer.transport.abort()  # half an answer must not look like a whole one

    async def _answer(self, request: h11.Request) -> None:
        site = site_of(self._key, self._house.registry)
        passed = passage(
            request.method,
            request.target,
            request.http_version,
            list(request.headers),
            key=self._key,
            most=self._limits,
        )
        self._house.allowance.take(site, passed.length)
        now = self._house.now()
        self._house.contacts.heard(site, now, clock_ahead_s(passed, now))
        with counted(self._house.requests, site, self._limits.requests_of_site):
            try:
                async with asyncio.timeout(self._limits.body_s + self._limits.answer_s):
                    await self._serve(site, passed)
            except TimeoutError:
                raise Refused("slow") from None

    async def _serve(self, site: str, passed: Passage) -> None:
        try:
            await self._as_its_kind_asks(site, passed)
        except NoRoom:
            await self._say(503, "coordinator_full")
        except NotTaken as not_taken:
            await self._return(not_taken.word)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            await self._say(503, "coordinator_down")
        except httpx.ReadTimeout:
            await self._say(504, "coordinator_slow")
        except httpx.TransportError:
            await self._say(502, "coordinator_down")

    async def _as_its_kind_asks(self, site: str, passed: Passage) -> None:
        """Raises Refused, Gone, Broken, NoRoom, NotTaken, and httpx's errors."""
        house, path = self._house, passed.path
        if path == PUSH_MESSAGES:
            answer = announced(await self._whole_body(), most=self._limits.objects_of_answer)
            house.allowance.take(site, len(answer.objects) * OBJECT_BYTES)
            await self._reply(await house.replies.announce(site, answer, passed.headers))
        elif path == PUSH_OBJECT:
            await self._reply(await house.replies.take(site, await self._whole_body(), passed.headers))
        elif path in (PULL_OBJECT, CONFIRM):
            house.given.require(site, path, body := await self._whole_body())
            await self._pass_on(site, passed, body)
        else:
            await self._pass_on(site, passed, self._body())

    async def _pass_on(self, site: str, passed: Passage, body: bytes | AsyncIterator[bytes]) -> None:
        upstream = self._house.upstream
        request = upstream.build_request("POST", passed.path, headers=passed.headers, content=body)
        answer = await upstream.send(request, stream=True)
        try:
            if passed.path == PULL_MESSAGES and answer.is_success and (content := await answer.aread()):
                await asyncio.to_thread(self._house.given.note, site, content)
            await self._return(answer)
        finally:
            await answer.aclose()

    async def _reply(self, content: bytes) -> None:
        """As SuperLink would answer."""
        headers = [(b"content-type", MEDIA_TYPE), (b"content-length", b"%d" % len(content))]
        await self._return(httpx.Response(200, headers=headers, content=content))

    async def _return(self, answer: httpx.Response) -> None:
        if answer.status_code == FAILED:
            answer = httpx.Response(503, json={"detail": "coordinator_failed"})
        if answer.status_code in NOT_TAKEN:
            self._house.refusals.add("not_taken", self._name)
        headers = [(name, value) for name, value in answer.headers.raw if name.lower() in ANSWER_HEADERS]
        await self._send(h11.Response(status_code=answer.status_code, headers=[*headers, self._date()]))
        pieces = answer.aiter_bytes(PIECE) if answer.is_stream_consumed else answer.aiter_raw(PIECE)
        try:
            async for piece in pieces:
                await self._send(h11.Data(data=piece))
            await self._send(h11.EndOfMessage())
        except (httpx.TransportError, h11.LocalProtocolError):
            raise Broken from None

    async def _body(self) -> AsyncIterator[bytes]:
        """The request's body as it comes. Raises Refused, Gone."""
        while isinstance(event := await self._event(self._limits.stall_s), h11.Data):
            yield bytes(event.data)

    async def _whole_body(self) -> bytes:
        """Raises as `_body`."""
        return b"".join([piece async for piece in self._body()])

    async def _next_request(self) -> h11.Request | None:
        """None where the caller has closed, or asked nothing for long."""
        event = self._parsed()
        if event is h11.NEED_DATA:
            try:
                await self._read(self._limits.idle_s)
            except (Refused, Gone):
                return None
        try:
            async with asyncio.timeout(self._limits.head_s):
                event = await self._event(self._limits.head_s) if event is h11.NEED_DATA else event
        except TimeoutError:
            raise Refused("slow") from None
        return event if isinstance(event, h11.Request) else None

    async def _event(self, stall_s: float) -> h11.Event:
        while (event := self._parsed()) is h11.NEED_DATA:
            await self._read(stall_s)
        if event is h11.PAUSED:
            raise Broken
        return event  # type: ignore[return-value]  # mypy does not narrow by h11's marks

    def _parsed(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError:
            raise Refused("malformed") from None

    async def _read(self, stall_s: float) -> None:
        """Give h11 what comes next. Raises Refused (slow), Gone."""
        try:
            async with asyncio.timeout(stall_s):
                piece = await self._caller.reader.read(PIECE)
        except TimeoutError:
            raise Refused("slow") from None
        except OSError:
            raise Gone from None
        if not piece:
            raise Gone
        self._http.receive_data(piece)

    async def _send(self, event: h11.Event) -> None:
        """Raises Gone: the caller is, or takes too long over what it gets."""
        writer = self._caller.writer
        try:
            if payload := self._http.send(event):
                writer.write(payload)
            async with asyncio.timeout(self._limits.stall_s):
                await writer.drain()
        except OSError:  # TimeoutError among them
            raise Gone from None

    async def _refuse(self, reason: Reason) -> None:
        """Say why, where HTTP still allows it, and end."""
        self._house.refusals.add(reason, self._name)
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with suppress(Gone, h11.LocalProtocolError):
                await self._say(STATUS[reason], reason)

    async def _say(self, status: int, reason: str) -> None:
        """Answer by ourselves, and close: of the request's body, more may be on its way."""
        body = json.dumps({"detail": reason}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            self._date(),
        ]
        await self._send(h11.Response(status_code=status, headers=headers))
        await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())
        await self._linger()

    def _date(self) -> tuple[bytes, bytes]:
        """By which a site's `check` sees how its clock goes."""
        return b"date", format_datetime(self._house.now(), usegmt=True).encode()

    async def _linger(self) -> None:
        with suppress(OSError):
            async with asyncio.timeout(LINGER_S):
                while await self._caller.reader.read(PIECE):
                    pass
