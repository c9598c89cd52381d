"""Who is let in: read anew at each question, and nobody new where a file cannot be read."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.approval import approve, revoke
from server.audit import coordinator_log
from server.home import Home
from server.registry import HOLD_S, ApprovedSite, Registry, registered
from unimiss_core import keys
from unimiss_core.config import dump_yaml, load
from unimiss_core.errors import AuditError, ConfigError


def write(home: Home, name: str, key: keys.SitePublicKey, status: str = "approved", file: str = "") -> None:
    site = ApprovedSite(name=name, public_key=keys.public_line(key, name), status=status)  # type: ignore[arg-type]
    home.sites.mkdir(exist_ok=True)
    (home.sites / (file or f"{name}.yaml")).write_text(dump_yaml(site))


def a_key() -> tuple[keys.SitePublicKey, bytes]:
    key = keys.new_site_key().public_key()
    return key, keys.pem_of_public(key)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_approved_sites_are_let_in_by_their_keys(home: Home) -> None:
    (alpha, alpha_pem), (beta, beta_pem), (_, stranger) = a_key(), a_key(), a_key()
    write(home, "alpha", alpha)
    write(home, "beta", beta, "revoked")
    home.welcome("alpha").write_text("not a site's file")
    registry = Registry(home)
    assert [registry.holder_of(key) for key in (alpha_pem, beta_pem, stranger, b"")] == ["alpha", None, None, None]
    assert {name: site.status for name, site in registry.sites().items()} == {"alpha": "approved", "beta": "revoked"}
    assert [site.name for site in registry.approved()] == ["alpha"]


def test_what_changes_counts_at_the_next_question(home: Home) -> None:
    alpha, pem = a_key()
    registry = Registry(home)
    assert registry.holder_of(pem) is None
    write(home, "alpha", alpha)
    assert registry.holder_of(pem) == "alpha"
    write(home, "alpha", alpha, "revoked")
    assert registry.holder_of(pem) is None
    write(home, "alpha", alpha)
    assert registry.holder_of(pem) == "alpha"
    home.site("alpha").unlink()
    assert registry.holder_of(pem) is None


def test_a_file_of_the_same_length_and_time_that_took_its_place_is_read(home: Home) -> None:
    (first, first_pem), (second, second_pem) = a_key(), a_key()
    write(home, "alpha", first)
    registry = Registry(home)
    assert registry.holder_of(first_pem) == "alpha"
    seen = home.site("alpha").stat()
    write(home, "alpha", second, file="partial")
    os.utime(home.sites / "partial", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    (home.sites / "partial").replace(home.site("alpha"))
    assert (registry.holder_of(first_pem), registry.holder_of(second_pem)) == (None, "alpha")


DAMAGED = ["", "name: alpha", "{", "name: alpha\npublic_key: ssh-rsa AAAA\n", "name: alpha\nstatus: appro"]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_lets_its_site_not_in_and_the_others_are_not_kept_out(home: Home, text: str) -> None:
    (alpha, alpha_pem), (beta, beta_pem) = a_key(), a_key()
    write(home, "alpha", alpha)
    write(home, "beta", beta)
    home.site("alpha").write_text(text)
    registry = Registry(home)
    assert (registry.holder_of(alpha_pem), registry.holder_of(beta_pem)) == (None, "beta")
    with pytest.raises(ConfigError, match=r"alpha\.yaml"):
        registry.sites()


def test_a_link_that_leads_nowhere_lets_its_site_not_in_and_is_told(home: Home) -> None:
    """Were it taken for no file, the name could be given again."""
    (alpha, alpha_pem), (beta, beta_pem) = a_key(), a_key()
    write(home, "alpha", alpha)
    write(home, "beta", beta)
    registry = Registry(home)
    assert registry.holder_of(alpha_pem) == "alpha"
    for target in ("alpha.yaml", "nowhere"):
        home.site("alpha").unlink()
        home.site("alpha").symlink_to(target)
        assert (registry.holder_of(alpha_pem), registry.holder_of(beta_pem)) == (None, "beta")
        with pytest.raises(ConfigError, match=r"alpha\.yaml: cannot be read"):
            registry.sites()


class Later:
    """A clock that stands where alpha's file was last changed, and `s` seconds after."""

    def __init__(self, home: Home) -> None:
        self._file, self.s = home.site("alpha"), 0.0

    def __call__(self) -> float:
        return self._file.stat().st_ctime + self.s


