"""The report of a private run: it says what is promised, and shows no number that stands for none."""

from pathlib import Path

from server.report import write_report
from tests.run_artefacts import round_records, write_run

PATIENT = {"mode": "patient", "max_epsilon": 6.5, "delta": 1e-5, "noise_multiplier": 1.0, "centre_noise": 5.0}
SITE = {"mode": "site", "max_epsilon": 7.5, "noise_multiplier": 4.0, "clip_norm": 1.0, "sites": 5}
FIT = {"batch": {"images": 128, "volumes": 128}, "aggregation": {"max_size_ratio": None}}


def report_of(folder: Path, privacy: dict[str, object] | None) -> str:
    records = round_records(2)
    for record in records if privacy is PATIENT else []:
        for site in record["sites"].values():
            scans = {rank: int(count > 0) for rank, count in site["scans"].items()}
            site |= {"scans": scans, "losses": {}, "diagnostics": {}, "seconds": 0.0}
    settings = {} if privacy is None else {"privacy": privacy, **FIT}
    write_run(folder, records, rounds=2, **settings)
    return write_report(folder).read_text(encoding="utf-8")


def test_a_patient_level_run_says_its_promise_and_shows_no_count_and_no_time(tmp_path: Path) -> None:
    page = report_of(tmp_path, PATIENT)
    assert "epsilon of at most 6.5 at delta 1e-05" in page
    assert "1 image" not in page
    assert "0.0 s" not in page
    assert page.count("not told") == 6  # scans and time of three sites
    assert "The sites of a private study tell no losses" in page
    assert "Seconds in a round" not in page


def test_a_site_level_run_says_whom_it_is_private_against(tmp_path: Path) -> None:
    page = report_of(tmp_path, SITE)
    assert "epsilon of at most 7.5" in page
    assert "the coordinator's own" in page.replace("&#x27;", "'").replace("&#39;", "'")
    assert "412 images" in page


def test_a_run_without_privacy_has_no_such_section(tmp_path: Path) -> None:
    page = report_of(tmp_path, None)
    assert "Privacy" not in page
    assert "Seconds in a round" in page
