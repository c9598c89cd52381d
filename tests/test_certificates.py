"""Certificates in real handshakes on loopback, and under OpenSSL's own eyes: who gets through, and who does not."""

import shutil
import socket
import ssl
import subprocess
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from unimiss_core import certificates, keys, tls
from unimiss_core.certificates import Authority
from unimiss_core.errors import ConfigError

NOW = datetime.now(UTC).replace(microsecond=0)
HOST = "unimiss.example.org"


@dataclass(frozen=True)
class Party:
    """Paths of a party's certificate, of its key, and of the authority that it trusts."""

    certificate: Path
    key: Path
    authority: Path

    def on_the_coordinators_side(self) -> ssl.SSLContext:
        return tls.coordinator_side(certificate=self.certificate, key=self.key, authority=self.authority)

    def on_the_sites_side(self) -> ssl.SSLContext:
        return tls.site_side(certificate=self.certificate, key=self.key, authority=self.authority)


def authority(host: str = HOST, now: datetime = NOW) -> Authority:
    return certificates.new_authority(keys.new_site_key(), host=host, now=now)


def party(folder: Path, name: str, certificate: x509.Certificate, key: keys.SiteKey, trusted: Authority) -> Party:
    paths = Party(folder / f"{name}.crt", folder / f"{name}.key", folder / f"{name}.authority.crt")
    paths.certificate.write_text(certificates.as_pem(certificate))
    paths.key.write_bytes(keys.in_pem_form(key))
    paths.authority.write_text(certificates.as_pem(trusted.certificate))
    return paths


def server(folder: Path, of: Authority, host: str = HOST, now: datetime = NOW) -> Party:
    key = keys.new_site_key()
    certificate = certificates.server_certificate(of, key.public_key(), host=host, now=now)
    return party(folder, "server", certificate, key, of)


def site(folder: Path, of: Authority, trusted: Authority | None = None, now: datetime = NOW) -> Party:
    key = keys.new_site_key()
    certificate = certificates.site_certificate(of, key.public_key(), site="alpha", now=now)
    return party(folder, "alpha", certificate, key, trusted or of)


def handshake(
    listener: ssl.SSLContext, caller: ssl.SSLContext, host: str = HOST, kept: list[ssl.SSLSession] | None = None
) -> bytes | None:
    """The certificate that the caller showed (DER, or some bytes for none), or None where a side refused the other.

    kept: sessions that the caller has of this listener; it offers the last, and adds the new one.
    """
    shown: list[bytes | None] = []

    def answer(door: socket.socket) -> None:
        try:
            with door.accept()[0] as raw, listener.wrap_socket(raw, server_side=True) as secured:
                shown.append(secured.getpeercert(binary_form=True) or b"none")
                secured.sendall(b"!")
        except (ssl.SSLError, OSError):
            shown.append(None)

    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(20)
        answering = threading.Thread(target=answer, args=(door,))
        answering.start()
        try:
            with (
                socket.create_connection(door.getsockname(), timeout=20) as raw,
                caller.wrap_socket(raw, server_hostname=host, session=kept[-1] if kept else None) as secured,
            ):
                through = secured.recv(1) == b"!"  # in TLS 1.3 the server's refusal comes after the handshake
                if kept is not None and secured.session is not None:
                    kept.append(secured.session)
        except (ssl.SSLError, OSError):
            through = False
        answering.join(20)
    return shown[0] if through else None


@pytest.mark.parametrize("host", [HOST, "localhost", "127.0.0.1"])
def test_a_site_and_its_coordinator_meet_under_each_name_of_the_server(tmp_path: Path, host: str) -> None:
    ours = authority()
    alpha = site(tmp_path, ours)
    shown = handshake(server(tmp_path, ours).on_the_coordinators_side(), alpha.on_the_sites_side(), host)
    assert shown is not None
    public = keys.read_site_key(alpha.key).public_key()
    assert certificates.key_of_peer(shown) == keys.pem_of_public(public)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7"])
