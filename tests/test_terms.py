"""Which studies a site takes part in: its own file and ledger decide, before a scan is read, whatever is asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import accounting
from client import site as sites
from client.ledger import ledger_of
from client.site_command import main
from client.site_config import load_site
from client.terms import check_terms
from tests.federation import RUN, small_study
from tests.test_ledger_command import charge
from tests.test_private_rounds import (
    Hospital,
    bytes_of,
    facts_of,
    private_study,
    quick_accountant,  # noqa: F401
    request,
)
from unimiss_core import locks, progress
from unimiss_core.errors import LedgerError, PrivacyBudgetError
from unimiss_core.privacy import mechanisms
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Hello, Refusal

pytestmark = pytest.mark.usefixtures("one_core")

SITE_LEVEL = {"mode": "site", "max_epsilon": 90.0, "noise_multiplier": 4.0, "clip_norm": 1.0, "sites": 5}
PLAIN = small_study()
UNPROTECTED = {
    "none": PLAIN,
    "site": small_study(privacy=SITE_LEVEL, aggregation={"max_size_ratio": None}, batch={"images": 4}),
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read")  # which the site answers with `failed`

    for name in ("open_library", "open_private_library"):
        monkeypatch.setattr(sites, name, read)


def answers(hospital: Hospital, study: StudyConfig) -> tuple[list[Refusal | None], list[str]]:
    """To an introduction and to a round, and what the site's own screen said."""
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        found = [Refusal.found_in(ask(Hello(study, RUN).pack(), "query"))]
        found.append(Refusal.found_in(ask(request(study), "train")))
    return found, [event.text for event in heard if isinstance(event, progress.Note)]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("mode", UNPROTECTED)
def test_a_site_with_a_limit_refuses_what_charges_nothing_before_a_scan_is_read(tmp_path: Path, mode: str) -> None:
    refused, said = answers(Hospital(tmp_path, privacy={"max_epsilon": 8.0}), UNPROTECTED[mode])
    assert refused == [Refusal("budget")] * 2
    assert all(f"has the privacy mode {mode}, which charges patients nothing" in line for line in said)
    assert all("privacy.max_epsilon is set" in line and "allow_unprotected: true" in line for line in said)


@pytest.mark.parametrize("mode", UNPROTECTED)
def test_its_own_file_may_allow_them(tmp_path: Path, mode: str) -> None:
    hospital = Hospital(tmp_path, privacy={"max_epsilon": 8.0, "allow_unprotected": True})
    assert answers(hospital, UNPROTECTED[mode])[0] == [None, None]
    assert hospital.entries == []


def test_patients_who_were_charged_once_are_protected_from_then_on(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path)
    assert answers(hospital, PLAIN)[0] == [None, None]
    with hospital.asked() as ask:
        assert facts_of(ask(request(private_study()), "train"))["status"] == "ok"
    refused, said = answers(hospital, PLAIN)
    assert refused == [Refusal("budget")] * 2
    assert "its patients were charged before" in said[0]


def test_a_damaged_ledger_lets_no_study_in(tmp_path: Path) -> None:
    """It may have been charged, and nobody can tell."""
    site = Hospital(tmp_path).folder / "site.yaml"
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "ledger.head").write_text("something else\n")
    config = load_site(site)
    with pytest.raises(LedgerError):
        check_terms(config, PLAIN, ledger_of(config))


@pytest.mark.usefixtures("unread")
def test_a_site_that_does_not_say_what_it_holds_takes_part_in_no_private_study(tmp_path: Path) -> None:
    refused, said = answers(Hospital(tmp_path, privacy={"holds": None}), private_study())
    assert refused == [Refusal("site_setup")] * 2
    assert "set privacy.holds: [images], [volumes] or both" in said[0]


@pytest.mark.usefixtures("unread")
def test_without_locks_there_is_no_private_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "EXIST", False)
    refused, said = answers(Hospital(tmp_path), private_study())
    assert refused == [Refusal("site_setup")] * 2
    assert "this system has no file locks" in said[0]


def test_where_only_the_study_limits_what_patients_cost_the_site_is_told(tmp_path: Path) -> None:
    def told(name: str, **privacy: object) -> bool:
        with Hospital(tmp_path / name, privacy=privacy).asked() as ask, progress.listen(heard.append):
            ask(Hello(private_study(max_epsilon=50.0), RUN).pack(), "query")
        said = [event.text for event in heard if isinstance(event, progress.Note)]
        return any("only study 'toy' limits what patients may cost, to epsilon 50" in line for line in said)

    heard: list[progress.Event] = []
    assert not told("limited", max_epsilon=60.0)
    assert told("unlimited")


def asks(site: Path, study: StudyConfig) -> Callable[[], None]:
    config = load_site(site)
    return lambda: check_terms(config, study, ledger_of(config))


