"""docs/artefacts.md tells the truth about what a run writes and what is read back."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from server.artefacts import GlobalRecord, ProbeRecord, RoundRecord, SiteRecord, StopRecord, read_artefacts
from server.site_round import SiteRound
from tests.run_artefacts import SITES, round_records, write_probe, write_run, write_views
from unimiss_core import errors
from unimiss_core.checkpoint import Manifest
from unimiss_core.reasons import REASONS

DOCUMENT = (Path(__file__).parents[1] / "docs" / "artefacts.md").read_text(encoding="utf-8")
TABLES = [set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) for table in DOCUMENT.split("\n\n")]


@pytest.mark.parametrize("record", [RoundRecord, SiteRecord, GlobalRecord, ProbeRecord, StopRecord, Manifest])
def test_each_field_is_documented_and_each_documented_field_exists(record: type[BaseModel]) -> None:
    assert {field.alias or name for name, field in record.model_fields.items()} in TABLES


def test_what_the_coordinator_writes_of_a_site_is_what_is_read() -> None:
    assert set(SiteRecord.model_fields) == set(vars(SiteRound()))


def test_each_exit_code_is_documented() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENT, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UnimissError)]
    assert documented == {0, 130} | {kind.exit_code for kind in kinds}


def test_each_reason_is_documented() -> None:
    """test_wire.py holds the code to the same list."""
    assert {reason for reason in REASONS if f"`{reason}`" not in DOCUMENT} == set()


def test_a_whole_run_reads_back_without_gaps(tmp_path: Path) -> None:
    records = round_records(3)
    write_run(tmp_path, records, rounds=3)
    write_probe(tmp_path / "report")
    write_views(tmp_path / "report")
    run = read_artefacts(tmp_path)
    assert run.gaps == ()
    assert list(run.views) == run.sites == sorted(SITES)
    read = [one.model_dump(by_alias=True, exclude_unset=True)["global"] for one in run.rounds]
    assert read == [record["global"] for record in records]
    assert run.after["pneumonia"].gain == 0.089
    assert run.projections["organ"].labels.shape == (160,)
