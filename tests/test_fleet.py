"""The line to the coordinator: who it trusts, what it shows, and that no answer leads it astray or fills its memory."""

import gzip
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.supercore.primitives.asymmetric import generate_key_pairs
from flwr.supernode import fleet_http_connection

from client import fleet
from client.fleet import Line, Lines, problem_told
from client.health import PROBLEMS, ContactBook, read_contact
from client.tls import tls_of
from tests.joined_site import Joined, joined
from tests.tls_coordinator import Answer, answering
from unimiss_core.errors import ConfigError

OK: Answer = (200, {}, ActivateNodeResponse(node_id=5).SerializeToString())


@contextmanager
def line_of(pair: Joined, port: int, host: str = "127.0.0.1") -> Iterator[Line]:
    lines = Lines(tls_of(pair.site), ContactBook(state_of(pair)))
    with lines.from_server_address(f"{host}:{port}", False, None, []) as line:
        yield line


def state_of(pair: Joined) -> Path:
    return pair.site.path / "state"


def problem_of(pair: Joined) -> str | None:
    contact = read_contact(state_of(pair))
    assert contact is not None
    return contact.problem


def activate(line: Line) -> ActivateNodeResponse:
    return line.ActivateNode(ActivateNodeRequest(public_key=b"k", heartbeat_interval=30))


def test_it_shows_the_sites_certificate_and_asks_for_plain_answers(pair: Joined, port: int) -> None:
    with answering(pair.coordinator, port, lambda _: OK) as heard, line_of(pair, port) as line:
        assert activate(line).node_id == 5
    assert heard.peers == ["alpha"]
    ((_, path, headers),) = heard.requests
    assert path == "/v1/fleet/activate-node"
    assert headers["accept-encoding"] == "identity"
    assert problem_of(pair) is None


def test_another_coordinator_is_not_spoken_to(pair: Joined, port: int, tmp_path: Path) -> None:
    stranger = joined(tmp_path / "stranger", address=f"127.0.0.1:{port}")
    with (
        answering(stranger.coordinator, port, lambda _: OK) as heard,
        line_of(pair, port) as line,
        pytest.raises(httpx.ConnectError),
    ):
        activate(line)
    assert not heard.requests
    assert problem_of(pair) == "tls"


def test_the_coordinators_certificate_does_not_hold_for_another_host(pair: Joined, port: int) -> None:
    """127.0.0.1 stands in it, and 127.0.0.2 does not: that is a name for it here, and would answer."""
    with (
        answering(pair.coordinator, port, lambda _: OK, host="127.0.0.2") as heard,
        line_of(pair, port, "127.0.0.2") as line,
        pytest.raises(httpx.ConnectError, match="mismatch"),
    ):
        activate(line)
    assert not heard.requests


