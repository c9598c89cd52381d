"""Two sites of one hospital, of two federations, that count what their patients cost in one ledger."""

import json
import os
from pathlib import Path
from threading import Thread

import pytest
import yaml

from client.ledger import Asked, Ledger, ledger_of
from client.readiness import Point, shared_ledger
from client.shared_ledger import NOTE
from client.site_command import main
from client.site_config import PatientLimits, load_site
from client.terms import check_ledger, check_terms, terms
from tests.federation import small_study
from tests.test_ledger import ROUND_COST, by_hand, private, releases
from tests.test_ledger_command import rows
from unimiss_core import durable
from unimiss_core.errors import ConfigError, LedgerError, PrivacyBudgetError
from unimiss_core.study import StudyConfig

RUNS = {"north": "1" * 16, "south": "2" * 16}


def site_file(folder: Path, name: str, *, ledger: str | None = "../both", **privacy: object) -> Path:
    (folder / name / "scans").mkdir(parents=True)
    (folder / "both").mkdir(exist_ok=True)
    raw = {"name": name, "data": [{"folder": "scans"}], "state": "state", **({"ledger": ledger} if ledger else {})}
    path = folder / name / "site.yaml"
    path.write_text(yaml.safe_dump({**raw, "privacy": {"holds": ["images"], "max_epsilon": 8.0, **privacy}}))
    return path


def opened(site: Path, max_epsilon: float | None = None) -> Ledger:
    """Its ledger, with an epsilon that can be done by hand."""
    config = load_site(site)
    return Ledger(config.state, PatientLimits(max_epsilon=max_epsilon), by_hand, shared=config.ledger)


def go_through(ledger: Ledger, study: StudyConfig, run: str, round: int, reply: bytes) -> bytes:
    asked = Asked(study, run, round, "a" * 64)
    with ledger.alone(run):
        if (sent := ledger.reply_of(asked)) is not None:
            return sent
        ledger.record_reply(ledger.reserve(asked, releases()), reply)
    return reply


def test_what_either_releases_counts_for_both_and_each_keeps_its_replies(tmp_path: Path) -> None:
    sites = {name: site_file(tmp_path, name) for name in RUNS}
    studies = {"north": private("chest"), "south": private("ward")}
    for round in (1, 2):
        for name, site in sites.items():
            assert go_through(opened(site), studies[name], RUNS[name], round, name.encode()) == name.encode()
    for name, site in sites.items():
        ledger = opened(site)
        assert ledger.site_account().spent == pytest.approx(4 * ROUND_COST)
        assert [account.spent for account in ledger.study_accounts().values()] == pytest.approx([2 * ROUND_COST] * 2)
        assert go_through(ledger, studies[name], RUNS[name], 2, b"another") == name.encode()
        assert not (load_site(site).state / "ledger.jsonl").exists()
    assert opened(sites["north"]).site_account().rounds == 4
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["ledger.head", "ledger.jsonl"]


def test_a_round_goes_on_under_its_own_charge_though_the_other_was_charged_since(tmp_path: Path) -> None:
    north, south = (opened(site_file(tmp_path, name)) for name in RUNS)
    first = Asked(private("chest"), RUNS["north"], 1, "a" * 64)
    with north.alone(RUNS["north"]):
        begun = north.reserve(first, releases())
    go_through(south, private("ward"), RUNS["south"], 1, b"south")
    with north.alone(RUNS["north"]):
        assert north.reserve(first, releases()) == begun
        north.record_reply(begun, b"north")
    assert north.site_account().rounds == 2


def test_each_refuses_what_both_together_may_not_cost(tmp_path: Path) -> None:
    north, south = (opened(site_file(tmp_path, name), max_epsilon=2.5 * ROUND_COST) for name in RUNS)
    go_through(north, private("chest"), RUNS["north"], 1, b"1")
    go_through(south, private("ward"), RUNS["south"], 1, b"1")
    for ledger, study, run in ((north, private("chest"), RUNS["north"]), (south, private("ward"), RUNS["south"])):
        with pytest.raises(PrivacyBudgetError, match=r"above 0\.625 that this site allows over all studies"):
            go_through(ledger, study, run, 2, b"2")
    assert north.site_account().spent == pytest.approx(2 * ROUND_COST)