@pytest.mark.parametrize("length", [0, 3, 30, 60])
def test_half_a_file_goes_on_for_a_moment_to_mean_what_the_whole_did(
    home: Home, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An editor empties it and writes it anew; a site that hears in between that it is not approved would end its
    round."""
    alpha, pem = a_key()
    write(home, "alpha", alpha)
    half, later = home.site("alpha").read_bytes()[:length], Later(home)
    registry = Registry(home, now=later)
    assert registry.holder_of(pem) == "alpha"
    home.site("alpha").write_bytes(half)
    for later.s in (0.0, 1.0, 0.9 * HOLD_S):
        assert registry.holder_of(pem) == "alpha"
    assert len(caplog.messages) == 1
    with pytest.raises(ConfigError, match=r"alpha\.yaml"):  # and nobody else takes it for whole
        registry.approved()
    write(home, "beta", alpha)
    assert registry.holder_of(pem) is None  # a key of two
    home.site("beta").unlink()
    assert registry.holder_of(pem) == "alpha"
    for later.s in (1.01 * HOLD_S, 0.0):  # once out, it takes the whole file to come back
        assert registry.holder_of(pem) is None
    write(home, "alpha", alpha)
    assert registry.holder_of(pem) == "alpha"


@pytest.mark.parametrize("length", [0, 3, 30, 60])
def test_half_a_file_means_nothing_where_the_whole_let_nobody_in(home: Home, length: int) -> None:
    alpha, pem = a_key()
    write(home, "alpha", alpha, "revoked")
    half = home.site("alpha").read_bytes()[:length]
    registry = Registry(home, now=Later(home))
    assert registry.holder_of(pem) is None
    home.site("alpha").write_bytes(half)
    assert registry.holder_of(pem) is None
    write(home, "alpha", alpha)
    assert registry.holder_of(pem) == "alpha"
    home.site("alpha").unlink()
    assert registry.holder_of(pem) is None
    home.site("alpha").write_bytes(half)
    assert registry.holder_of(pem) is None


def test_a_file_that_was_cut_before_its_status_lets_nobody_in(home: Home) -> None:
    """Of a site that was revoked by hand, of which the audit log knows nothing."""
    alpha, pem = a_key()
    write(home, "alpha", alpha, "revoked")
    path = home.site("alpha")
    path.write_text(path.read_text().replace("status: revoked\n", ""))
    assert "status" not in path.read_text()
    assert Registry(home).holder_of(pem) is None


MISTYPED: dict[str, Callable[[str], bytes]] = {
    "the key's case": lambda text: text.replace("status: approved", "Status: revoked").encode(),
    "a letter of the key": lambda text: text.replace("status: approved", "staus: revoked").encode(),
    "a letter of the value": lambda text: text.replace("status: approved", "status: revokd").encode(),
    "the sign": lambda text: text.replace("status: approved", "status = revoked").encode(),
    "a list": lambda text: text.replace("status: approved", "status: [revoked]").encode(),
    "a dash": lambda text: text.replace("status: approved", "status: -revoked").encode(),
    "another key": lambda text: (text + "revoked: true\n").encode(),
    "no value": lambda text: text.replace("status: approved", "status:").encode(),
    "another encoding": lambda text: text.replace("status: approved", "status: revoked").encode("utf-16"),
    "all commented out": lambda text: "".join(f"# {line}" for line in text.splitlines(keepends=True)).encode(),
    "no key": lambda text: "".join(line for line in text.splitlines(keepends=True) if "public" not in line).encode(),
    "another file": lambda _: b"[]",
}


@pytest.mark.parametrize("mistyped", MISTYPED.values(), ids=MISTYPED)
def test_a_file_that_was_mistyped_shuts_its_site_out_at_once(home: Home, mistyped: Callable[[str], bytes]) -> None:
    alpha, pem = a_key()
    write(home, "alpha", alpha)
    registry = Registry(home)
    assert registry.holder_of(pem) == "alpha"
    home.site("alpha").write_bytes(mistyped(home.site("alpha").read_text()))
    assert registry.holder_of(pem) is None


def test_half_a_file_brings_no_revoked_site_back(home: Home) -> None:
    """Its own file was revoked between two questions, and then saved by half: the audit log remembers."""
    alpha, pem = a_key()
    note = coordinator_log(home.audit).record
    write(home, "alpha", alpha)
    registry = Registry(home)
    assert registry.holder_of(pem) == "alpha"
    assert revoke(home, "alpha", note=note)
    home.site("alpha").write_text("name: al")
    assert registry.holder_of(pem) is None
    write(home, "alpha", alpha)  # or was saved by half before
    assert registry.holder_of(pem) is None


def test_half_a_file_is_asked_for_in_the_audit_log_at_each_question(home: Home) -> None:
    alpha, pem = a_key()
    write(home, "alpha", alpha)
    registry = Registry(home)
    assert registry.holder_of(pem) == "alpha"
    home.site("alpha").write_text("name: al")
    assert registry.holder_of(pem) == "alpha"
    coordinator_log(home.audit).record("revoke", {"site": "alpha", "fingerprint": keys.fingerprint(alpha)})
    assert registry.holder_of(pem) is None


def test_a_file_under_another_name_lets_nobody_in(home: Home) -> None:
    """Else a copy of a revoked site's file would bring it back."""
    alpha, pem = a_key()
    write(home, "alpha", alpha, file="other.yaml")
    assert Registry(home).holder_of(pem) is None
    with pytest.raises(ConfigError, match="is of the site 'alpha'; rename"):
        Registry(home).sites()


@pytest.mark.parametrize("status", ["approved", "revoked"])
def test_a_key_of_two_sites_is_a_key_of_none(home: Home, status: str) -> None:
    alpha, pem = a_key()
    write(home, "alpha", alpha)
    write(home, "beta", alpha, status)
    assert Registry(home).holder_of(pem) is None


def test_without_a_folder_nobody_is_let_in(home: Home) -> None:
    assert Registry(home).holder_of(a_key()[1]) is None
    assert Registry(home).sites() == {}


def test_a_file_is_read_once_and_again_when_it_changed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question comes with every request of every site."""
    (alpha, of_alpha), (beta, of_beta) = a_key(), a_key()
    write(home, "alpha", alpha)
    write(home, "beta", beta)
    read: list[str] = []

    def seen(kind: type[ApprovedSite], path: Path) -> ApprovedSite:
        read.append(path.name)
        return load(kind, path)

    monkeypatch.setattr("server.registry.load", seen)
    registry = Registry(home)
    for _ in range(3):
        assert [registry.holder_of(pem) for pem in (of_alpha, of_beta)] == ["alpha", "beta"]
    assert read == ["alpha.yaml", "beta.yaml"]
    write(home, "beta", beta, "revoked")
    assert [registry.holder_of(pem) for pem in (of_alpha, of_beta)] == ["alpha", None]
    assert read == ["alpha.yaml", "beta.yaml", "beta.yaml"]


def test_a_coordinator_file_lists_what_was_registered() -> None:
    key, _ = a_key()
    site = ApprovedSite(name="alpha", public_key=keys.public_line(key), status="approved", max_images=7)
    listed = registered(site)
    assert (listed.name, listed.public_key, listed.max_images) == ("alpha", site.public_key, 7)
    assert "status" not in listed.model_dump()


def test_a_file_from_before_its_site_was_revoked_lets_nobody_in(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    """A backup of sites/ was put back; the audit log remembers. Said once, and mended by the command that it names."""
    (alpha, alpha_pem), (beta, beta_pem) = a_key(), a_key()
    note = coordinator_log(home.audit).record
    for name, key in (("alpha", alpha), ("beta", beta)):
        write(home, name, key)
        note("approve", {"site": name, "fingerprint": keys.fingerprint(key)})
    before = home.site("alpha").read_bytes()
    registry = Registry(home)
    assert registry.holder_of(alpha_pem) == "alpha"
    assert revoke(home, "alpha", note=note)
    home.site("alpha").write_bytes(before)
    for asked in (registry, Registry(home)):
        caplog.clear()
        assert [asked.holder_of(alpha_pem), asked.holder_of(beta_pem)] == [None, "beta"]
        assert [site.name for site in asked.approved()] == ["beta"]
        (said,) = caplog.messages
        assert "`unimiss-server revoke alpha --yes` mends it" in said
    (home.path / "alpha.pub").write_text(keys.public_line(alpha) + "\n")
    with pytest.raises(ConfigError, match="was revoked and is not given again"):
        approve(home, "alpha", home.path / "alpha.pub", now=datetime.now(UTC))
    assert revoke(home, "alpha", note=note)
    assert "revoked" in home.site("alpha").read_text()
    assert not revoke(home, "alpha", note=note)


def test_a_revocation_that_the_audit_log_lacks_is_written_by_the_same_command_again(home: Home) -> None:
    """The disk was full at the log's line, or the process was killed before it."""
    alpha, pem = a_key()
    write(home, "alpha", alpha)
    before = home.site("alpha").read_bytes()

    def full(*_: object) -> None:
        raise AuditError("no room")

    with pytest.raises(AuditError):
        revoke(home, "alpha", note=full)
    assert Registry(home).holder_of(pem) is None  # it is out all the same
    note = coordinator_log(home.audit).record
    assert revoke(home, "alpha", note=note)
    assert not revoke(home, "alpha", note=note)
    assert home.audit.read_text().count('"revoke"') == 1
    home.site("alpha").write_bytes(before)
    assert Registry(home).holder_of(pem) is None
    assert Registry(home).approved() == ()


def test_what_was_done_with_a_key_last_is_what_counts(home: Home) -> None:
    """Also where the line comes after the file, as `approve` writes them."""
    alpha, pem = a_key()
    note, told = coordinator_log(home.audit).record, {"site": "alpha", "fingerprint": keys.fingerprint(alpha)}
    note("approve", told)
    note("revoke", told)
    write(home, "alpha", alpha)
    registry = Registry(home)
    assert registry.holder_of(pem) is None
    note("approve", told)
    assert registry.holder_of(pem) == "alpha"


def test_a_log_that_is_moved_away_leaves_what_the_files_say(home: Home) -> None:
    alpha, pem = a_key()
    coordinator_log(home.audit).record("revoke", {"site": "alpha", "fingerprint": keys.fingerprint(alpha)})
    write(home, "alpha", alpha)
    registry = Registry(home)
    assert registry.holder_of(pem) is None
    home.audit.unlink()
    assert registry.holder_of(pem) == "alpha"
