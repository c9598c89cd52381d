"""Whether this site reaches its coordinator, as the gate will: by outbound HTTPS, with the site's certificate."""

import base64
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from client.home import Home
from client.tls import tls_of
from unimiss_core import keys
from unimiss_core.joining import host_and_port, read_welcome
from unimiss_core.json_text import object_in

TIMEOUT_S = 20.0
PATH = "/v1/fleet/send-node-heartbeat"
"""A question that a coordinator's public side lets through. Asked without a signature, it changes nothing."""

NO_RUN = frozenset({502, 503, 504})


@dataclass(frozen=True)
class Reached:
    """problem: a key of `client.health.PROBLEMS`, None where a SuperNode would be let in. way: what it went through.
    clock_ahead_s: how far this machine's clock is ahead of the coordinator's; None where that was not told."""

    address: str
    way: str
    problem: str | None
    detail: str = ""
    clock_ahead_s: float | None = None

    @property
    def nobody_listens(self) -> bool:
        """The connection was refused at once: as where no study runs, and unlike a firewall that swallows it."""
        return self.problem == "unreachable" and "connection refused" in self.detail.lower()


def reach(home: Home) -> Reached:
    """Ask the coordinator once. Raises ConfigError: the site has not joined, or its keys are damaged."""
    address = read_welcome(home.welcome)[0].address
    way = _way(address)
    public = keys.pem_of_public(keys.read_site_key(home.private_key).public_key())
    headers = {
        "content-type": "application/protobuf",
        "flwr-public-key": base64.b64encode(public).decode(),
        "content-length": "0",
    }
    with httpx.Client(verify=tls_of(home), timeout=TIMEOUT_S, follow_redirects=False) as client:
        del client.headers["user-agent"]  # as the gate's line has none
        try:
            with client.stream("POST", f"https://{address}{PATH}", headers=headers) as answer:
                body = next(answer.iter_raw(4096), b"")
        except httpx.TransportError as error:
            return Reached(address, way, problem_of(error), _words(error))
    return Reached(address, way, _problem_told(answer.status_code, body), "", _clock_ahead_s(answer))


def problem_of(error: httpx.TransportError) -> str:
    """A key of `client.health.PROBLEMS`."""
    if isinstance(error, httpx.ProxyError):
        return "proxy"
    if isinstance(error, httpx.RemoteProtocolError):
        return "answer"
    words = str(error).lower()  # httpx keeps no more of the cause, and Flower, too, goes by these
    if "eof" in words or "timed out" in words:  # hung up, or silent, before anything was told of a certificate
        return "unreachable"
    return "tls" if any(word in words for word in ("certificate", "ssl", "tls")) else "unreachable"


def detail_told(body: bytes) -> str:
    """The word with which a coordinator's public side says why it refuses; empty where it is another's answer."""
    try:
        return str(object_in(body).get("detail", ""))
    except ValueError:
        return ""


def _problem_told(status: int, body: bytes) -> str | None:
    """401 without a word of the public side's own is SuperLink's, which misses the signature: the way is free."""
    if status == httpx.codes.UNAUTHORIZED:
        return "not_approved" if detail_told(body) in ("not_approved", "wrong_key") else None
    return no_run_or_failed(body) if status in NO_RUN else "answer"


def no_run_or_failed(body: bytes) -> str:
    """What a status of NO_RUN means, by the public side's own word."""
    return "failed" if detail_told(body) == "coordinator_failed" else "no_run"


def _words(error: httpx.TransportError) -> str:
    """The system's own, such as that a name is not known: they help whoever mends a firewall."""
    return " ".join(str(error).split())[:200]


def _clock_ahead_s(answer: httpx.Response) -> float | None:
    """Given to the second, and on its way for some time."""
    try:
        told = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return (datetime.now(UTC) - told).total_seconds() if told.tzinfo else None


def _way(address: str) -> str:
    """Through the proxy that the environment names, or directly."""
    host = host_and_port(address).host
    is_proxied = "https" in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    return "through the proxy that HTTPS_PROXY names" if is_proxied else "directly"
