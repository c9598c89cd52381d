"""What TLS demands on either side of the line between a site and a coordinator: 1.2 or later, and a certificate of the
coordinator's authority from both. No other authority counts, whatever the machine trusts."""

import logging
import ssl
from pathlib import Path

from unimiss_core.errors import ConfigError

log = logging.getLogger(__name__)


def coordinator_side(*, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """For a server of HTTP/1.1 that answers only clients with a site's certificate. No session is resumed, so that each
    connection shows it anew. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols(["http/1.1"])
    return _armed(context, certificate, key, authority)


class Shown:
    """The certificate that a `coordinator_side` in use shows; another in the same file, as `unimiss-server renew`
    writes it, is shown from the next connection on."""

    def __init__(self, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        self._context, self._certificate, self._key = context, certificate, key
        self._seen = self._state()

    def renew(self) -> None:
        """Look at the file. What cannot be read, or is of another key, leaves what is shown."""
        if (state := self._state()) in (self._seen, ()):
            return
        self._seen = state
        try:
            self._take_up(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # first, for one that fails is left half armed
            self._take_up(self._context)
        except OSError:  # ssl.SSLError is one
            log.warning("%s is not taken up: it is damaged, or not of %s", self._certificate, self._key.name)

    def _take_up(self, context: ssl.SSLContext) -> None:
        """Raises OSError."""
        context.load_cert_chain(self._certificate, self._key, password=_no_passphrase)

    def _state(self) -> tuple[int, ...]:
        try:
            seen = self._certificate.stat()
        except OSError:
            return ()
        return seen.st_mtime_ns, seen.st_ino


def site_side(*, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """For a client that shows a site's certificate, and speaks only with the coordinator's host. Raises ConfigError."""
    return _armed(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), certificate, key, authority)


def _armed(context: ssl.SSLContext, certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        context.load_verify_locations(cafile=authority)
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except FileNotFoundError:
        gone = next(path for path in (certificate, key, authority) if not path.exists())
        raise ConfigError(f"{gone}: is missing; join, or put back a backup") from None
    except (ssl.SSLError, OSError):
        raise ConfigError(
            f"{certificate}: certificate, {key.name} and {authority.name} do not belong together, or one cannot be read"
        ) from None
    return context


def _no_passphrase() -> str:
    """Else OpenSSL would ask whoever sits before the screen."""
    return ""