def test_a_redirect_is_not_followed(pair: Joined, port: int) -> None:
    """Least of all to where there is no TLS: a hospital's inner machines are not to hear from the coordinator."""
    elsewhere: Answer = (307, {"location": f"https://127.0.0.1:{port}/stolen"}, b"")
    with (
        answering(pair.coordinator, port, lambda _: elsewhere) as heard,
        line_of(pair, port) as line,
        pytest.raises(httpx.HTTPStatusError),
    ):
        activate(line)
    assert [path for _, path, _ in heard.requests] == ["/v1/fleet/activate-node"]


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_that_would_fill_the_memory_is_cut_off(
    pair: Joined, port: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_ANSWER_BYTES", 1000)
    body = b"\0" * 2000
    answer: Answer = (200, {"content-encoding": "gzip"}, gzip.compress(body)) if packed else (200, {}, body)
    with (
        answering(pair.coordinator, port, lambda _: answer),
        line_of(pair, port) as line,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        activate(line)
    assert problem_of(pair) == "answer"


def test_nobody_there_is_told_as_that_and_so_is_that_somebody_is_again(pair: Joined, port: int) -> None:
    with line_of(pair, port) as line:
        with pytest.raises(httpx.ConnectError):
            activate(line)
        assert problem_of(pair) == "unreachable"
        with answering(pair.coordinator, port, lambda _: OK):
            activate(line)
        assert problem_of(pair) is None


@pytest.mark.parametrize("waits", [False, True], ids=["it hangs up", "it is silent"])
def test_what_ends_before_a_certificate_is_shown_may_pass(pair: Joined, port: int, waits: bool) -> None:
    """A router, or a front that has too much to do, takes a connection and gives it up: no reason to wait minutes."""

    def give_up(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(1)
        if not waits:
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
        connection.close()

    with socket.create_server(("127.0.0.1", port)) as listener, line_of(pair, port) as line:
        line._client.timeout = httpx.Timeout(1.0)
        peer = threading.Thread(target=give_up, args=[listener])
        peer.start()
        with pytest.raises(httpx.TransportError) as raised:
            activate(line)
        peer.join()
    assert not any(word in str(raised.value).lower() for word in ("certificate", "ssl", "tls"))  # Flower would end
    assert problem_of(pair) == "unreachable"


@pytest.mark.parametrize(
    ("status", "detail", "problem"),
    [
        (200, "", None),
        (401, "not_approved", "not_approved"),
        (401, "wrong_key", "not_approved"),
        (401, "Invalid signature", "signature"),
        (403, "run is over", None),
        (412, "Failed to activate SuperNode.", "not_yet"),
        (503, "coordinator_down", "no_run"),
        (503, "coordinator_failed", "failed"),
        (504, "coordinator_slow", "no_run"),
        (404, "", "answer"),
        (500, "", "answer"),
    ],
)
def test_what_an_answer_means(status: int, detail: str, problem: str | None) -> None:
    assert problem_told(httpx.Response(status, content=json.dumps({"detail": detail}))) == problem
    assert problem is None or problem in PROBLEMS


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"\xff"])
def test_an_answer_that_is_no_json_is_no_approval(body: bytes) -> None:
    assert problem_told(httpx.Response(401, content=body)) == "signature"


@pytest.mark.parametrize("status", [500, 501, 503])
def test_a_heartbeat_that_a_server_in_trouble_did_not_take_is_sent_again(
    pair: Joined, port: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Flower's own connection: an exception would end its thread, and with it the round at work."""
    beats: list[Callable[[], bool]] = []
    heard: list[tuple[bool, str | None]] = []

    class Sender:
        is_running = False

        def __init__(self, beat: Callable[[], bool]) -> None:
            beats.append(beat)

        def start(self) -> None:
            pass

    monkeypatch.setattr(fleet_http_connection, "HeartbeatSender", Sender)
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", Lines(tls_of(pair.site), ContactBook(state_of(pair))))
    answers: Iterator[Answer] = iter(
        [
            OK,
            (status, {}, b"database is locked"),
            (200, {}, SendNodeHeartbeatResponse(success=True).SerializeToString()),
        ]
    )
    with (
        answering(pair.coordinator, port, lambda _: next(answers, OK)),
        fleet_http_connection.http_request_response(f"127.0.0.1:{port}", False, None, generate_key_pairs()),
    ):
        heard = [(beats[0](), problem_of(pair)) for _ in range(2)]
    assert heard == [(False, "no_run" if status == 503 else "answer"), (True, None)]  # Flower's block hides exceptions


def test_a_site_that_has_not_joined_is_told_so(pair: Joined) -> None:
    pair.site.welcome.unlink()
    with pytest.raises(ConfigError, match="unimiss-site join"):
        tls_of(pair.site)


def test_a_key_that_is_not_the_certificates_is_told(pair: Joined, tmp_path: Path) -> None:
    other = joined(tmp_path / "other")
    pair.site.tls_key.write_bytes(other.site.tls_key.read_bytes())
    with pytest.raises(ConfigError, match="do not belong together"):
        tls_of(pair.site)
