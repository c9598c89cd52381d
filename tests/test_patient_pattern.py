"""Whose a scan of a table is where its path says it and no column does, as in CheXpert."""

from pathlib import Path
from typing import Any

import pytest

from client.label_config import LabelsConfig
from client.label_tables import labels_in
from client.splits import split_cases
from tests.test_label_tables import BINARY, configured, table
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError

PATTERN = "(?P<patient>patient[0-9]+)/"
TEXT = (
    "scan,label\ntrain/patient01/study1/a.png,yes\ntrain/patient02/study1/a.png,no\ntrain/patient01/study2/a.png,no\n"
)


def test_a_scan_is_of_whom_its_path_names(tmp_path: Path) -> None:
    found = table(tmp_path, TEXT, patient_pattern=PATTERN)
    assert [case.patient for case in found.cases] == ["patient01", "patient02", "patient01"]


def test_scans_of_one_patient_stay_on_one_side(tmp_path: Path) -> None:
    lines = [f"train/patient{n % 12:02d}/study{n}/a.png,{['no', 'yes'][n % 2]}" for n in range(36)]
    (tmp_path / "t.csv").write_text("\n".join(["scan,label", *lines]))
    data = {"table": "t.csv", "patient_pattern": PATTERN}
    for fold in range(3):
        config = configured(tmp_path, BINARY, data, split={"folds": 3, "fold": fold})
        parts = split_cases(labels_in(config.data, config.task).cases, config)
        whose = [{case.file.split("/")[1] for case in cases} for cases in parts.values()]
        assert sum(map(len, whose)) == len(set.union(*whose)) == 12


def test_a_path_that_names_nobody_is_told_by_its_line(tmp_path: Path) -> None:
    text = TEXT + "train/miller/a.png,yes\n"
    with pytest.raises(ConfigError, match="1 problem") as told:
        table(tmp_path, text, patient_pattern=PATTERN)
    assert "line 5: data.patient_pattern finds no patient in 'scan'" in str(told.value)
    assert "miller" not in str(told.value)
    config = configured(tmp_path, BINARY, {"table": "t.csv", "patient_pattern": PATTERN})
    found = labels_in(config.data, config.task, one_by_one=True)
    assert len(found.cases) == 3
    assert found.left_out == ("line 5: data.patient_pattern finds no patient in 'scan'",)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [("patient", "needs a group named patient"), ("(?P<patient>[0-9", "is no regular expression")],
)
@pytest.mark.parametrize("data", [{"table": "t.csv"}, {"name": "msd", "folder": "."}])
def test_what_is_no_pattern_is_told(tmp_path: Path, data: dict[str, Any], pattern: str, told: str) -> None:
    raw = {"data": {**data, "patient_pattern": pattern}, "classes": ["no", "yes"]}
    with pytest.raises(ConfigError, match=told):
        parse(LabelsConfig, raw, where="site.yaml")
    with pytest.raises(ConfigError, match=f"data.*{told}"):
        configured(tmp_path, {**BINARY, "name": "classification"}, raw["data"])


def test_a_site_whose_tables_paths_name_patients_knows_them() -> None:
    raw = {"data": {"table": "t.csv", "patient_pattern": PATTERN}, "classes": ["no", "yes"]}
    assert parse(LabelsConfig, raw, where="site.yaml").knows_patients
