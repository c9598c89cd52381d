"""`unimiss-site ledger`, and the limits of a site file, as they are typed."""

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


@pytest.fixture
def study() -> StudyConfig:
    return private("ward", max_epsilon=0.3, rounds=9)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "DOE^JANE").mkdir()
    path = tmp_path / "site.yaml"
    path.write_text("name: north\ndata: [{folder: DOE^JANE}]\nstate: state\nprivacy: {max_epsilon: 0.29}\n")
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
        ["2", "1e-05", f"{spent:.3g}", "0.3", f"{0.3 - spent:.3g}"],
        ["2", "1e-05", f"{spent:.3g}", "0.29", f"{0.29 - spent:.3g}"],
    )
    assert [images[0], volumes[0], both[0]] == ["images", "volumes", "both"]
    for left, ranks in ((images[1], IMAGES), (volumes[1], {3}), (both[1], {2, 3})):
        charged = mechanisms(study, IMAGES, range(1, 3))
        may = [
            accounting.epsilon([*charged, *mechanisms(study, ranks, range(3, 3 + n))], 1e-5) <= 0.29  # type: ignore[arg-type]
            for n in range(1, 8)
        ]
        assert int(left) == sum(may)


def test_a_site_that_was_never_charged(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", str(site)]) == 0
    assert rows(capsys.readouterr().out) == [["all of this site", "", "0", "1e-05", "0", "0.29", "0.29"]]
    assert not (site.parent / "state").exists()


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
    assert load_site(site).privacy == PatientLimits(max_epsilon=0.29, delta=1e-5, least_noise_multiplier=None)
    site.write_text(site.read_text().replace("max_epsilon: 0.29", "max_epsilon: 0, least_noise: 1.0"))
    with pytest.raises(ConfigError, match=r"(?s)'privacy.max_epsilon'.*'privacy.least_noise' \(did you mean 'least_n"):
        load_site(site)
