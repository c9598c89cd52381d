import hashlib
import hmac
from pathlib import Path, PurePosixPath

import pytest

from client.patients import Listed, dicom_patient_text, load_secret, patient_of, read_table, ruled_patient
from client.site_config import DataSource, TableConfig
from unimiss_core.errors import ConfigError, ScanError


def test_the_secret_is_made_once_and_for_its_owner_alone(tmp_path):
    first = load_secret(tmp_path / "state")
    assert load_secret(tmp_path / "state") == first
    assert len(first) == 32
    assert (tmp_path / "state" / "patient_secret").stat().st_mode & 0o777 == 0o600
    assert load_secret(tmp_path / "elsewhere") != first


def test_a_secret_that_others_can_read_is_refused(tmp_path):
    load_secret(tmp_path)
    (tmp_path / "patient_secret").chmod(0o644)
    with pytest.raises(ConfigError, match="0600"):
        load_secret(tmp_path)


def test_a_key_is_an_hmac_of_the_text_and_the_place_a_hash_of_it():
    patient = patient_of("1281", b"s" * 32)
    assert patient.key == hmac.new(b"s" * 32, b"1281", hashlib.sha256).hexdigest()[:32]
    exact = int(hashlib.sha256(b"1281").hexdigest(), 16) / 2**256
    assert patient.place == pytest.approx(exact, abs=1e-12)
    assert patient_of("1281", b"t" * 32).key != patient.key


def test_places_fill_the_unit_interval_evenly():
    places = sorted(patient_of(str(number), b"").place for number in range(2000))
    assert max(abs(place - (rank + 0.5) / 2000) for rank, place in enumerate(places)) < 0.04


def test_the_same_number_of_two_issuers_is_two_patients():
    assert dicom_patient_text(" 17 ", "") == "17"
    assert len({dicom_patient_text("17", issuer) for issuer in ("", "A", "B")}) == 3


def test_a_pattern_finds_the_patient_in_the_path_or_leaves_the_file_out():
    source = DataSource(folder=Path(), patient_pattern=r"^(?P<patient>[0-9]+)_")
    assert ruled_patient(source, PurePosixPath("0042_001.png"), None) == "0042"
    with pytest.raises(ScanError, match="no_patient_match"):
        ruled_patient(source, PurePosixPath("holiday.png"), None)


def test_the_table_overrules_the_pattern(tmp_path):
    table = TableConfig(path=tmp_path / "t.csv", patient="who")
    source = DataSource(folder=Path(), table=table, patient_pattern="(?P<patient>.)")
    assert ruled_patient(source, PurePosixPath("x.png"), Listed("7", None)) == "7"
    with pytest.raises(ScanError, match="no_patient_match"):
        ruled_patient(source, PurePosixPath("x.png"), Listed("", None))


def table(folder: Path, text: str, **settings) -> TableConfig:
    (folder / "t.csv").write_text(text, encoding="utf-8-sig")
    return TableConfig(path=folder / "t.csv", **settings)


def test_a_table_lists_the_rows_that_its_filter_keeps(tmp_path):
    text = "file,who,kind,vendor\na.png,1,MR_T1,GE\nb/c.png,2,PET,GE\nd.png,3,CT,SIEMENS\n"
    listed = read_table(table(tmp_path, text, patient="who", modality="kind", where={"vendor": ("GE",)}))
    assert listed == {PurePosixPath("a.png"): Listed("1", "MR"), PurePosixPath("b/c.png"): Listed("2", "PT")}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("fiel,who\na,1\n", {"patient": "who"}, "no column 'file' \\(did you mean 'fiel'"),
        ("file,who\n", {}, "no rows"),
        ("file,kind\na,tree\n", {"modality": "kind"}, "line 2: column 'kind'"),
        ("file,who\na,1\na,2\n", {"patient": "who"}, "line 3: lists a file again"),
        ("file,who\n../a,1\n", {}, "line 2: column 'file' must stay below"),
        ("file,who\na,1\n,2\n", {}, "line 3: column 'file' is empty"),
        ("file,who\n.,1\n", {}, "line 2: column 'file' is empty"),
        ("file,who\na\0b,1\n", {}, "line 2: column 'file' holds a NUL"),
        ("file,who,who\na,1,ward\n", {"patient": "who"}, "2 columns 'who'"),
        ("file,who\n\na,1\nb,a mark, left,2\n", {"patient": "who"}, "line 4: has more cells than the header line"),
        (
            'file,who\na,"1\nb,2\nc,3\n',
            {},
            "line 4 is no CSV, or one before it: a quotation mark is open",
        ),  # it would take b and c along
    ],
)
def test_a_wrong_table_is_refused_by_line_without_quoting_it(tmp_path, text, settings, message):
    with pytest.raises(ConfigError, match=message):
        read_table(table(tmp_path, text, **settings))


def test_rows_that_a_spreadsheet_leaves_empty_list_nothing(tmp_path):
    assert list(read_table(table(tmp_path, "file,who\na,1\n,\n , \n", patient="who"))) == [PurePosixPath("a")]


def test_space_around_a_text_says_nothing_in_a_table_or_in_what_is_asked_of_it(tmp_path):
    listed = read_table(table(tmp_path, "file,part\na, train\nb,test\nc,train \n", where={"part": (" train",)}))
    assert list(listed) == [PurePosixPath("a"), PurePosixPath("c")]