def test_heads_that_two_coordinators_keep_both_stay_true(tmp_path: Path) -> None:
    north, south = (opened(site_file(tmp_path, name)) for name in RUNS)
    known = {}
    for round in (1, 2, 3):
        for name, ledger in (("north", north), ("south", south)):
            go_through(ledger, private(name), RUNS[name], round, b"x")
            known[name, round] = ledger.head
    for head in known.values():
        north.check_known(head)
        south.check_known(head)
    lines = (tmp_path / "both" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "both" / "ledger.jsonl").write_bytes(b"".join(lines[:6]))
    (tmp_path / "both" / "ledger.head").write_text(json.dumps(known["north", 2]._asdict()) + "\n")  # put back, both
    for ledger in (north, south):
        ledger.check_known(known["north", 2])
        with pytest.raises(LedgerError, match="was put back to an older one"):
            ledger.check_known(known["south", 2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_processes_of_both_that_charge_at_once_never_spend_more_than_the_limit(tmp_path: Path) -> None:
    sites = {name: site_file(tmp_path, name) for name in RUNS}
    children = []
    for name, site in sites.items():
        if (child := os.fork()) == 0:  # pragma: no cover
            code = 1
            try:
                for round in range(1, 20):
                    try:
                        go_through(opened(site, 7 * ROUND_COST), private(name, rounds=30), RUNS[name], round, b"x")
                    except PrivacyBudgetError:
                        code = 0
                        break
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    account = opened(sites["north"]).site_account()
    assert (account.rounds, account.spent) == (7, pytest.approx(7 * ROUND_COST))


def test_two_sites_in_one_run_go_on_under_no_charge_of_the_others(tmp_path: Path) -> None:
    """A coordinator of both may choose one id, or a hospital join one federation twice; the requests may be equal."""
    run, study = RUNS["north"], private("chest")
    north, south = (opened(site_file(tmp_path, name)) for name in RUNS)
    asked = Asked(study, run, 1, "a" * 64)
    with north.alone(run), south.alone(run):
        first, second = (ledger.reserve(asked, releases()) for ledger in (north, south))
        assert first.seq != second.seq
        south.record_reply(second, b"south")
        assert north.reply_of(asked) is None
        assert north.reserve(asked, releases()) == first
        north.record_reply(first, b"north")
    for ledger, reply in ((north, b"north"), (south, b"south")):
        assert go_through(ledger, study, run, 1, b"another") == reply
        assert ledger.site_account().rounds == 2
    go_through(south, study, run, 2, b"south")
    charged = [ledger.newest_charge(study) for ledger in (north, south)]
    assert [request and request.round for request in charged] == [1, 2]
    assert "owner" in (tmp_path / "both" / "ledger.jsonl").read_text()


def test_a_ledger_of_one_site_is_written_as_it_always_was(tmp_path: Path) -> None:
    go_through(opened(site_file(tmp_path, "north", ledger=None)), private("chest"), RUNS["north"], 1, b"x")
    state = tmp_path / "north" / "state"
    assert "owner" not in (state / "ledger.jsonl").read_text()
    assert not (state / NOTE).exists()


def test_a_site_that_writes_its_reply_keeps_the_other_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north, south = (opened(site_file(tmp_path, name)) for name in RUNS)
    really, went_on = durable.write_bytes, []

    def slow_disk(path: Path, payload: bytes) -> None:
        if path.name.startswith("reply-") and not went_on:
            other = Thread(target=lambda: went_on.append(south.head), daemon=True)
            other.start()
            other.join(timeout=20)
        really(path, payload)

    monkeypatch.setattr(durable, "write_bytes", slow_disk)
    go_through(north, private("chest"), RUNS["north"], 1, b"x")
    assert len(went_on) == 1


# ------------------------------------------------------------------------------------------------------ mistakes, words


def test_a_site_file_that_lost_the_setting_does_not_begin_from_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_file(tmp_path, "north")
    go_through(opened(site), private("chest"), RUNS["north"], 1, b"x")
    written, state = site.read_text(), load_site(site).state
    (tmp_path / "copy").mkdir()
    for changed, told in ((written.replace("../both", "../copy"), "names another"), ("", "is left out")):
        site.write_text(changed or written.replace("ledger: ../both\n", ""))
        for words in (["ledger", str(site)], ["ledger", str(site), "--begin-anew"]):
            assert main(words) == 6
            assert f"'ledger' of its file {told}" in " ".join(capsys.readouterr().err.split())
        (point,) = readiness_of(site)
        assert point.mark == "bad"
    assert not (state / "audit.jsonl").exists()
    assert list((tmp_path / "copy").iterdir()) == []
    (tmp_path / "both").rename(tmp_path / "moved")
    (state / NOTE).unlink()
    site.write_text(written.replace("../both", "../moved"))
    check_ledger(load_site(site), ledger_of(load_site(site)))
    go_through(opened(site), private("chest"), RUNS["north"], 2, b"x")
    assert opened(site).site_account().rounds == 2
    (state / NOTE).write_text("{}")
    assert main(["ledger", str(site)]) == 6
    assert f"'{NOTE}' of the state folder is damaged" in capsys.readouterr().err


def readiness_of(site: Path) -> list[Point]:
    return [shared_ledger(load_site(site))]


@pytest.mark.parametrize(
    ("where", "told"),
    [("../nowhere", "names no folder"), ("site.yaml", "names no folder"), ("state/flower", "lies below the state")],
)
def test_a_folder_that_is_none_is_told_before_anything_is_charged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, told: str
) -> None:
    site = site_file(tmp_path, "north", ledger=where)
    assert main(["ledger", str(site)]) == 2
    assert f"'ledger' {told}" in capsys.readouterr().err
    (point,) = readiness_of(site)
    assert (point.mark, told in point.words) == ("bad", True)
    assert not (tmp_path / "nowhere").exists()


def test_entries_are_told_by_which_two_operators_see_that_it_is_one(tmp_path: Path) -> None:
    sites = [site_file(tmp_path, name) for name in RUNS]
    go_through(opened(sites[0]), private("chest"), RUNS["north"], 1, b"x")
    points = [point for site in sites for point in readiness_of(site)]
    assert [point.words for point in points] == [points[0].words] * 2
    assert points[0].words.startswith(f"2 entries in {(tmp_path / 'both').resolve()}")


def test_a_site_that_was_charged_alone_forgets_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = site_file(tmp_path, "north", ledger=None)
    go_through(opened(alone), private("chest"), RUNS["north"], 1, b"x")
    alone.write_text(alone.read_text() + "ledger: ../both\n")
    config = load_site(alone)
    with pytest.raises(
        LedgerError, match="its state folder holds a ledger that is begun, and 'ledger' of the site file"
    ):
        check_ledger(config, ledger_of(config))
    with pytest.raises(LedgerError, match="its state folder holds a ledger that is begun"):
        check_terms(config, private("ward"), ledger_of(config))
    assert main(["ledger", str(alone)]) == 6
    assert main(["ledger", str(alone), "--begin-anew"]) == 6
    assert not (config.state / "audit.jsonl").exists()
    said = capsys.readouterr().err
    assert "docs/site.md, 'In two federations at once'" in said
    (tmp_path / "link").symlink_to(tmp_path / "north" / "state")
    for own in ("state", str((tmp_path / "north" / "state").resolve()), "../link"):  # it names its own
        alone.write_text(alone.read_text().replace("ledger: ../both", f"ledger: {own}"))
        check_ledger(load_site(alone), ledger_of(load_site(alone)))
        alone.write_text(alone.read_text().replace(f"ledger: {own}", "ledger: ../both"))
    other = site_file(tmp_path, "south", ledger="../north/state")
    config = load_site(other)
    check_ledger(config, ledger_of(config))
    assert ledger_of(config).is_begun


def test_both_refuse_studies_that_charge_nothing_once_either_was_charged(tmp_path: Path) -> None:
    north, south = (site_file(tmp_path, name, max_epsilon=None) for name in RUNS)
    of_south = load_site(south)
    check_terms(of_south, small_study(), ledger_of(of_south))
    go_through(opened(north), private("chest"), RUNS["north"], 1, b"x")
    with pytest.raises(PrivacyBudgetError, match="its patients were charged before"):
        check_terms(of_south, small_study(), ledger_of(of_south))
    alone = load_site(site_file(tmp_path, "alone", ledger=None))
    for site, is_shared in ((of_south, True), (alone, False)):
        said = " ".join(terms(site, ledger_of(site)))
        assert ("counted together with every other site whose file names the same ledger" in said) == is_shared


def test_the_command_tells_what_both_have_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sites = {name: site_file(tmp_path, name) for name in RUNS}
    for name, site in sites.items():
        go_through(opened(site), private(name), RUNS[name], 1, b"x")
    told = []
    for site in sites.values():
        assert main(["ledger", str(site)]) == 0
        told.append(rows(capsys.readouterr().out))
    assert told[0] == told[1]
    assert [row[0] for row in told[0]] == ["north", "south", "all of this ledger's sites"]
    assert [row[2] for row in told[0]] == ["1", "1", "2"]


def test_a_ledger_among_scans_is_refused(tmp_path: Path) -> None:
    site = site_file(tmp_path, "north", ledger="scans/ledger")
    with pytest.raises(ConfigError, match=r"'ledger': .* lies in a folder of scans"):
        load_site(site)
