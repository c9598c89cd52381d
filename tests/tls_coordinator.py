"""A stand-in for a coordinator's public side on loopback: TLS with certificates on both sides, and answers as told."""

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from server import home as coordinator

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


@dataclass
class Heard:
    """What came: method, path and headers of each request, and who asked."""

    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)


@contextmanager
def answering(
    home: coordinator.Home, port: int, answer: Callable[[str], Answer], *, host: str = "127.0.0.1"
) -> Iterator[Heard]:
    """Answer each request by `answer(path)`; only whom the coordinator's authority knows is heard at all."""
    heard = Heard()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            certificate: Any = self.connection.getpeercert()  # type: ignore[attr-defined]
            heard.peers.append(dict(pair[0] for pair in certificate["subject"])["commonName"])
            heard.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            status, headers, body = answer(self.path)
            self.send_response_only(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A peer that goes away, or is not let in, is what some tests are about."""

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(home.server_certificate, home.server_key)
    tls.load_verify_locations(home.authority_certificate)
    tls.verify_mode = ssl.CERT_REQUIRED
    with Server((host, port), Handler) as server:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield heard
        finally:
            server.shutdown()
            thread.join()