def test_a_public_address_without_a_name_will_do(tmp_path: Path, address: str) -> None:
    ours = authority(address)
    listener = server(tmp_path, ours, address).on_the_coordinators_side()
    assert handshake(listener, site(tmp_path, ours).on_the_sites_side(), address)
    assert not handshake(listener, site(tmp_path, ours).on_the_sites_side(), "192.0.2.8")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_ask_for_a_certificate(tmp_path: Path, version: ssl.TLSVersion) -> None:
    ours = authority()
    listener = server(tmp_path, ours).on_the_coordinators_side()
    listener.maximum_version = listener.minimum_version = version
    assert handshake(listener, site(tmp_path, ours).on_the_sites_side())
    nobody = ssl.create_default_context(cafile=tmp_path / "alpha.authority.crt")
    assert not handshake(listener, nobody)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_is_resumed_past_the_certificate(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A resumed session takes the certificate of the first as seen, also where that has run out since."""
    ours = authority()
    listener = server(tmp_path, ours).on_the_coordinators_side()
    listener.maximum_version = version
    caller = site(tmp_path, ours).on_the_sites_side()
    kept: list[ssl.SSLSession] = []
    assert handshake(listener, caller, kept=kept)
    assert handshake(listener, caller, kept=kept)
    assert listener.session_stats()["hits"] == 0


def test_tls_1_1_is_not_spoken(tmp_path: Path) -> None:
    ours = authority()
    for context in (server(tmp_path, ours).on_the_coordinators_side(), site(tmp_path, ours).on_the_sites_side()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_stranger_who_knows_our_authority_is_refused(tmp_path: Path) -> None:
    ours, theirs = authority(), authority()
    stranger = site(tmp_path, theirs, trusted=ours)
    assert not handshake(server(tmp_path, ours).on_the_coordinators_side(), stranger.on_the_sites_side())


def test_a_site_refuses_a_coordinator_of_another_authority(tmp_path: Path) -> None:
    ours, theirs = authority(), authority()
    listener = server(tmp_path, theirs)
    knows_both = Party(listener.certificate, listener.key, site(tmp_path, ours).authority)
    assert not handshake(knows_both.on_the_coordinators_side(), site(tmp_path, ours).on_the_sites_side())


def test_a_site_refuses_a_server_of_another_name(tmp_path: Path) -> None:
    ours = authority()
    listener = server(tmp_path, ours).on_the_coordinators_side()
    assert not handshake(listener, site(tmp_path, ours).on_the_sites_side(), "unimiss.example.com")


def test_what_has_run_out_is_refused_on_either_side(tmp_path: Path) -> None:
    long_ago = NOW - certificates.LEAF_LASTS - timedelta(days=2)
    ours = authority(now=long_ago)
    now, then = tmp_path / "now", tmp_path / "then"
    now.mkdir(), then.mkdir()
    fresh = server(now, ours).on_the_coordinators_side(), site(now, ours).on_the_sites_side()
    old = (
        server(then, ours, now=long_ago).on_the_coordinators_side(),
        site(then, ours, now=long_ago).on_the_sites_side(),
    )
    assert handshake(*fresh)
    assert not handshake(fresh[0], old[1])
    assert not handshake(old[0], fresh[1])


def test_a_clock_that_lags_by_hours_is_borne() -> None:
    made = certificates.site_certificate(authority(), keys.new_site_key().public_key(), site="alpha", now=NOW)
    assert made.not_valid_before_utc <= NOW - timedelta(hours=23)


def test_a_site_cannot_play_the_coordinator(tmp_path: Path) -> None:
    """Its certificate is a client's: else each site could answer in the coordinator's place."""
    ours = authority()
    alpha = site(tmp_path, ours)
    careless = alpha.on_the_sites_side()
    careless.check_hostname = False
    assert not handshake(alpha.on_the_coordinators_side(), careless)


def test_a_server_cannot_play_a_site(tmp_path: Path) -> None:
    ours = authority()
    listener = server(tmp_path, ours)
    assert not handshake(listener.on_the_coordinators_side(), listener.on_the_sites_side())


def test_a_site_cannot_make_further_sites(tmp_path: Path) -> None:
    """Signed with the site's key: neither is it an authority, nor may there be one below ours."""
    ours, key = authority(), keys.new_site_key()
    alpha = certificates.site_certificate(ours, key.public_key(), site="alpha", now=NOW)
    below = certificates.site_certificate(Authority(alpha, key), key.public_key(), site="beta", now=NOW)
    beta = party(tmp_path, "beta", below, key, ours)
    beta.certificate.write_text(beta.certificate.read_text() + certificates.as_pem(alpha))
    assert not handshake(server(tmp_path, ours).on_the_coordinators_side(), beta.on_the_sites_side())


def test_an_authority_that_was_stolen_vouches_for_no_other_host(tmp_path: Path) -> None:
    ours = authority()
    forged = server(tmp_path, ours, "login.example.com").on_the_coordinators_side()
    assert not handshake(forged, site(tmp_path, ours).on_the_sites_side(), "login.example.com")


def test_no_certificate_outlives_its_authority() -> None:
    ours, late = authority(), NOW + certificates.AUTHORITY_LASTS - timedelta(days=10)
    made = certificates.site_certificate(ours, keys.new_site_key().public_key(), site="alpha", now=late)
    assert certificates.days_left(made, late) == 10


@pytest.mark.skipif(not shutil.which("openssl"), reason="the openssl command is not installed here")
def test_openssl_finds_nothing_amiss(tmp_path: Path) -> None:
    ours = authority()
    for purpose, paths in {"sslserver": server(tmp_path, ours), "sslclient": site(tmp_path, ours)}.items():
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(paths.authority)]
        done = subprocess.run([*command, str(paths.certificate)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr


def test_a_certificate_that_is_not_the_sites_is_told() -> None:
    ours, theirs, key = authority(), authority(), keys.new_site_key().public_key()
    made = certificates.site_certificate(ours, key, site="alpha", now=NOW)
    other = keys.new_site_key().public_key()

    def check(of: Authority = ours, key: keys.SitePublicKey = key, site: str = "alpha") -> None:
        certificates.check_site_certificate(made, of.certificate, key, site=site, where="w.yaml")

    check()
    with pytest.raises(ConfigError, match="not for the site 'beta'"):
        check(site="beta")
    with pytest.raises(ConfigError, match="for another key than this site's"):
        check(key=other)
    with pytest.raises(ConfigError, match="its authority did not sign its certificate"):
        check(of=theirs)


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_damaged_certificate_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^w.yaml: expected one certificate as PEM"):
        certificates.certificate_of(text, "w.yaml")
    assert certificates.key_of_peer(text.encode()) == b""


def test_files_that_do_not_belong_together_are_told(tmp_path: Path) -> None:
    ours = authority()
    listener, alpha = server(tmp_path, ours), site(tmp_path, ours)
    with pytest.raises(ConfigError, match="do not belong together"):
        tls.site_side(certificate=alpha.certificate, key=listener.key, authority=alpha.authority)
    with pytest.raises(ConfigError, match=r"absent.key: is missing"):
        tls.site_side(certificate=alpha.certificate, key=tmp_path / "absent.key", authority=alpha.authority)


def test_a_renewed_certificate_is_shown_from_the_next_connection_on(tmp_path: Path) -> None:
    """One that is of another key leaves the one before."""
    ours, late = authority(), NOW - certificates.LEAF_LASTS - timedelta(days=1)
    listener, alpha = server(tmp_path, ours, now=late), site(tmp_path, ours)
    context = listener.on_the_coordinators_side()
    shown = tls.Shown(context, listener.certificate, listener.key)
    assert not handshake(context, alpha.on_the_sites_side())  # it has run out

    def write(key: keys.SiteKey) -> None:
        made = certificates.server_certificate(ours, key.public_key(), host=HOST, now=NOW)
        partial = tmp_path / "partial"
        partial.write_text(certificates.as_pem(made))
        partial.replace(listener.certificate)
        shown.renew()

    write(keys.read_site_key(listener.key))
    assert handshake(context, alpha.on_the_sites_side())
    write(keys.new_site_key())
    assert handshake(context, alpha.on_the_sites_side())
    listener.certificate.unlink()
    shown.renew()
    assert handshake(context, alpha.on_the_sites_side())
