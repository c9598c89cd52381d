import ast
import gzip
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset

from client import site_check
from client.dicom import write_dicom
from client.nifti import read_nifti
from client.pictures import write_png
from client.reasons import FLAGS, REASONS
from client.site_command import main
from tests.series_files import pattern, write_radiograph, write_series
from unimiss_core.plan import prepare
from unimiss_core.scan import Scan
from unimiss_core.study import PlanConfig

pytestmark = pytest.mark.usefixtures("one_core")

ROOT = Path(__file__).parents[1]
SECRET_WORD = "Zzyzx"  # planted wherever a file can hold text


def plant_privately(dataset: Dataset) -> None:
    """The word in private elements, in a nested sequence and in an element whose value breaks its type."""
    block = dataset.private_block(0x0011, SECRET_WORD, create=True)
    block.add_new(0x01, "LO", SECRET_WORD)
    inner = Dataset()
    inner.PatientName = inner.RequestedProcedureDescription = SECRET_WORD
    dataset.RequestAttributesSequence = [inner]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.add_new("PatientBirthDate", "DA", SECRET_WORD)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A CT series, a radiograph, a broken series and rubbish, all full of an invented name."""
    data = tmp_path / "archive" / f"{SECRET_WORD}-ward"
    named = {
        "PatientID": SECRET_WORD,
        "PatientName": SECRET_WORD,
        "StudyDescription": SECRET_WORD,
        "SeriesDescription": SECRET_WORD,
        "InstitutionName": SECRET_WORD,
    }
    write_series(data / "ct", pattern(6, 20, 30), attributes=named)
    write_series(
        data / "gap", pattern(6, 20, 30), attributes=named, positions=[[0, 0, 3 * z + 3 * (z > 2)] for z in range(6)]
    )
    facts = named | {"Modality": "CR", "ImageType": ["ORIGINAL", "PRIMARY"]}
    pixels = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40)
    write_dicom(data / f"{SECRET_WORD}.dcm", pixels, facts, adjust=plant_privately)
    write_radiograph(
        data / "odd", np.arange(12, dtype=np.uint8).reshape(3, 4), **named | {"Modality": SECRET_WORD[:4].upper()}
    )
    (data / f"{SECRET_WORD}.txt").write_text(SECRET_WORD)
    return tmp_path / "archive"


def test_the_account_of_a_folder(folder, tmp_path, capsys):
    report = tmp_path / "out.json"
    assert main(["check", str(folder), "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["files_seen"] == 15
    assert found["files_unreadable"] == {"not_an_image": 1}
    assert found["used"] == {"2d": 1, "3d": 1}
    assert found["patients"] == 1
    series = {
        (one["kind"], one["modality"], one["decision"], one["reason"], one["files"]): one for one in found["series"]
    }
    assert set(series) == {
        ("3d", "CT", "used", None, 6),
        ("2d", "XR", "used", None, 1),
        ("3d", "CT", "left_out", "missing_slices", 6),
        ("2d", None, "left_out", "secondary_capture", 1),
    }
    used = series["3d", "CT", "used", None, 6]
    assert used["shape"] == [6, 20, 30]
    assert used["spacing_mm"] == [3.0, 0.9, 0.7]
    said = capsys.readouterr().out
    assert "15 files seen, 1 of them no scans or not readable, 2 scans usable" in said
    assert "missing_slices" in said


def test_no_output_names_a_patient_or_a_path(folder, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    options = ["--report", str(out / "r.json"), "--save-nifti", str(out / "n"), "--preview", str(out / "p.png")]
    assert main(["check", str(folder), *options]) == 0
    said = capfd.readouterr()
    assert SECRET_WORD not in said.out + said.err
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        assert SECRET_WORD not in path.name
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.endswith(".gz") else content
        assert SECRET_WORD.encode() not in content


def test_paths_appear_where_the_operator_asks_for_them(folder, tmp_path, capsys):
    report = tmp_path / "out.json"
    main(["check", str(folder), "--report", str(report), "--show-paths"])
    found = json.loads(report.read_text())
    assert sum(len(one["paths"]) for one in found["series"]) == 14
    assert found["unreadable_paths"]["not_an_image"][0].endswith(f"{SECRET_WORD}.txt")
    assert f"{SECRET_WORD}.txt" in capsys.readouterr().out.replace("\n", "")


def test_names_that_are_not_utf_8_are_read_and_shown(tmp_path, capsys):
    picture = os.fsencode(tmp_path / "scans") + b"/M\xfcller.png"
    (tmp_path / "scans").mkdir()
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (21, 33)).astype(np.uint8))
    os.rename(os.fsencode(tmp_path / "a.png"), picture)  # noqa: PTH104 - bytes
    report = tmp_path / "r.json"
    assert main(["check", str(tmp_path / "scans"), "--report", str(report), "--show-paths"]) == 0
    assert json.loads(report.read_text())["series"][0]["paths"][0].endswith("M\\xfcller.png")
    assert "Nothing was sent" in capsys.readouterr().out


def test_what_is_saved_is_what_the_model_would_see_in_its_place(folder, tmp_path):
    main(["check", str(folder), "--save-nifti", str(tmp_path / "n"), "--preview", str(tmp_path / "p.png")])
    (path,) = (tmp_path / "n").glob("*_CT_3d.nii.gz")
    saved = read_nifti(path, "CT")
    source = Scan(pattern(6, 20, 30)[None].astype(np.float32), (3.0, 0.9, 0.7), "CT")
    values, spacing = prepare(source, PlanConfig())
    np.testing.assert_allclose(saved.voxels, values, atol=1e-6)
    np.testing.assert_allclose(saved.spacing_mm, spacing, rtol=1e-5)
    # The centre of the volume stays where it was in the patient: (R, A, S) = -(x, y), z of the slices' middle.
    middle = [*((np.array(saved.voxels.shape[1:]) - 1) / 2), 1]
    np.testing.assert_allclose((saved.affine @ middle)[:3], [-0.7 * 14.5, -0.9 * 9.5, 3.0 * 2.5], atol=1e-4)
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.mode == "L"


def test_a_study_may_let_gaps_be_filled(folder, tmp_path):
    (tmp_path / "study.yaml").write_text("name: s\nplan: {missing_slices: interpolate}\n")
    series = folder / f"{SECRET_WORD}-ward" / "gap"
    assert main(["check", str(series)]) == 3
    assert main(["check", str(series), "--study", str(tmp_path / "study.yaml")]) == 3  # one of seven is too many
    write_series(series, pattern(12, 9, 8), positions=[[0, 0, 3 * z + 3 * (z > 5)] for z in range(12)])
    assert main(["check", str(series), "--study", str(tmp_path / "study.yaml")]) == 0


def test_exit_codes_tell_an_empty_folder_from_a_wrong_command(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["check", str(tmp_path / "empty")]) == 3
    assert "there is no file to read" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no site file")
    assert main(["check", str(tmp_path / "notes.txt")]) == 2
    assert main(["check", str(tmp_path / "gone")]) == 2
    assert main(["check", str(tmp_path / "empty"), "--report", str(tmp_path / "gone" / "r.json")]) == 2
    assert main(["check"]) == 2  # there is no site's folder here
    said = capsys.readouterr().err
    assert "expected a folder of scans or a site file" in said
    assert "gone: does not exist; give a folder of scans or a site file" in said


@pytest.mark.usefixtures("folder")
def test_a_site_file_is_checked_with_its_own_rules(tmp_path, capsys):
    (tmp_path / "site.yaml").write_text("name: n\nstate: s\ndata: [{folder: archive, patient_range: [0.0, 1.0]}]\n")
    assert main(["check", str(tmp_path / "site.yaml")]) == 0
    (tmp_path / "site.yaml").write_text("name: n\nstate: s\ndata: [{folder: archive, pateint_range: [0.0, 1.0]}]\n")
    assert main(["check", str(tmp_path / "site.yaml")]) == 2
    assert "did you mean 'patient_range'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("holds", "warned"),
    [
        ("[images, volumes]", []),
        ("[images]", ["Warning: 2 of the usable scans are volumes, which privacy.holds does not declare"]),
        ("[volumes]", ["Warning: 1 of the usable scans are images, which privacy.holds does not declare"]),
        ("null", []),  # it takes part in no private study, which is said already
    ],
)
def test_what_a_site_declares_and_what_it_has_are_compared(tmp_path, capsys, holds, warned):
    """At home, so that counts may be told."""
    for number in range(2):
        write_series(tmp_path / "scans" / f"ct-{number}", pattern(6, 20 + number, 30))
    write_radiograph(tmp_path / "scans" / "xr", np.arange(1200, dtype=np.uint16).reshape(30, 40))
    site = tmp_path / "site.yaml"
    site.write_text(f"name: n\nstate: s\ndata: [{{folder: scans}}]\nprivacy: {{holds: {holds}}}\n")
    assert main(["check", str(site)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert [part for part in warned if part in said] == warned
    assert said.count("Warning:") == len(warned)


def test_a_rank_that_is_declared_and_not_there_is_told(tmp_path, capsys):
    write_series(tmp_path / "scans", pattern(6, 20, 30))
    site = tmp_path / "site.yaml"
    site.write_text("name: n\nstate: s\ndata: [{folder: scans}]\nprivacy: {holds: [images, volumes]}\n")
    assert main(["check", str(site)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("Warning:") == 1
    assert "privacy.holds declares images, and no usable scan is one" in said
    assert "noise alone from its 2D steps" in said


def test_for_a_private_study_patients_are_sorted_out_apart(tmp_path):
    for who, depth in (("a", 4), ("b", 1)):
        write_series(tmp_path / "scans" / who, pattern(depth, 9, 7), attributes={"PatientID": who})
    report = tmp_path / "report.json"
    for study, used in (("nano", {"2d": 0, "3d": 1}), ("private", {"2d": 1, "3d": 1})):
        options = ["--study", str(ROOT / "configs" / "study" / f"{study}.yaml"), "--report", str(report)]
        assert main(["check", str(tmp_path / "scans"), *options]) == 0
        assert json.loads(report.read_text())["used"] == used


def test_a_contact_sheet_holds_all_tiles_or_an_even_choice():
    tiles = [np.full((96, 96), number % 250, np.uint8) for number in range(500)]
    assert site_check.contact_sheet(tiles[:13]).shape == (2 * 98 + 2, 12 * 98 + 2)
    sheet = site_check.contact_sheet(tiles)
    assert sheet.shape == (10 * 98 + 2, 12 * 98 + 2)
    assert sheet[50, 50] == 0
    assert sheet[9 * 98 + 50, 11 * 98 + 50] == 499 % 250


def reasons_in(path: Path) -> set[str]:
    """Reason codes that a module raises or assigns: snake-case literals in ScanError calls and reason positions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    raised = {
        call.args[0].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "ScanError"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    returned = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    return raised | (returned - {""})


def test_every_reason_is_explained_in_words_and_in_the_documentation():
    modules = ["dicom", "dicom_bytes", "dicom_rules", "dicom_values", "series", "volumes"]
    modules += ["nifti", "pictures", "patients", "catalogue", "listing", "workers"]
    known = {"2d", "3d", "missing_slices"}
    for module in modules:
        assert reasons_in(ROOT / "client" / f"{module}.py") - known <= REASONS.keys(), module
    assert reasons_in(ROOT / "unimiss_core" / "plan.py") <= REASONS.keys()
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert [reason for reason in (*REASONS, *FLAGS) if f"`{reason}`" not in text] == []


@pytest.mark.parametrize("option", ["--save-nifti", "--preview", "--report"])
def test_an_output_that_cannot_be_written_is_said_and_no_scan_is_blamed(tmp_path, capsys, option):
    data, out = tmp_path / "data", tmp_path / "out"
    write_radiograph(data / "a", np.arange(1200, dtype=np.uint16).reshape(30, 40))
    target = out if option == "--save-nifti" else out / "file"
    out.mkdir()
    # What is written first has this name with an ending: a folder there is in its way, for root too.
    for name in (".scan-00001_XR_2d.nii.gz.partial.nii.gz", ".file.partial"):
        (out / name).mkdir()
    assert main(["check", str(data), option, str(target)]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert "Traceback" not in said.err
    assert "What is left out" not in said.out
