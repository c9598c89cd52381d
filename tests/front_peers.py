"""What tests of the front share: an authority, sites with certificates, a SuperLink of a few lines, and callers that
write requests byte by byte."""

import asyncio
import socket
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from server.front import Front, bound_socket, upstream_client
from server.front_conversation import House
from server.refusals import Refusals
from server.server_config import FrontLimits
from unimiss_core.tls import coordinator_side

NOW = datetime.now(UTC)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, of_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not of_authority, False, False, False, False, of_authority, False, False, False)


class Authority:
    """Signs certificates into `folder`: NAME.crt, NAME.key."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._name = _name(name)
        certificate = self._signed(self._name, self._key.public_key(), None, NOW + timedelta(days=9))
        self.file = folder / f"{name}.crt"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(self, name: str, *, server: bool = False, ends: datetime = NOW + timedelta(days=8)) -> "Identity":
        key = ec.generate_private_key(ec.SECP384R1())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = self._signed(_name(name), key.public_key(), purpose, ends)
        made = Identity(name, self.folder / f"{name}.crt", self.folder / f"{name}.key", self.file)
        made.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        made.private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return made

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, purpose: x509.ObjectIdentifier | None, ends: datetime
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - timedelta(days=30))
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=purpose is None, path_length=None), critical=True)
            .add_extension(_usage(of_authority=purpose is None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if purpose is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if purpose == ExtendedKeyUsageOID.SERVER_AUTH:
            names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA384())


@dataclass(frozen=True)
class Identity:
    """A certificate and its key. authority: of the coordinator."""

    name: str
    certificate: Path
    private: Path
    authority: Path

    @property
    def pem(self) -> bytes:
        certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        return certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority))
        context.load_cert_chain(self.certificate, self.private)
        return context


def identified(der: bytes) -> tuple[bytes, str]:
    certificate = x509.load_der_x509_certificate(der)
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    return certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), str(name)


@dataclass
class Approved:
    """key -> site."""

    sites: dict[bytes, str] = field(default_factory=dict)

    def holder_of(self, key: bytes) -> str | None:
        return self.sites.get(key)


@dataclass
class StubSuperLink:
    """Takes a request whole, remembers it, gives `answer`. slow_s: before it answers."""

    answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\ncontent-length: 2\r\n\r\nok"
    slow_s: float = 0.0
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                (length,) = (
                    int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line
                )
                self.bodies.append(await reader.readexactly(length))
                await asyncio.sleep(self.slow_s)
                writer.write(self.answered(head.split()[1], self.bodies[-1]))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.transport.abort()

    def answered(self, path: bytes, body: bytes) -> bytes:
        """What is said to a request."""
        del path, body
        return self.answer


@dataclass
class Running:
    """A front at work on 127.0.0.1. noted: the lines of its audit log."""

    port: int
    approved: Approved
    noted: list[dict[str, str | int | float]]
    house: House
    dialled: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self, identity: Identity) -> "Call":
        return await self.dial(identity.tls())

    async def dial(self, tls: ssl.SSLContext | None) -> "Call":
        name = None if tls is None else "localhost"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name)
        self.dialled.append(writer)
        return Call(reader, writer)

    async def hang_up(self) -> None:
        for writer in self.dialled:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


@dataclass
class Call:
    """A caller's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Write `request`; the status and the body of the answer. Status 0: it was closed without one."""
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> tuple[int, bytes]:
        try:
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)
        except (asyncio.IncompleteReadError, OSError):
            return 0, b""
        (length,) = (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def is_closed(self) -> bool:
        """Whether the front closes soon."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 20) == b""
        except OSError:
            return True


def request(
    identity: Identity,
    *,
    path: bytes = b"/v1/fleet/pull-messages",
    method: bytes = b"POST",
    version: bytes = b"HTTP/1.1",
    body: bytes = b"body",
    extra: bytes = b"",
    **changed: bytes | None,
) -> bytes:
    """As a SuperNode writes it. extra: more lines of the head. changed: headers, with _ for -; None leaves one out."""
    headers: Mapping[str, bytes | None] = {
        "host": b"localhost",
        "content_type": b"application/protobuf",
        "accept": b"application/protobuf",
        "flwr_public_key": b64encode(identity.pem),
        "flwr_timestamp": datetime.now(UTC).isoformat().encode(),
        "flwr_signature": b"c2lnbmVk",
        "content_length": b"%d" % len(body),
    } | changed
    lines = [name.replace("_", "-").encode() + b": " + value for name, value in headers.items() if value is not None]
    return b"%s %s %s\r\n%s\r\n%s\r\n%s" % (method, path, version, b"\r\n".join(lines), extra, body)


@asynccontextmanager
async def running_front(
    folder: Path, authority: Authority, *, link: StubSuperLink | None = None, **limits: float
) -> AsyncIterator[Running]:
    """link: None is a SuperLink that is down."""
    server = authority.issue("server", server=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.certificate, server.private)
    upstream = await asyncio.start_server((link or StubSuperLink()).serve, "127.0.0.1", 0, ssl=context)
    up_port = upstream.sockets[0].getsockname()[1]
    if link is None:
        upstream.close()
        await upstream.wait_closed()
    allowed = FrontLimits.model_validate(limits)
    noted: list[dict[str, str | int | float]] = []
    refusals = Refusals(lambda kind, fields: noted.append({"kind": kind, **fields}))
    async with upstream_client(up_port, authority.file, allowed) as client:
        house = House(approved := Approved(), client, allowed, refusals, folder / "passage")
        tls = coordinator_side(certificate=server.certificate, key=server.private, authority=authority.file)
        listener = bound_socket("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # what is sent waits in the front itself
        stop = asyncio.Event()
        front = asyncio.create_task(Front(house, tls, identified, folder / "front.json").run(listener, stop))
        running = Running(listener.getsockname()[1], approved, noted, house)
        try:
            yield running
        finally:
            await running.hang_up()
            stop.set()
            await front
            upstream.close()


SITES_NODE = 0xFEEDBEEFFEEDBEEF
"""The number that Flower gave to whoever pushes `answer_body`; it takes all 64 bits."""


def answer_body(
    *, src: int = SITES_NODE, dst: int = 1, reply_to: str = "a" * 64, objects: int = 4, tree: str = "b" * 64
) -> bytes:
    """PushMessages as a SuperNode writes it: one answer of so many objects."""
    told = Metadata(
        run_id=7, message_id="b" * 64, src_node_id=src, dst_node_id=dst, reply_to_message_id=reply_to, ttl=60.0
    )
    children = [ObjectTree(object_id=f"{number:064x}") for number in range(objects - 1)]
    return bytes(
        PushMessagesRequest(
            node=Node(node_id=SITES_NODE),
            messages_list=[Message(metadata=told)],
            message_object_trees=[ObjectTree(object_id=tree, children=children)],
        ).SerializeToString()
    )


ODD: dict[str, tuple[dict[str, bytes | None], int]] = {
    "register": ({"path": b"/v1/fleet/register-node"}, 403),
    "unregister": ({"path": b"/v1/fleet/unregister-node"}, 403),
    "control": ({"path": b"/v1/control/start-run"}, 403),
    "runtime": ({"path": b"/v1/runtime/acquire-task"}, 403),
    "root": ({"path": b"/"}, 403),
    "docs": ({"path": b"/docs", "method": b"GET"}, 403),
    "dots": ({"path": b"/v1/fleet/../control/start-run"}, 403),
    "encoded dots": ({"path": b"/v1/fleet/%2e%2e/control/start-run"}, 403),
    "encoded slash": ({"path": b"/v1/fleet%2fget-run"}, 403),
    "encoded letter": ({"path": b"/v1/fleet/%67et-run"}, 403),
    "two slashes": ({"path": b"//v1/fleet/get-run"}, 403),
    "slash at the end": ({"path": b"/v1/fleet/get-run/"}, 403),
    "query": ({"path": b"/v1/fleet/get-run?x=1"}, 403),
    "fragment": ({"path": b"/v1/fleet/get-run#x"}, 403),
    "parameter": ({"path": b"/v1/fleet/get-run;/../../control/start-run"}, 403),
    "upper case": ({"path": b"/V1/Fleet/Get-Run"}, 403),
    "absolute form": ({"path": b"https://localhost/v1/fleet/get-run"}, 403),
    "no slash": ({"path": b"v1/fleet/get-run"}, 403),
    "a zero byte": ({"path": b"/v1/fleet/get-run\0"}, 400),
    "GET": ({"method": b"GET"}, 405),
    "post in lower case": ({"method": b"post"}, 405),
    "OPTIONS *": ({"method": b"OPTIONS", "path": b"*"}, 403),
    "CONNECT": ({"method": b"CONNECT", "path": b"127.0.0.1:22"}, 403),
    "HTTP 1.0": ({"version": b"HTTP/1.0"}, 400),
    "HTTP 2": ({"version": b"HTTP/2"}, 400),
    "no type": ({"content_type": None}, 400),
    "JSON": ({"content_type": b"application/json"}, 400),
    "chunked": ({"content_length": None, "extra": b"transfer-encoding: chunked\r\n"}, 400),
    "chunked and a length": ({"extra": b"transfer-encoding: chunked\r\n"}, 400),
    "a coding unknown": ({"extra": b"transfer-encoding: gzip, chunked\r\n"}, 400),
    "no length": ({"content_length": None}, 413),
    "two lengths": ({"extra": b"content-length: 5\r\n"}, 400),
    "a length below zero": ({"content_length": b"-1"}, 400),
    "5 GB": ({"path": b"/v1/fleet/push-object", "content_length": b"5000000000"}, 413),
    "more digits than there are bytes": ({"content_length": b"9" * 15}, 413),
    "a message as large as an object": ({"content_length": b"5000000"}, 413),
    "expect": ({"extra": b"expect: 100-continue\r\n"}, 400),
    "upgrade": ({"extra": b"connection: upgrade\r\nupgrade: websocket\r\n"}, 400),
    "two keys": ({"extra": b"flwr-public-key: YQ==\r\n"}, 400),
    "two times": ({"extra": b"Flwr-Timestamp: 2020-01-01\r\n"}, 400),
    "a folded header": ({"extra": b"x: a\r\n b\r\nflwr-public-key : YQ==\r\n"}, 400),
    "no key": ({"flwr_public_key": None}, 401),
    "a key that is none": ({"flwr_public_key": b"???"}, 401),
    "headers without end": ({"extra": b"x: " + b"a" * 20_000 + b"\r\n"}, 400),
}
"""What a request is changed to, by the names of `request`, and the status that it is refused with."""