@pytest.mark.parametrize(
    ("privacy", "private", "others"),
    [
        ({}, "yes, as a site with images; epsilon: this site sets no limit", "yes; what they tell"),
        ({"max_epsilon": 0.29}, "yes, as a site with images; epsilon: at most 0.29 over all", "no, for privacy.max_ep"),
        ({"max_epsilon": 2, "allow_unprotected": True}, "yes, as a site with images", "yes; what they tell"),
        ({"holds": None}, "no; its site file does not say what it trains on", "yes; what they tell"),
        ({"holds": ["images", "volumes"]}, "yes, as a site with images and volumes", "yes; what they tell"),
    ],
)
def test_both_commands_say_which_studies_may_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], privacy: dict[str, Any], private: str, others: str
) -> None:
    site = Hospital(tmp_path, privacy=privacy).folder / "site.yaml"
    for command in ("ledger", "check"):
        assert main([command, str(site)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"Patient-level studies: {private}" in said
        assert f"Other studies: {others}" in said
    if others.startswith("no"):
        with pytest.raises(PrivacyBudgetError):
            asks(site, PLAIN)()
    else:
        asks(site, PLAIN)()


def test_the_ledgers_account_says_that_charged_patients_are_protected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Hospital(tmp_path).folder / "site.yaml"
    charge(site, private_study(), range(1, 2))
    assert main(["ledger", str(site)]) == 0
    assert "Other studies: no, for its patients were charged before" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("limit", [8.0, None])
def test_a_limit_over_an_empty_ledger_is_told_what_it_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: float | None
) -> None:
    site = Hospital(tmp_path, privacy={"max_epsilon": limit}).folder / "site.yaml"
    for expected in (limit is not None, False):
        assert main(["ledger", str(site)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("took part before, under another name" in said) is expected
        charge(site, private_study(), range(1, 2))


def test_check_does_not_promise_what_scans_of_unknown_patients_will_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Hospital(tmp_path, data=[{"folder": "scans"}]).folder / "site.yaml"
    assert main(["check", str(site)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Patient-level studies: no; of 5 scans nothing says whose they are" in said


@pytest.mark.parametrize("limits", [{}, {"max_epsilon": 20.0}])
def test_a_damaged_ledger_is_told_whatever_the_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, Any]
) -> None:
    site = Hospital(tmp_path, privacy=limits).folder / "site.yaml"
    charge(site, private_study(), range(1, 2))
    book = tmp_path / "state" / "ledger.jsonl"
    book.write_bytes(book.read_bytes().replace(b'"round":1', b'"round":2', 1).replace(b'"round": 1', b'"round": 2', 1))
    assert main(["check", str(site)]) == 6
    assert "Patient-level studies: yes" not in capsys.readouterr().out


# -- what the limits bear of a study, when the site introduces itself --------------------------------------------------


def cost(study: StudyConfig, rounds: int) -> float:
    """Of a patient with images, at the delta that the hospitals below ask for."""
    return accounting.epsilon(mechanisms(study, {2}, range(1, rounds + 1)), 1e-4)


def introduced(hospital: Hospital, study: StudyConfig, run: str = RUN) -> tuple[Refusal | None, list[str]]:
    """What the coordinator is told, and what the site's own screen says of rounds."""
    heard: list[progress.Event] = []
    with progress.listen(heard.append), hospital.asked() as ask:
        refused = Refusal.found_in(ask(Hello(study, run).pack(), "query"))
    return refused, [event.text for event in heard if isinstance(event, progress.Note) and "round" in event.text]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"max_epsilon": 0.1, "delta": 1e-4}, "above 0.1 that this site allows over all studies"),
        ({"least_noise_multiplier": 1.0}, "its noise multiplier, of gradient and centre together, is 0.9806"),
    ],
)
@pytest.mark.parametrize("scans", [0, 3])
def test_a_study_of_which_not_one_round_may_be_is_refused_at_the_introduction(
    tmp_path: Path, limit: dict[str, Any], told: str, scans: int
) -> None:
    """Whatever scans there are: none is read."""
    hospital = Hospital(tmp_path, scans=scans, privacy=limit)
    refused, (said,) = introduced(hospital, private_study())
    assert refused == Refusal("budget")
    assert "study 'toy' is refused before its first round: " in said
    assert told in said
    assert hospital.entries == []


def test_noise_that_only_later_rounds_lack_is_refused_at_the_introduction(tmp_path: Path) -> None:
    """Round 1 is of images, of multiplier 0.981; with volumes, in round 2, it is 0.962."""
    study = private_study(schedule={"rounds": 2, "local_steps": 2, "alternate": [2, 2]})
    limits = {"holds": ["images", "volumes"], "least_noise_multiplier": 0.97}
    refused, said = introduced(Hospital(tmp_path, privacy=limits), study)
    assert refused == Refusal("budget")
    assert "is 0.9623, and this site asks for at least 0.97" in said[0]


def test_fewer_rounds_than_the_study_has_are_told_at_the_site_alone(tmp_path: Path) -> None:
    study = private_study(4)
    between = (cost(study, 2) + cost(study, 3)) / 2
    refused, said = introduced(Hospital(tmp_path / "a", privacy={"max_epsilon": between, "delta": 1e-4}), study)
    assert refused is None
    assert [line for line in said if "bear 2 of the 4 rounds of study 'toy'" in line]
    enough = Hospital(tmp_path / "b", privacy={"max_epsilon": 1.01 * cost(study, 4), "delta": 1e-4})
    assert introduced(enough, study) == (None, [])


def test_a_run_that_was_charged_may_ask_for_its_last_reply_again_though_nothing_is_left(tmp_path: Path) -> None:
    study = private_study(4)
    hospital = Hospital(tmp_path, privacy={"max_epsilon": 1.01 * cost(study, 1), "delta": 1e-4})
    with hospital.asked() as ask:
        ask(Hello(study, RUN).pack(), "query")
        first = ask(request(study), "train")
    assert introduced(hospital, study) == (None, [])
    with hospital.asked() as ask:
        assert bytes_of(ask(request(study), "train")) == bytes_of(first)
    refused, said = introduced(hospital, study, run="f" * 16)
    assert refused == Refusal("budget")
    assert "refused before its first round" in said[0]
