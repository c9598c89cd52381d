"""`unimiss-site ledger`, and the limits of a site file, as they are typed."""

import re
from pathlib import Path

import pytest

from client import accounting
from client.ledger import Asked, Ledger
from client.site_command import main
from client.site_config import PatientLimits, load_site
from tests.federation import RUN
from tests.test_ledger import private
from unimiss_core.config import dump_yaml
from unimiss_core.errors import ConfigError
from unimiss_core.privacy import mechanisms
from unimiss_core.scan import Rank
from unimiss_core.study import StudyConfig

IMAGES: frozenset[Rank] = frozenset({2})
VOLUMES: frozenset[Rank] = frozenset({3})


@pytest.fixture
def study() -> StudyConfig:
    return private("ward", max_epsilon=0.45, rounds=9)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "DOE^JANE").mkdir()
    path = tmp_path / "site.yaml"
    path.write_text("name: north\ndata: [{folder: DOE^JANE}]\nstate: state\nprivacy: {max_epsilon: 0.44}\n")
    return path


def charge(site: Path, study: StudyConfig, rounds: range) -> Ledger:
    config = load_site(site)
    ledger = Ledger(config.state, config.privacy, accounting.epsilon)
    for round in rounds:
        with ledger.alone(RUN):
            ledger.reserve(Asked(study, RUN, round, "a" * 64), mechanisms(study, IMAGES, [round]))
    return ledger


def rows(said: str) -> list[list[str]]:
    return [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]


def test_what_was_spent_and_is_left(site: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> None:
    charge(site, study, range(1, 3))
    (site.parent / "study.yaml").write_text(dump_yaml(study))
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 0
    said = capsys.readouterr().out
    assert "DOE" not in said
    spent = accounting.epsilon(mechanisms(study, IMAGES, range(1, 3)), 1e-5)
    of_study, of_site, images, volumes, both = rows(said)
    assert of_study[:2] == ["ward", study.digest()[:12]]
    assert (of_study[2:], of_site[2:]) == (
        ["2", "1e-05", f"{spent:.3g}", "0.45", f"{0.45 - spent:.3g}"],
        ["2", "1e-05", f"{spent:.3g}", "0.44", f"{0.44 - spent:.3g}"],
    )
    assert [images[0], volumes[0], both[0]] == ["images", "volumes", "both"]
    assert "a new run, from" in said
    assert re.search(rf"run\s+{RUN},\s+charged to\s+round 2", " ".join(part for part in re.split(r"[┃│\n]", said)))
    everything: list[tuple[list[str], frozenset[Rank]]] = [
        (images, IMAGES),
        (volumes, VOLUMES),
        (both, IMAGES | VOLUMES),
    ]
    assert 0 < int(images[1]) < 7
    for (_, anew, going_on), ranks in everything:
        assert int(anew) == affordable(study, ranks, range(1, 10))
        assert int(going_on) == affordable(study, ranks, range(3, 10))


def affordable(study: StudyConfig, ranks: frozenset[Rank], rounds: range) -> int:
    """How many of these rounds the site's limit bears after two that were charged."""
    charged = mechanisms(study, IMAGES, range(1, 3))
    costs = [
        accounting.epsilon([*charged, *mechanisms(study, ranks, rounds[:n])], 1e-5) for n in range(1, len(rounds) + 1)
    ]
    return sum(cost <= 0.44 for cost in costs)


def test_a_run_at_its_end_has_no_rounds_left_and_a_new_one_has_all_that_the_limit_bears(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted on from the last round of any run, both would be none."""
    short = private("ward", max_epsilon=0.45, rounds=2)
    charge(site, short, range(1, 3))
    (site.parent / "study.yaml").write_text(dump_yaml(short))
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 0
    *_, images, volumes, both = rows(capsys.readouterr().out)
    assert affordable(short, IMAGES, range(1, 3)) == 2
    assert images == ["images", "2", "0"]
    assert {volumes[2], both[2]} == {"0"}


@pytest.mark.parametrize(("limit", "refused"), [(0.44, False), (0.01, True)])
def test_why_no_new_run_may_come_is_told(
    site: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str], limit: float, refused: bool
) -> None:
    site.write_text(site.read_text().replace("max_epsilon: 0.44", f"max_epsilon: {limit:g}, holds: [images]"))
    (site.parent / "study.yaml").write_text(dump_yaml(study))
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert ("A new run would be refused: patients would cost epsilon" in told) == refused
    assert ("above 0.01 that this site allows over all studies" in told) == refused


def test_before_a_study_was_charged_there_is_only_a_new_run(
    site: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.parent / "study.yaml").write_text(dump_yaml(study))
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 0
    *_, images, _, _ = rows(capsys.readouterr().out)
    assert len(images) == 2


@pytest.mark.parametrize(("holds", "named"), [("[images]", ["images"]), ("[images, volumes]", ["both"])])
def test_rounds_are_told_of_what_the_site_holds_alone(
    site: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str], holds: str, named: list[str]
) -> None:
    """It is charged for that in every round, whatever scans it has."""
    site.write_text(site.read_text().replace("max_epsilon: 0.44", f"max_epsilon: 0.44, holds: {holds}"))
    (site.parent / "study.yaml").write_text(dump_yaml(study))
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 0
    _, *kinds = rows(capsys.readouterr().out)
    assert [kind[0] for kind in kinds] == named


def test_a_site_that_was_never_charged(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(site)]) == 0
    assert rows(capsys.readouterr().out) == [["all of this site", "", "0", "1e-05", "0", "0.44", "0.44"]]
    assert not (site.parent / "state").exists()


def test_what_was_spent_is_told_also_where_the_scans_are_not_there(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is not mounted, an archive that was moved: what patients have cost does not hang on it."""
    (site.parent / "DOE^JANE").rmdir()
    assert main(["ledger", str(site)]) == 0
    assert main(["clear", str(site)]) == 0
    assert "0.44" in capsys.readouterr().out


def test_a_damaged_ledger_ends_with_a_code_of_its_own(
    site: Path, study: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    charge(site, study, range(1, 3))
    path = site.parent / "state" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":3'))
    assert main(["ledger", str(site)]) == 6
    assert "line 2 of 'ledger.jsonl' is damaged: it, or the line before" in capsys.readouterr().err


def test_a_study_without_patients_to_charge_is_told(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site.parent / "study.yaml").write_text("name: toy\n")
    assert main(["ledger", str(site), "--study", str(site.parent / "study.yaml")]) == 2
    assert "charges no patient (privacy.mode: none)" in capsys.readouterr().err


def test_the_limits_of_a_site_file(site: Path) -> None:
    assert load_site(site).privacy == PatientLimits(max_epsilon=0.44, delta=1e-5, least_noise_multiplier=None)
    site.write_text(site.read_text().replace("max_epsilon: 0.44", "max_epsilon: 0, least_noise: 1.0"))
    with pytest.raises(ConfigError, match=r"(?s)'privacy.max_epsilon'.*'privacy.least_noise' \(did you mean 'least_n"):
        load_site(site)
