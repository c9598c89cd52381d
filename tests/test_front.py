"""The public side against peers of every kind: what the fleet needs passes byte for byte, all else ends at the door."""

import asyncio
import hashlib
import json
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import front_conversation
from server.contacts import Contacts
from server.front_rules import STATUS
from tests.front_peers import (
    NOW,
    ODD,
    Authority,
    Identity,
    Running,
    StubSuperLink,
    answer_body,
    request,
    running_front,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def site(authority: Authority) -> Identity:
    return authority.issue("alpha")


@pytest.fixture(scope="module")
def other(authority: Authority) -> Identity:
    return authority.issue("beta")


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_conversation, "LINGER_S", 0.1)


Talk = Callable[[Running], Awaitable[None]]


@pytest.fixture
def talk(tmp_path: Path, authority: Authority, site: Identity, other: Identity) -> Callable[..., None]:
    """Runs a conversation with a front that has approved both sites."""

    def run(conversation: Talk, *, link: StubSuperLink | None, **limits: float) -> None:
        async def conversed() -> None:
            async with running_front(tmp_path, authority, link=link, **limits) as front:
                front.approved.sites.update({site.pem: site.name, other.pem: other.name})
                await conversation(front)

        asyncio.run(asyncio.wait_for(conversed(), 60))

    return run


def refused(front: Running) -> list[tuple[object, object]]:
    return [(line["reason"], line["peer"]) for line in front.noted]


