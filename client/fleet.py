"""The site's line to the coordinator: Flower's Fleet client over mutual TLS, bounded, and heard by a contact book.

Flower's own client shows no certificate, follows redirects wherever they lead and reads answers of any length. A
coordinator, or whoever stands in its place, could so turn a site's request against another machine of the hospital, or
fill its memory.
"""

import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
from flwr.supercore.protobuf.client import ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.health import ContactBook
from client.reachability import NO_RUN, detail_told, no_run_or_failed, problem_of

MOST_ANSWER_BYTES = 32 << 20
"""Of one answer: Flower cuts arrays into pieces of 5 MB, and a bundle has at most 10 MiB."""

_HEARTBEAT = "/flwr.proto.Fleet/SendNodeHeartbeat"


class Line(FleetHttpClient):
    """Flower's Fleet client, to one coordinator."""

    def __init__(
        self, address: str, tls: ssl.SSLContext, contact: ContactBook, interceptors: Sequence[ProtobufClientInterceptor]
    ) -> None:
        super().__init__(f"https://{address}", interceptors=interceptors, verify=tls)
        self._client.follow_redirects = False
        self._client.headers["accept-encoding"] = "identity"
        del self._client.headers["user-agent"]  # which version of which library asks is nobody's business
        self._client.event_hooks = {"response": [_bound]}
        self._contact = contact

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        try:
            response = super()._send(context, stream=stream)
        except httpx.TransportError as error:
            cause = problem_of(error)
            self._contact.failed(cause)
            if cause != "unreachable":
                raise
            # In other words than the system's: at the letters `ssl` Flower ends the SuperNode, and the round at work.
            raise type(error)("the coordinator cannot be reached", request=context.request) from error
        if (problem := problem_told(response)) is None:
            self._contact.answered()
        else:
            self._contact.failed(problem)
        if response.is_server_error and context.rpc_method == _HEARTBEAT:
            # Flower sends another after 502 to 504 alone. After 500, as SuperLink says while its disk is full or its
            # database is locked, the thread would end, and the SuperNode with it, and the round at work.
            raise httpx.ReadError("the coordinator took no heartbeat", request=context.request)
        return response


@dataclass(frozen=True)
class Lines:
    """Stands in for the class of clients that Flower's SuperNode opens its line with."""

    tls: ssl.SSLContext
    contact: ContactBook

    def from_server_address(
        self,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Sequence[ProtobufClientInterceptor],
    ) -> Line:
        """Flower's own settings of TLS are not used: `tls` says what is trusted and shown."""
        del root_certificates
        if insecure:
            raise AssertionError("a site never speaks without TLS")
        return Line(server_address, self.tls, self.contact, interceptors)


def problem_told(response: httpx.Response) -> str | None:
    """What an answer says is wrong, as a key of `client.health.PROBLEMS`; None where nothing is.

    401 may be the front's, with our own word for why, or SuperLink's.
    """
    if response.is_success:
        return None
    if response.status_code in NO_RUN:
        return no_run_or_failed(response.content)
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "not_approved" if detail_told(response.content) in ("not_approved", "wrong_key") else "signature"
    if response.status_code == httpx.codes.PRECONDITION_FAILED:
        return "not_yet"
    return None if response.status_code == httpx.codes.FORBIDDEN else "answer"  # 403: a run that is over


def _bound(response: httpx.Response) -> None:
    """Raises RemoteProtocolError: the answer is packed, which could unfold to any size."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError("the answer is packed, which was not asked for", request=response.request)
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream)


@dataclass
class _Bounded(httpx.SyncByteStream):
    """A stream that ends with an error where it is too long."""

    stream: httpx.SyncByteStream

    def __iter__(self) -> Iterator[bytes]:
        read = 0
        for piece in self.stream:
            read += len(piece)
            if read > MOST_ANSWER_BYTES:
                raise httpx.RemoteProtocolError(f"the answer is longer than {MOST_ANSWER_BYTES} bytes")
            yield piece

    def close(self) -> None:
        self.stream.close()
