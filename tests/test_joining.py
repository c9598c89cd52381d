"""How a site and a coordinator come to know each other, by the commands that people type."""

import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from client import site_command
from client.audit import log_of
from client.daemon import LOCK
from client.home import Home as SiteHome
from client.ledger import Ledger
from client.site_config import SiteConfig, load_site
from server import server_command
from server.approval import approve, renew
from server.audit import coordinator_log
from server.coordinator_config import CoordinatorConfig
from server.home import Home
from tests.test_certificates import NOW, handshake
from tests.test_ledger import private
from tests.test_ledger_command import charge
from unimiss_core import certificates, keys, locks, tls
from unimiss_core.config import load, parse
from unimiss_core.errors import ConfigError
from unimiss_core.joining import host_and_port, read_welcome
from unimiss_core.study import StudyConfig
from unimiss_core.yaml_files import read_yaml


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> "Typed":
    typed = Typed(server_command.main, tmp_path / "coordinator", capsys)
    assert typed("init", str(typed.folder), "--address", "unimiss.example.org:443", home=False).code == 0
    return typed


@pytest.fixture
def alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> "Typed":
    return begun(tmp_path, capsys, "alpha")


class Typed:
    """A command on one folder."""

    def __init__(self, main: object, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.main, self.folder, self.capsys = main, folder, capsys

    def __call__(self, *words: str | Path, home: bool = True) -> Said:
        at = ["--home", str(self.folder)] if home else []
        code = self.main([*map(str, words), *at])  # type: ignore[operator]
        return Said(code, *self.capsys.readouterr())


def filled_in(typed: Typed) -> Path:
    """The site file, its data folder being there."""
    (typed.folder / "scans").mkdir()
    site_file = typed.folder / "site.yaml"
    site_file.write_text(site_file.read_text().replace("/path/to/dicom", "scans"))
    return site_file


def begun(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> Typed:
    typed = Typed(site_command.main, folder / name, capsys)
    assert typed("init", typed.folder, "--name", name, home=False).code == 0
    return typed


def test_from_two_empty_folders_to_a_handshake(server: Typed, alpha: Typed) -> None:
    ours, theirs = Home(server.folder), SiteHome(alpha.folder)
    approved = server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    site_key = keys.read_site_key(theirs.private_key).public_key()
    assert approved.code == 0
    assert keys.fingerprint(site_key) in approved.out
    assert "by telephone" in approved.out
    joined = alpha("join", ours.welcome("alpha"))
    assert joined.code == 0
    assert keys.fingerprint(keys.read_signing_public_key(ours.signing_public_key)) in joined.out
    listener = tls.coordinator_side(
        certificate=ours.server_certificate, key=ours.server_key, authority=ours.authority_certificate
    )
    caller = tls.site_side(certificate=theirs.certificate, key=theirs.tls_key, authority=theirs.authority)
    shown = handshake(listener, caller)
    assert shown
    assert certificates.key_of_peer(shown) == keys.pem_of_public(site_key)


def test_secrets_are_for_their_owner_alone(server: Typed, alpha: Typed) -> None:
    ours, theirs = Home(server.folder), SiteHome(alpha.folder)
    for folder in (ours.secrets, ours.flower, theirs.keys):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for file in (*ours.secrets.iterdir(), theirs.private_key, theirs.tls_key):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_nothing_that_is_handed_over_holds_a_secret(server: Typed, alpha: Typed) -> None:
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    ours, theirs = Home(server.folder), SiteHome(alpha.folder)
    for paper in (theirs.join_request("alpha"), ours.welcome("alpha")):
        assert "PRIVATE" not in paper.read_text()
    for secret in (ours.authority_key, ours.server_key, ours.signing_key, theirs.private_key, theirs.tls_key):
        body = "".join(line for line in secret.read_text().splitlines() if "PRIVATE" not in line)
        others = [path for path in server.folder.rglob("*") if path.is_file() and path.parent != ours.secrets]
        others += [path for path in alpha.folder.iterdir() if path.is_file()]
        assert not [path for path in others if body[:40] in path.read_text().replace("\n", "")]


def test_examples_are_right(server: Typed, alpha: Typed) -> None:
    ours = Home(server.folder)
    study = load(StudyConfig, ours.study)
    nano = load(StudyConfig, Path(__file__).parents[1] / "configs" / "study" / "nano.yaml")
    assert study.model_copy(update={"name": "nano"}).digest() == nano.digest()
    raw = read_yaml(ours.coordinator) | {"study": "study.yaml", "out": "out"}
    assert parse(CoordinatorConfig, raw, where="coordinator.yaml").min_sites == 2
    assert load(SiteConfig, SiteHome(alpha.folder).site).name == "alpha"


def test_a_folder_is_not_begun_twice(server: Typed, alpha: Typed) -> None:
    before = {path: path.read_bytes() for path in server.folder.rglob("*") if path.is_file()}
    again = server("init", server.folder, "--address", "a.example.org:1", home=False)
    assert (again.code, "is a coordinator's folder already" in again.err) == (2, True)
    assert "delete" not in again.err
    assert {path: path.read_bytes() for path in server.folder.rglob("*") if path.is_file()} == before
    key = SiteHome(alpha.folder).private_key.read_bytes()
    again = alpha("init", alpha.folder, "--name", "alpha", home=False)
    assert (again.code, "holds a site's keys already" in again.err) == (2, True)
    assert SiteHome(alpha.folder).private_key.read_bytes() == key


def test_a_site_file_that_was_there_is_kept_and_must_bear_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alpha").mkdir()
    (tmp_path / "alpha" / "site.yaml").write_text("name: beta\nstate: here\n")
    typed = Typed(site_command.main, tmp_path / "alpha", capsys)
    said = typed("init", typed.folder, "--name", "alpha", home=False)
    assert (said.code, "is of the site 'beta', not 'alpha'" in said.err) == (2, True)
    assert not (tmp_path / "alpha" / "keys").exists()
    assert typed("init", typed.folder, "--name", "beta", home=False).code == 0
    assert (tmp_path / "alpha" / "site.yaml").read_text() == "name: beta\nstate: here\n"


@pytest.mark.parametrize(
    "address", ["example.org", "example.org:", ":443", "Example.org:443", "a b:1", "x:0", "x:65536", "1.2.3:4", "::1:4"]
)
def test_an_address_that_is_none_is_told_and_nothing_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    said = Typed(server_command.main, tmp_path / "c", capsys)("init", tmp_path / "c", "--address", address, home=False)
    assert (said.code, said.err.startswith("unimiss-server: --address: ")) == (2, True), said.err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_there_cannot_be_is_told_with_the_range(port: str) -> None:
    with pytest.raises(ValueError, match=f"a port is a number from 1 to 65535, got {port}"):
        host_and_port(f"127.0.0.1:{port}")


def test_addresses_are_taken_apart() -> None:
    assert host_and_port("unimiss.example.org:443") == ("unimiss.example.org", 443)
    assert host_and_port("127.0.0.1:9000") == ("127.0.0.1", 9000)
    assert host_and_port("[2001:db8::7]:443") == ("2001:db8::7", 443)


@pytest.mark.parametrize("name", ["Alpha", "../alpha", "", "a" * 65])
def test_a_name_that_cannot_be_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = Typed(site_command.main, tmp_path / "s", capsys)("init", tmp_path / "s", "--name", name, home=False)
    assert (said.code, "expected lower-case letters" in said.err) == (2, True), said.err
    assert not (tmp_path / "s").exists()


def test_approving_twice_is_fine_and_keeps_what_was_given(server: Typed, alpha: Typed) -> None:
    words = ("approve", "alpha", "--key", alpha.folder / "keys" / "site.pub")
    assert server(*words).code == 0
    ours = Home(server.folder)
    kept = {path: path.read_bytes() for path in (ours.site("alpha"), ours.welcome("alpha"))}
    again = server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    assert (again.code, "was approved before, with the same key" in again.out) == (0, True)
    assert {path: path.read_bytes() for path in kept} == kept
    ours.welcome("alpha").unlink()
    assert server(*words).code == 0
    assert ours.welcome("alpha").exists()


def test_neither_name_nor_key_is_given_twice(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impostor = begun(tmp_path / "elsewhere", capsys, "alpha")
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    before = Home(server.folder).site("alpha").read_bytes()
    other_key = server("approve", "alpha", "--key", impostor.folder / "alpha.join.yaml")
    assert (other_key.code, "'alpha': was approved with another key (SHA256:" in other_key.err) == (2, True)
    other_name = server("approve", "beta", "--key", alpha.folder / "keys" / "site.pub")
    assert (other_name.code, "the site 'alpha' has this key already" in other_name.err) == (2, True)
    assert Home(server.folder).site("alpha").read_bytes() == before


def test_a_name_and_a_key_that_were_revoked_do_not_come_back(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    unsure = server("revoke", "alpha")
    assert (unsure.code, "at once and for ever" in unsure.err) == (2, True)
    assert f"unimiss-server revoke alpha --yes --home {server.folder}" in unsure.err
    assert Home(server.folder).welcome("alpha").exists()
    assert "shut out from its next request on" in server("revoke", "alpha", "--yes").out
    assert not Home(server.folder).welcome("alpha").exists()
    assert "was revoked before" in server("revoke", "alpha", "--yes").out
    anew = begun(tmp_path / "anew", capsys, "alpha")
    for words in (
        ("alpha", "--key", alpha.folder / "alpha.join.yaml"),
        ("alpha", "--key", anew.folder / "alpha.join.yaml"),
        ("beta", "--key", alpha.folder / "keys" / "site.pub"),
    ):
        said = server("approve", *words)
        assert (said.code, "was revoked and is not given again" in said.err) == (2, True), said.err
    assert "alpha  revoked" in server("sites").out


def test_what_cannot_be_written_down_is_not_done_but_to_shut_a_site_out(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beta, home = begun(tmp_path / "beta", capsys, "beta"), Home(server.folder)
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    sound, welcome = home.audit.read_bytes(), home.welcome("alpha").read_bytes()
    home.audit.write_bytes(sound.replace(b'"approve"', b'"approvd"'))
    assert server("approve", "beta", "--key", beta.folder / "beta.join.yaml").code == 8
    assert server("renew", "--all").code == 8
    assert (home.site("beta").exists(), home.welcome("alpha").read_bytes()) == (False, welcome)
    said = server("revoke", "alpha", "--yes")
    assert (said.code, "'alpha' is shut out, and that could not be written down" in said.err) == (8, True), said.err
    assert "revoke it again" in said.err
    assert "alpha  revoked" in server("sites").out
    home.audit.write_bytes(sound)
    assert server("revoke", "alpha", "--yes").code == 0
    assert b'"revoke"' in home.audit.read_bytes()
    log = alpha.folder / "state" / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"init"', b'"inot"'))
    (tmp_path / "welcome.yaml").write_bytes(welcome)
    assert alpha("join", tmp_path / "welcome.yaml").code == 8
    assert not SiteHome(alpha.folder).welcome.exists()


def test_a_site_whose_file_cannot_be_read_is_revoked_all_the_same(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand, with a mistake; and another's file is damaged as well."""
    beta, home = begun(tmp_path / "beta", capsys, "beta"), Home(server.folder)
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    server("approve", "beta", "--key", beta.folder / "beta.join.yaml")
    text = home.site("alpha").read_text()
    home.site("alpha").write_text(text.replace("status: approved", "Status: revoked"))
    home.site("beta").write_text("")
    assert "would be shut out" in server("revoke", "alpha").err
    assert "shut out from its next request on" in server("revoke", "alpha", "--yes").out
    assert home.site("alpha").read_text() == text.replace("status: approved", "status: revoked")
    assert "was revoked before" in server("revoke", "alpha", "--yes").out

    home.welcome("beta").write_bytes(b"")  # now nothing tells the key but the audit log
    said = server("revoke", "beta", "--yes")
    assert (said.code, "'beta' is shut out" in said.err, "beta.unreadable" in said.err) == (2, True, True)
    assert server("sites").out.count("revoked") == 1
    last = home.audit.read_text().splitlines()[-1]
    assert f'"fingerprint":"{_fingerprint_of(beta)}"' in last.replace(" ", "")
    assert '"revoke"' in last
    assert "'beta' is no site" in server("revoke", "beta", "--yes").err


def folder_at(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop_at(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("spoil", [folder_at, loop_at])
@pytest.mark.parametrize("spoilt", ["site", "welcome"])
def test_no_folder_and_no_loop_in_a_files_place_keeps_a_site_in(
    server: Typed, alpha: Typed, spoil: Callable[[Path], None], spoilt: str
) -> None:
    home = Home(server.folder)
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    spoil(getattr(home, spoilt)("alpha"))
    assert "shut out from its next request on" in server("revoke", "alpha", "--yes").out
    assert "alpha  revoked" in server("sites").out
    assert '"revoke"' in home.audit.read_text().splitlines()[-1]


def test_a_folder_that_takes_the_name_of_what_was_put_aside_keeps_no_site_in(server: Typed, alpha: Typed) -> None:
    home = Home(server.folder)
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    for path in (home.site("alpha"), home.welcome("alpha")):
        folder_at(path)
    (home.sites / "alpha.unreadable" / "x").mkdir(parents=True)
    said = server("revoke", "alpha", "--yes")
    assert (said.code, "'alpha' is shut out" in said.err, "alpha.unreadable1" in said.err) == (2, True, True), said.err


def test_renew_tells_of_a_folder_in_a_welcomes_place_and_replaces_a_loop(server: Typed, alpha: Typed) -> None:
    welcome = Home(server.folder).welcome("alpha")
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    folder_at(welcome)
    said = server("renew")
    assert (said.code, said.err) == (2, f"unimiss-server: {welcome}: is a folder, where a file belongs; move it away\n")
    welcome.rmdir()
    welcome.symlink_to(welcome.name)
    assert server("renew").code == 0
    assert "site: alpha" in welcome.read_text()


def test_no_name_leads_a_revocation_to_another_file(server: Typed) -> None:
    before = (server.folder / "coordinator.yaml").read_bytes()
    assert "is no site" in server("revoke", "../coordinator", "--yes").err
    assert (server.folder / "coordinator.yaml").read_bytes() == before


def test_a_welcome_of_another_key_than_was_approved_revokes_no_other(server: Typed, alpha: Typed) -> None:
    """Of another coordinator, say, which knows another site of this name."""
    home, fingerprint = Home(server.folder), "SHA256:" + 43 * "A"
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    coordinator_log(home.audit).record("approve", {"site": "alpha", "fingerprint": fingerprint})
    home.site("alpha").write_text("")
    assert "alpha.unreadable" in server("revoke", "alpha", "--yes").err
    assert fingerprint in home.audit.read_text().splitlines()[-1]
    assert not home.welcome("alpha").exists()


def _fingerprint_of(site: Typed) -> str:
    return keys.fingerprint(keys.site_public_key((site.folder / "keys" / "site.pub").read_text(), "site"))


def test_under_another_name_ledger_and_audit_log_go_on(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As each message of a name that is not given again says."""
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    charge(filled_in(alpha), private("ward", rounds=9), range(1, 4))
    (alpha.folder / "state").rename(moved := tmp_path / "var: lib #1")  # as on a disk of its own
    server("revoke", "alpha", "--yes")
    refused = server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml").err
    assert "unimiss-site init FOLDER --name NAME --state STATE" in refused
    beta = Typed(site_command.main, tmp_path / "beta", capsys)
    said = beta("init", beta.folder, "--name", "beta", "--state", moved, home=False)
    assert (said.code, "privacy, policy, ledger and state_key" in said.out) == (0, True)
    assert server("approve", "beta", "--key", beta.folder / "beta.join.yaml").code == 0
    assert beta("join", Home(server.folder).welcome("beta")).code == 0
    site_file = filled_in(beta)
    site = load_site(site_file)
    assert site.state == moved
    assert not (beta.folder / "state").exists()
    again = Ledger(site.state, site.privacy, lambda *_: 1.0)
    assert again.head.seq == again.site_account().rounds == 3
    told = log_of(site_file).read().entries
    assert [(entry.kind, entry.model_dump().get("site")) for entry in told] == [
        ("init", "alpha"),
        ("init", "beta"),
        ("join", "beta"),
    ]


def test_only_a_state_folder_that_nobody_uses_is_gone_on_with(
    alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beta, state = Typed(site_command.main, tmp_path / "beta", capsys), alpha.folder / "state"

    def begin(state: Path) -> Said:
        return beta("init", beta.folder, "--name", "beta", "--state", state, home=False)

    for wrong in (tmp_path / "nowhere", alpha.folder):
        said = begin(wrong)
        assert (said.code, "is no site's state folder" in said.err) == (2, True)
    with (state / LOCK).open("ab") as file, locks.locked(file):
        said = begin(state)
    assert (said.code, "a daemon runs with it; stop that first" in said.err) == (2, True)
    assert not beta.folder.exists()
    beta.folder.mkdir()
    (beta.folder / "site.yaml").write_text("name: beta\nstate: elsewhere\n")
    said = begin(state)
    assert (said.code, "says another 'state'" in said.err) == (2, True)
    assert not (beta.folder / "keys").exists()


def test_revoking_an_unknown_site_tells_who_is_known(server: Typed, alpha: Typed) -> None:
    assert "no site was ever approved here" in server("revoke", "beta", "--yes").err
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    for words in (("beta", "--yes"), ("beta",)):
        said = server("revoke", *words)
        assert (said.code, "'beta' is no site" in said.err, "there are: alpha" in said.err) == (2, True, True)


def test_the_wrong_paper_is_told_on_either_side(server: Typed, alpha: Typed) -> None:
    join_request = alpha.folder / "alpha.join.yaml"
    said = server("approve", "beta", "--key", join_request)
    assert (said.code, "is the join request of the site 'alpha', not of 'beta'" in said.err) == (2, True)
    server("approve", "alpha", "--key", join_request)
    welcome = Home(server.folder).welcome("alpha")
    assert "is a welcome, which goes to the site" in server("approve", "alpha", "--key", welcome).err
    assert "is a join request, which goes to the coordinator" in alpha("join", join_request).err
    assert "holds a PRIVATE key" in server("approve", "alpha", "--key", alpha.folder / "keys" / "site.key").err


def test_a_join_request_whose_key_was_put_in_another_place_is_told(server: Typed, alpha: Typed) -> None:
    paper = alpha.folder / "alpha.join.yaml"
    raw = read_yaml(paper)
    other = keys.public_line(keys.new_site_key().public_key())
    paper.write_text(yaml.safe_dump(raw | {"public_key": other}))
    said = server("approve", "alpha", "--key", paper)
    assert (said.code, "one of the two was changed" in said.err) == (2, True)


def test_papers_come_through_mail_that_changes_line_ends(server: Typed, alpha: Typed) -> None:
    for paper, words in (
        (alpha.folder / "alpha.join.yaml", (server, "approve", "alpha", "--key")),
        (Home(server.folder).welcome("alpha"), (alpha, "join")),
    ):
        paper.write_bytes(paper.read_bytes().replace(b"\n", b"\r\n"))
        typed, *rest = words
        assert typed(*rest, paper).code == 0


@pytest.mark.parametrize("field", ["address", "authority", "certificate", "site"])
def test_a_welcome_that_was_changed_on_its_way_is_told(server: Typed, alpha: Typed, field: str) -> None:
    """The fingerprint that people compare is the signing key's: so it must vouch for all the rest."""
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    welcome = Home(server.folder).welcome("alpha")
    changes = {"address": "evil.example.org:443", "site": "beta"}
    raw = read_yaml(welcome)
    welcome.write_text(yaml.safe_dump(raw | {field: changes.get(field, raw[field] + "\n")}))
    said = alpha("join", welcome)
    assert (said.code, "was changed after the coordinator signed it" in said.err) == (2, True)
    assert not SiteHome(alpha.folder).welcome.exists()


def test_anothers_welcome_is_refused(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beta, twin = begun(tmp_path, capsys, "beta"), begun(tmp_path / "elsewhere", capsys, "alpha")
    for name, typed in {"alpha": alpha, "beta": beta}.items():
        server("approve", name, "--key", typed.folder / f"{name}.join.yaml")
    ours = Home(server.folder)
    assert "is the welcome of the site 'beta', and site.yaml says 'alpha'" in alpha("join", ours.welcome("beta")).err
    assert "for another key than this site's" in twin("join", ours.welcome("alpha")).err


def test_a_second_coordinator_does_not_take_the_place_of_the_first(
    server: Typed, alpha: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rival = Typed(server_command.main, tmp_path / "rival", capsys)
    rival("init", rival.folder, "--address", "rival.example.org:443", home=False)
    for typed in (server, rival):
        typed("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    alpha("join", Home(server.folder).welcome("alpha"))
    before = SiteHome(alpha.folder).authority.read_bytes()
    said = alpha("join", Home(rival.folder).welcome("alpha"))
    assert (said.code, "is of another coordinator" in said.err) == (2, True)
    assert SiteHome(alpha.folder).authority.read_bytes() == before


def test_what_runs_out_is_renewed_and_joined_again(server: Typed, alpha: Typed) -> None:
    ours = Home(server.folder)
    server("approve", "alpha", "--key", alpha.folder / "alpha.join.yaml")
    alpha("join", ours.welcome("alpha"))
    assert "nothing runs out soon" in server("renew").out
    old = {path: path.read_bytes() for path in (ours.server_certificate, ours.welcome("alpha"))}
    later = NOW + certificates.LEAF_LASTS
    assert len(renew(ours, now=later)) == 2
    assert all(path.read_bytes() != payload for path, payload in old.items())
    paper, _ = read_welcome(ours.welcome("alpha"))
    assert certificates.days_left(certificates.certificate_of(paper.certificate, "w"), later) == 730
    said = alpha("join", ours.welcome("alpha"))
    assert (said.code, "has a new welcome of the coordinator" in said.out) == (0, True)


def test_an_authority_that_has_run_out_signs_nothing(server: Typed, alpha: Typed) -> None:
    paper, late = alpha.folder / "alpha.join.yaml", NOW + certificates.AUTHORITY_LASTS + timedelta(days=1)
    with pytest.raises(ConfigError, match=r"authority\.crt: has run out; make a new coordinator's folder"):
        approve(Home(server.folder), "alpha", paper, now=late)
    assert not Home(server.folder).site("alpha").exists()


def test_commands_outside_of_a_folder_tell_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Typed(server_command.main, tmp_path, capsys)("sites")
    assert (nowhere.code, "make one with `unimiss-server init`" in nowhere.err) == (2, True)
    nowhere = Typed(site_command.main, tmp_path, capsys)("join", tmp_path / "w.yaml")
    assert (nowhere.code, "make one with `unimiss-site init`" in nowhere.err) == (2, True)
    folder = Typed(server_command.main, tmp_path / "c", capsys)
    folder("init", folder.folder, "--address", "a.example.org:443", home=False)
    monkeypatch.setenv("UNIMISS_SERVER_HOME", str(folder.folder))
    assert "no site was approved yet" in folder("sites", home=False).out
    unknown = folder("audit", "nonesuch", home=False)
    assert (unknown.code, "'nonesuch': no run of it was begun here; begun were: none" in unknown.err) == (2, True)


def test_a_full_or_locked_folder_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys, "write_private", full)
    said = Typed(server_command.main, tmp_path, capsys)("init", tmp_path / "c", "--address", "a.b:1", home=False)
    assert (said.code, "cannot be written to (No space left on device)" in said.err) == (2, True)
    said = Typed(site_command.main, tmp_path, capsys)("init", tmp_path / "s", "--name", "alpha", home=False)
    assert (said.code, "cannot be written to (No space left on device)" in said.err) == (2, True)
    assert not (tmp_path / "s" / "keys").exists()


def test_operators_acts_are_noted(server: Typed, alpha: Typed) -> None:
    noted: list[tuple[str, object]] = []
    paper = alpha.folder / "alpha.join.yaml"
    done = approve(Home(server.folder), "alpha", paper, now=NOW, note=lambda *said: noted.append(said))
    assert noted == [("approve", {"site": "alpha", "fingerprint": done.fingerprint})]
    with pytest.raises(ConfigError):
        approve(Home(server.folder), "beta", paper, now=NOW, note=lambda *said: noted.append(said))
    assert len(noted) == 1
