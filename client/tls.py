"""TLS to the coordinator that this site has joined, and to nobody else."""

import ssl

from client.home import Home
from unimiss_core.errors import ConfigError
from unimiss_core.tls import site_side


def tls_of(home: Home) -> ssl.SSLContext:
    """Trusts the authority of the site's welcome alone, not those of the machine; shows the site's own certificate.

    Raises ConfigError: the site has not joined, or a file of its keys is missing or damaged.
    """
    if not home.welcome.is_file():
        raise ConfigError(f"{home.path}: has joined no coordinator; `unimiss-site join WELCOME.yaml` does")
    return site_side(certificate=home.certificate, key=home.tls_key, authority=home.authority)
