"""TLS to the coordinator that this site has joined, and to nobody else."""

import ssl

from client.home import Home
from unimiss_core.errors import ConfigError


def tls_of(home: Home) -> ssl.SSLContext:
    """Trusts the authority of the site's welcome alone, not those of the machine; shows the site's own certificate.

    Raises ConfigError: the site has not joined, or a file of its keys is missing or damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the peer's certificate, and its name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not home.welcome.is_file():
        raise ConfigError(f"{home.path}: has joined no coordinator; `unimiss-site join WELCOME.yaml` does")
    try:
        context.load_verify_locations(home.authority)
        context.load_cert_chain(home.certificate, home.tls_key)
    except (OSError, ssl.SSLError):
        raise ConfigError(
            f"{home.keys}: a key or certificate is missing, damaged or of another pair; put back the copy of the "
            "folder, or `unimiss-site join` the welcome again"
        ) from None
    return context
