"""Answers on their way from a site to SuperLink: kept here until they are whole, and passed on only then.

SuperLink hands an answer to the ServerApp as soon as it is announced, and the ServerApp takes no other while it waits
for the parts: whoever sends theirs slowly keeps all others waiting. And of a part that it does not have, SuperLink
believes what it is announced to be made of, for whoever sends it later, the coordinator too. So a site announces its
answer to the front and sends it here; when each part is here, and is what its name, its sha256, and the announcement
say, the front does the same at SuperLink, within seconds and on loopback, in the site's name.

What is here lies on the disk, so that a front that is started again goes on with it.
"""

import asyncio
import hashlib
import logging
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx
from flwr.proto.fleet_pb2 import PushMessagesResponse, Reconnect
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_object_children_ids_from_object_content
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from server.front_answers import PUSH_MESSAGES, Answer, announced
from server.front_rules import Refused
from unimiss_core import durable

log = logging.getLogger(__name__)

PUSH_OBJECT = "/v1/fleet/push-object"
_GET_RUN = "/v1/fleet/get-run"
_RECONNECT_S = 5
"""As SuperLink says it; no SuperNode heeds it."""

Headers = Sequence[tuple[bytes, bytes]]
"""Of the site's request: its signature is over the time alone, and holds for five minutes."""


class NotTaken(Exception):  # noqa: N818 - SuperLink's word, not a fault
    """SuperLink takes no answer of this site's, or not of this run."""

    def __init__(self, word: httpx.Response) -> None:
        super().__init__(word.status_code)
        self.word = word


class NoRoom(Exception):  # noqa: N818 - of the disk
    """The part cannot be kept; the site tries again."""


class _Kept:
    """An answer, in `folder`: the file `answer` as it was announced, and a file for each part that came. session: by
    which the site sends them."""

    def __init__(self, folder: Path, answer: Answer, session: str) -> None:
        self.folder, self.answer, self.session = folder, answer, session
        self.here = {path.name for path in folder.iterdir()} & answer.objects.keys()
        self.passing: asyncio.Task[None] | None = None

    @classmethod
    def begun(cls, folder: Path, answer: Answer) -> "_Kept":
        """In place of the answer before. Raises OSError."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        session = secrets.token_hex(16)
        durable.write_bytes(folder / "answer", session.encode() + answer.body)
        return cls(folder, answer, session)

    @classmethod
    def found(cls, folder: Path, most: int) -> "_Kept | None":
        """What a front before this one kept."""
        with suppress(OSError, Refused):
            told = (folder / "answer").read_bytes()
            return cls(folder, announced(told[32:], most=most), told[:32].decode())
        return None

    @property
    def is_whole(self) -> bool:
        return self.here == self.answer.objects.keys()

    def keep(self, name: str, content: bytes) -> None:
        """Raises Refused: it is no part of this answer, or not the one that was announced. NoRoom."""
        if hashlib.sha256(content).hexdigest() != name or _parts_of(content) != self.answer.objects.get(name):
            raise Refused("forged")
        partial = self.folder / f"{name}{durable.PARTIAL}"
        try:
            partial.write_bytes(content)
            partial.replace(self.folder / name)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            log.warning("a part of an answer cannot be kept (%s)", error.strerror)
            raise NoRoom from None

    def content(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def drop(self) -> None:
        """SuperLink has it; the session is remembered, for a site that did not hear so."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _parts_of(content: bytes) -> frozenset[str] | None:
    """What Flower would look for to join it with; None where it is no object."""
    with suppress(ValueError):
        return frozenset(get_object_children_ids_from_object_content(content))
    return None


class Replies:
    """Of each site the one answer that is on its way: a SuperNode works on one message at a time.

    upstream: a client whose base is SuperLink. folder: with a folder for each site.
    """

    def __init__(self, upstream: httpx.AsyncClient, folder: Path, *, most_objects: int) -> None:
        self._upstream, self._folder, self._most = upstream, folder, most_objects
        self._kept: dict[str, _Kept] = {}

    async def announce(self, site: str, answer: Answer, headers: Headers) -> bytes:
        """What SuperLink would say: all of it is lacking. Raises NotTaken: of that run, or from that site, SuperLink
        takes nothing. NoRoom."""
        asked = GetRunRequest(node=Node(node_id=answer.node_id), run_id=answer.run_id)
        await self._ask(_GET_RUN, asked.SerializeToString(), headers)
        kept = self._of(site)
        if kept is None or kept.answer != answer or not kept.folder.exists():
            try:
                kept = await asyncio.to_thread(_Kept.begun, self._folder_of(site), answer)
            except OSError as error:
                log.warning("an answer cannot be kept (%s)", error.strerror)
                raise NoRoom from None
            self._kept[site] = kept
        told = PushMessagesResponse(
            reconnect=Reconnect(reconnect=_RECONNECT_S),
            results={answer.message_id: 0},
            objects_to_push=sorted(answer.objects),
            session_id=kept.session,
        )
        return bytes(told.SerializeToString())

    async def take(self, site: str, body: bytes, headers: Headers) -> bytes:
        """A part; with the last, SuperLink gets the whole first. Raises Refused, NoRoom, NotTaken, and httpx's errors,
        upon which the site sends the part again."""
        try:
            part = PushObjectRequest.FromString(body)
        except DecodeError:
            raise Refused("malformed") from None
        kept = self._of(site)
        if kept is None or kept.session != part.session_id:
            return bytes(PushObjectResponse(stored=False).SerializeToString())
        if part.object_id not in kept.here:
            await asyncio.to_thread(kept.keep, part.object_id, part.object_content)
            kept.here.add(part.object_id)
        if kept.is_whole:
            await self._passed_on(kept, headers)
        return bytes(PushObjectResponse(stored=True).SerializeToString())

    def _of(self, site: str) -> _Kept | None:
        if site not in self._kept and (found := _Kept.found(self._folder_of(site), self._most)):
            self._kept[site] = found
        return self._kept.get(site)

    def _folder_of(self, site: str) -> Path:
        return self._folder / site / "answer"

    async def _passed_on(self, kept: _Kept, headers: Headers) -> None:
        """Once, however many of the site's requests wait for it; again, where it failed."""
        if kept.passing is None or (kept.passing.done() and kept.passing.exception() is not None):
            kept.passing = asyncio.create_task(self._pass_on(kept, headers))
        await asyncio.shield(kept.passing)

    async def _pass_on(self, kept: _Kept, headers: Headers) -> None:
        answer = kept.answer
        told = PushMessagesResponse.FromString(await self._ask(PUSH_MESSAGES, answer.body, headers))
        for name in told.objects_to_push:  # none, where nobody waits for the answer any more
            part = PushObjectRequest(
                node=Node(node_id=answer.node_id),
                run_id=answer.run_id,
                session_id=told.session_id,
                object_id=name,
                object_content=await asyncio.to_thread(kept.content, name),
            )
            stored = PushObjectResponse.FromString(await self._ask(PUSH_OBJECT, part.SerializeToString(), headers))
            if not stored.stored:
                raise httpx.RemoteProtocolError("SuperLink does not keep a part that it lacks")
        await asyncio.to_thread(kept.drop)

    async def _ask(self, path: str, body: bytes, headers: Headers) -> bytes:
        """SuperLink's answer. Raises NotTaken, and httpx's errors."""
        others = [(name, value) for name, value in headers if name != b"content-length"]
        word = await self._upstream.post(path, content=body, headers=[*others, (b"content-length", b"%d" % len(body))])
        if word.status_code != httpx.codes.OK:
            raise NotTaken(word)
        return word.content
