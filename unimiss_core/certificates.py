"""X.509 of a federation: an authority of the coordinator's own, its server's certificate and one for each site.

    authority (10 years)   signs the two below, and nothing else: no authority under it, no name but the coordinator's
    ├── server (2 years)   the coordinator's public host, localhost and 127.0.0.1; TLS servers alone
    └── site (2 years)     the site's own key under the site's name; TLS clients alone

Neither side trusts any other authority, nor is this one to be put among those that a machine trusts. If somebody does,
its name constraints (RFC 5280, 4.2.1.10) keep it from vouching for other hosts; the coordinator's host stands in them,
so that another host needs another authority, and every site a new welcome. Nothing is revoked by lists: the front asks
the registry at each request (`server.registry`). What runs out is made anew by `unimiss-server renew`, keys stay.
"""

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from unimiss_core.errors import ConfigError
from unimiss_core.keys import SiteKey, SitePublicKey, pem_of_public, read_text

AUTHORITY_LASTS = timedelta(days=3650)
LEAF_LASTS = timedelta(days=730)
CLOCKS_DIFFER = timedelta(days=1)
"""How far a machine's clock may lag behind the coordinator's and still take a certificate made just now."""

_AUTHORITY = "Federated UniMiSS coordinator"
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
_LOCAL_NAME, _LOCAL_ADDRESS = "localhost", ipaddress.ip_address("127.0.0.1")


@dataclass(frozen=True)
class Authority:
    """A certificate that signs others, and the key that it signs with."""

    certificate: x509.Certificate
    key: SiteKey


def new_authority(key: SiteKey, *, host: str, now: datetime) -> Authority:
    """host: the coordinator's public name or address, the only one besides this machine's that it can vouch for."""
    builder = (
        _begun(_called(_AUTHORITY), _called(_AUTHORITY), key.public_key(), now, AUTHORITY_LASTS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(of_authority=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_SERVER, _CLIENT]), critical=False)
        .add_extension(x509.NameConstraints(_subtrees(host), excluded_subtrees=None), critical=True)
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


def server_certificate(authority: Authority, key: SitePublicKey, *, host: str, now: datetime) -> x509.Certificate:
    """host: as `new_authority` was told."""
    builder = _leaf(authority, "Federated UniMiSS server", key, now, _SERVER)
    return _signed(authority, builder.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False))


def site_certificate(authority: Authority, key: SitePublicKey, *, site: str, now: datetime) -> x509.Certificate:
    """For the key that the site made: its private half was never here."""
    return _signed(authority, _leaf(authority, site, key, now, _CLIENT))


def as_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def certificate_of(text: str, where: str) -> x509.Certificate:
    """The one certificate of a PEM text. Raises ConfigError, which begins with `where`."""
    try:
        (certificate,) = x509.load_pem_x509_certificates(text.encode())
    except ValueError:  # none, several, or damaged
        raise ConfigError(f"{where}: expected one certificate as PEM; it is cut off, damaged or another file") from None
    return certificate


def read_certificate(path: Path) -> x509.Certificate:
    """Raises ConfigError."""
    return certificate_of(read_text(path), str(path))


def key_of(certificate: x509.Certificate) -> bytes:
    """The public key that a certificate is for, as `unimiss_core.keys.pem_of_public` writes it; empty where it is of no
    kind that a site has."""
    try:
        key = certificate.public_key()
    except ValueError:
        return b""
    return pem_of_public(key) if isinstance(key, SitePublicKey) else b""


def key_of_peer(der: bytes) -> bytes:
    """`key_of` the certificate that a TLS peer gave, as `ssl` hands it over in binary form; empty where it is none."""
    try:
        return key_of(x509.load_der_x509_certificate(der))
    except ValueError:
        return b""


def identity(der: bytes) -> tuple[bytes, str]:
    """Of a certificate in DER form that the authority signed: its key as `key_of` gives it, the name of its subject."""
    certificate = x509.load_der_x509_certificate(der)
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return key_of(certificate), str(names[0].value) if names else ""


def days_left(certificate: x509.Certificate, now: datetime) -> float:
    """Until it runs out; below 0 where it did."""
    return (certificate.not_valid_after_utc - now) / timedelta(days=1)


def check_site_certificate(
    certificate: x509.Certificate, authority: x509.Certificate, key: SitePublicKey, *, site: str, where: str
) -> None:
    """Raises ConfigError: it is another site's, of another key, or another authority's. Dates are not looked at: a
    machine whose clock is wrong is told so by `check`."""
    name = [str(found.value) for found in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if name != [site]:
        raise ConfigError(f"{where}: the certificate is not for the site '{site}'; ask for this site's own welcome")
    if key_of(certificate) != pem_of_public(key):
        raise ConfigError(
            f"{where}: the certificate is for another key than this site's; ask the coordinator's operator to approve "
            "the join request that lies here"
        )
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{where}: its authority did not sign its certificate; have the file sent again") from None


def _begun(
    subject: x509.Name, issuer: x509.Name, key: SitePublicKey, now: datetime, lasts: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(
    authority: Authority, subject: str, key: SitePublicKey, now: datetime, purpose: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    """It outlives its authority never: what is checked runs out with the first of the two."""
    issued_by = authority.certificate
    lasts = min(LEAF_LASTS, issued_by.not_valid_after_utc - now)
    identifier = issued_by.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _begun(_called(subject), issued_by.subject, key, now, lasts)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(of_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )


def _signed(authority: Authority, builder: x509.CertificateBuilder) -> x509.Certificate:
    return builder.sign(authority.key, hashes.SHA384())


def _called(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, of_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not of_authority,
        key_cert_sign=of_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(host: str) -> list[x509.GeneralName]:
    """Under which the server answers."""
    public = _address(host)
    names = dict.fromkeys([_LOCAL_NAME] if public else [host, _LOCAL_NAME])
    addresses = dict.fromkeys([public, _LOCAL_ADDRESS] if public else [_LOCAL_ADDRESS])
    return [*(x509.DNSName(name) for name in names), *(x509.IPAddress(address) for address in addresses)]


def _subtrees(host: str) -> list[x509.GeneralName]:
    """A kind of name that no subtree is of would be free: so there is one of each."""
    return [
        x509.IPAddress(ipaddress.ip_network(name.value)) if isinstance(name, x509.IPAddress) else name
        for name in _names(host)
    ]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