def test_every_listed_request_passes_on_one_connection(talk: Callable[..., None], site: Identity) -> None:
    """Those that the front itself answers, or holds against what was given: tests/test_front_replies.py."""
    link = StubSuperLink()
    names = ("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "get-run", "get-fab")

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        paths = [b"/v1/fleet/" + name.encode() for name in names]
        for path in paths:
            assert await call.ask(request(site, path=path, body=path)) == (200, b"ok")
        assert [head.split()[1] for head in link.heads] == paths
        assert link.bodies == paths

    talk(conversation, link=link)


def test_large_bodies_pass_both_ways_byte_for_byte(talk: Callable[..., None], site: Identity) -> None:
    up, down = os.urandom(999_007), os.urandom(6_000_011)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: %d\r\n\r\n" % len(down)
    link = StubSuperLink(answer=head + down)

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        status, got = await call.ask(request(site, path=b"/v1/fleet/get-fab", body=up))
        assert status == 200
        assert hashlib.sha256(got).digest() == hashlib.sha256(down).digest()
        assert hashlib.sha256(link.bodies[0]).digest() == hashlib.sha256(up).digest()

    talk(conversation, link=link)


def test_the_last_answer_is_whole_before_the_connection_closes(talk: Callable[..., None], site: Identity) -> None:
    down = os.urandom(6_000_017)
    link = StubSuperLink(answer=b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(down) + down)

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        call.writer.write(request(site, extra=b"connection: close\r\n"))
        got = bytearray()
        while piece := await call.reader.read(1 << 18):
            got += piece
            await asyncio.sleep(0.02)  # slower than it comes: much of the answer waits in the front until it is taken
        assert bytes(got[-len(down) :]) == down

    talk(conversation, link=link)


def test_only_known_headers_go_on(talk: Callable[..., None], site: Identity) -> None:
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        extra = b"x: a\nflwr-task-token: stolen\r\nx-forwarded-for: 10.0.0.1\r\nflwr-superexec-ts: 1\r\ncookie: a=b\r\n"
        call = await front.connect(site)
        assert (await call.ask(request(site, extra=extra + b"flwr-package-version: 1.41.0\r\n")))[0] == 200
        names = {line.split(b":")[0].lower() for line in link.heads[0].split(b"\r\n")[1:] if line}
        assert names == {
            *(b"host", b"content-type", b"accept", b"content-length", b"flwr-public-key", b"flwr-timestamp"),
            *(b"flwr-signature", b"flwr-package-version"),
        }

    talk(conversation, link=link)


@pytest.mark.parametrize("odd", ODD)
def test_nothing_else_reaches_the_superlink(odd: str, talk: Callable[..., None], site: Identity) -> None:
    changed, status = ODD[odd]
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        assert (await call.ask(request(site, **changed)))[0] == status  # type: ignore[arg-type]
        assert await call.is_closed()
        assert link.heads == []
        assert [peer for _, peer in refused(front)] == ["alpha"]
        assert sum(front.house.refusals.counts.values()) == 1

    talk(conversation, link=link)


def test_a_second_request_hidden_in_the_first_is_judged_by_itself(talk: Callable[..., None], site: Identity) -> None:
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        hidden = request(site, path=b"/v1/control/start-run")
        call = await front.connect(site)
        assert (await call.ask(request(site, body=b"first") + hidden))[0] == 200
        assert (await call.answer())[0] == 403
        assert link.bodies == [b"first"]

    talk(conversation, link=link)


def test_a_key_header_of_another_site_is_refused(talk: Callable[..., None], site: Identity, other: Identity) -> None:
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        assert await (await front.connect(site)).ask(request(other)) == (401, b'{"detail": "wrong_key"}')
        assert refused(front) == [("wrong_key", "alpha")]
        assert link.heads == []

    talk(conversation, link=link)


def test_a_revoked_site_is_out_at_once_on_its_live_connection(talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        assert (await call.ask(request(site)))[0] == 200
        del front.approved.sites[site.pem]
        assert await call.ask(request(site)) == (401, b'{"detail": "not_approved"}')
        assert await call.is_closed()
        assert (await (await front.connect(site)).ask(request(site)))[0] == 401
        assert refused(front) == [("not_approved", "alpha")]  # the second is counted, and told within the minute
        assert front.house.refusals.counts == {"not_approved": 2}

    talk(conversation, link=StubSuperLink())


async def _handshake_fails(front: Running, context: ssl.SSLContext) -> None:
    """TLS 1.3 tells a client at its first read that its certificate was refused."""

    async def ask() -> None:
        call = await front.dial(context)
        call.writer.write(b"POST /v1/fleet/get-run HTTP/1.1\r\nhost: x\r\n\r\n")
        await call.reader.readexactly(1)

    with pytest.raises((OSError, asyncio.IncompleteReadError)):  # ssl.SSLError is an OSError
        await ask()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_has_no_certificate_of_ours_gets_no_answer(
    version: ssl.TLSVersion, tmp_path: Path, talk: Callable[..., None], authority: Authority
) -> None:
    stranger = Authority(tmp_path / "strangers").issue("alpha")  # by the name of a site
    expired = authority.issue("late", ends=NOW - timedelta(days=1))
    as_server = authority.issue("disguised", server=True)

    async def conversation(front: Running) -> None:
        for identity, reason in (
            (None, "no_certificate"),
            (stranger, "stranger"),
            (expired, "stranger"),
            (as_server, "stranger"),
        ):
            context = ssl.create_default_context(cafile=str(authority.file))
            context.minimum_version = context.maximum_version = version
            if identity is not None:
                context.load_cert_chain(identity.certificate, identity.private)
            before = front.house.refusals.counts.get(reason, 0)
            await _handshake_fails(front, context)
            await _until(lambda reason=reason, before=before: front.house.refusals.counts.get(reason, 0) == before + 1)  # type: ignore[misc]
        assert set(refused(front)) == {("no_certificate", "127.0.0.1"), ("stranger", "127.0.0.1")}

    talk(conversation, link=StubSuperLink())


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_plain_http_and_old_tls_are_refused(talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        plain = await front.dial(None)
        plain.writer.write(request(site))
        assert await plain.is_closed()
        old = site.tls()
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        await _handshake_fails(front, old)
        await _until(lambda: front.house.refusals.counts == {"not_tls": 2})

    talk(conversation, link=StubSuperLink())


def test_slow_peers_are_cut_off(talk: Callable[..., None], site: Identity) -> None:
    """In the handshake, in the headers, in the body; who merely has nothing to ask is closed without a word."""

    async def conversation(front: Running) -> None:
        await front.dial(None)
        whole = request(site, body=b"x" * 1000)
        for part in (whole[:40], whole[:-500]):
            assert (await (await front.connect(site)).ask(part))[0] == 408
        assert await (await front.connect(site)).is_closed()
        await _until(lambda: front.house.refusals.counts == {"slow": 3})

    limits = {"handshake_s": 2.0, "head_s": 0.4, "stall_s": 0.4, "idle_s": 0.8}
    talk(conversation, link=StubSuperLink(), **limits)


def test_a_byte_now_and_then_does_not_hold_a_connection(talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        dripping = await front.connect(site)

        async def drip() -> None:
            for byte in request(site):
                dripping.writer.write(bytes([byte]))
                await asyncio.sleep(0.05)

        task = asyncio.create_task(drip())
        assert (await dripping.answer())[0] == 408
        task.cancel()

    talk(conversation, link=StubSuperLink(), head_s=0.5, stall_s=5.0)


def test_too_many_strangers_take_no_place_from_sites(talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        for _ in range(6):
            await front.dial(None)
        await _until(lambda: front.house.refusals.counts == {"busy": 4})
        await front.hang_up()
        await _until(lambda: front.house.refusals.counts.get("not_tls") == 2)
        assert (await (await front.connect(site)).ask(request(site)))[0] == 200

    talk(conversation, link=StubSuperLink(), handshakes=2)


def test_a_site_takes_no_more_than_its_share(talk: Callable[..., None], site: Identity, other: Identity) -> None:
    async def conversation(front: Running) -> None:
        calls = [await front.connect(site) for _ in range(4)]
        answers = await asyncio.gather(*(call.ask(request(site)) for call in calls))
        assert sorted(status for status, _ in answers) == [
            200,
            200,
            503,
            503,
        ]  # one for its connection, one for its request
        assert (await (await front.connect(other)).ask(request(other)))[0] == 200

    talk(conversation, link=StubSuperLink(slow_s=0.5), connections_of_site=3, requests_of_site=2)


def test_what_is_above_its_share_is_not_passed_on(talk: Callable[..., None], site: Identity) -> None:
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        assert (await call.ask(request(site, body=b"x" * 60)))[0] == 200
        assert (await call.ask(request(site, body=b"x" * 60)))[0] == 503
        assert len(link.bodies) == 1

    talk(conversation, link=link, site_gb_per_hour=1e-7)


def test_a_superlink_that_is_down_is_told_as_such(talk: Callable[..., None], site: Identity) -> None:
    """503, at which a SuperNode goes on trying."""

    async def conversation(front: Running) -> None:
        for _ in range(2):
            assert await (await front.connect(site)).ask(request(site)) == (503, b'{"detail": "coordinator_down"}')
        assert front.noted == []

    talk(conversation, link=None)


@pytest.mark.parametrize(
    ("answer", "status"),
    [(b"", 502), (b"HTTP/1.1 999", 502), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", 0)],
    ids=["closed", "no HTTP", "cut off"],
)
def test_a_superlink_that_breaks_off_breaks_off_no_more(
    answer: bytes, status: int, talk: Callable[..., None], site: Identity
) -> None:
    class Broken(StubSuperLink):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        if status:
            assert (await call.ask(request(site, path=b"/v1/fleet/get-run")))[0] == status
        else:
            with pytest.raises(asyncio.IncompleteReadError):
                await call.ask(request(site, path=b"/v1/fleet/get-run"))

    talk(conversation, link=Broken())


NOT_OWN_ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "a question to the ServerApp": ({"src": 1, "dst": 1, "reply_to": ""}, "forged"),
    "a question to another site": ({"src": 1, "dst": 99, "reply_to": ""}, "forged"),
    "an answer in another site's name": ({"src": 99}, "forged"),
    "an answer for another site": ({"dst": 99}, "forged"),
    "an answer to nothing": ({"reply_to": ""}, "forged"),
    "an answer under another message's number": ({"tree": "c" * 64}, "forged"),
    "more objects than a model has pieces": ({"objects": 257}, "length"),
}


@pytest.mark.parametrize("odd", NOT_OWN_ANSWERS)
def test_a_site_can_push_nothing_but_its_own_answers(odd: str, talk: Callable[..., None], site: Identity) -> None:
    link = StubSuperLink()
    changed, reason = NOT_OWN_ANSWERS[odd]

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        body = answer_body(**changed)
        status, told = await call.ask(request(site, path=b"/v1/fleet/push-messages", body=body))
        assert (status, told) == (STATUS[reason], b'{"detail": "%s"}' % reason.encode())  # type: ignore[index]
        assert not link.bodies
        assert refused(front) == [(reason, "alpha")]

    talk(conversation, link=link)


@pytest.mark.parametrize("body", [b"", b"\xff", answer_body() * 2], ids=["nothing", "no message", "two answers"])
def test_what_is_no_single_answer_is_not_pushed(body: bytes, talk: Callable[..., None], site: Identity) -> None:
    """Two of Flower's messages end to end read as one that holds both lists."""
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        assert (await call.ask(request(site, path=b"/v1/fleet/push-messages", body=body)))[0] == 400
        assert not link.bodies

    talk(conversation, link=link)


def test_objects_that_are_announced_count_against_a_sites_share(talk: Callable[..., None], site: Identity) -> None:
    link = StubSuperLink()

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        for status in (200, 200, 503):  # 20 MB each, of 50
            body = answer_body(objects=20)
            assert (await call.ask(request(site, path=b"/v1/fleet/push-messages", body=body)))[0] == status

    talk(conversation, link=link, site_gb_per_hour=0.05)


def test_errors_of_the_superlink_pass_as_they_are(talk: Callable[..., None], site: Identity) -> None:
    answer = b"HTTP/1.1 401 Unauthorized\r\ncontent-type: application/json\r\nserver: x\r\ncontent-length: 2\r\n\r\n{}"

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        assert await call.ask(request(site)) == (401, b"{}")
        assert refused(front) == [("not_taken", "alpha")]

    talk(conversation, link=StubSuperLink(answer=answer))


def test_a_superlink_that_fails_is_no_fault_of_the_site(talk: Callable[..., None], site: Identity) -> None:
    """A full disk there, or a locked database: a SuperNode ends at 500, and tries again at 503."""
    link = StubSuperLink(answer=b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}")

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        status, body = await call.ask(request(site, path=b"/v1/fleet/send-node-heartbeat"))
        assert (status, json.loads(body)) == (503, {"detail": "coordinator_failed"})
        assert refused(front) == []

    talk(conversation, link=link)


def test_flowers_own_way_of_asking_passes(talk: Callable[..., None], site: Identity) -> None:
    """httpx, as Flower's client uses it."""

    async def conversation(front: Running) -> None:
        def ask() -> httpx.Response:
            with httpx.Client(verify=site.tls(), trust_env=False) as client:
                head = dict(line.split(b": ") for line in request(site).split(b"\r\n\r\n")[0].split(b"\r\n")[2:])
                del head[b"content-length"]
                return client.post(
                    f"https://localhost:{front.port}/v1/fleet/get-run", content=b"x" * 900_000, headers=head
                )

        answer = await asyncio.to_thread(ask)
        assert (answer.status_code, answer.content) == (200, b"ok")

    talk(conversation, link=StubSuperLink())


def test_clocks_are_kept_account_of(tmp_path: Path, talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        behind = (front.house.now() - timedelta(seconds=400)).isoformat().encode()
        assert (await call.ask(request(site, flwr_timestamp=behind)))[0] == 200  # SuperLink is who refuses it

    talk(conversation, link=StubSuperLink())
    contacts, _ = Contacts.read(tmp_path / "front.json")
    assert contacts.sites["alpha"].clock_ahead_s == pytest.approx(-400, abs=5)
    assert contacts.sites["alpha"].clock_is_wrong


@pytest.mark.parametrize("link", [StubSuperLink(), None], ids=["passed on", "down"])
def test_every_answer_tells_the_time(link: StubSuperLink | None, talk: Callable[..., None], site: Identity) -> None:
    """A site's `check` compares its clock with it."""

    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        call.writer.write(request(site))
        head = await call.reader.readuntil(b"\r\n\r\n")
        (told,) = (line[6:].decode() for line in head.split(b"\r\n") if line.lower().startswith(b"date: "))
        assert abs((parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()) < 30

    talk(conversation, link=link)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def test_small_answers_are_sent_at_once(talk: Callable[..., None], site: Identity) -> None:
    async def conversation(front: Running) -> None:
        call = await front.connect(site)
        took = []
        for _ in range(20):
            began = time.perf_counter()
            await call.ask(request(site))
            took.append(time.perf_counter() - began)
        assert min(took) < 0.03

    talk(conversation, link=StubSuperLink())


def test_nobody_else_can_take_the_port(talk: Callable[..., None]) -> None:
    async def conversation(front: Running) -> None:
        with socket.socket() as second, pytest.raises(OSError, match="in use"):
            second.bind(("127.0.0.1", front.port))

    talk(conversation, link=StubSuperLink())
