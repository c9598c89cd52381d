import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from client.catalogue import catalogue, read, safe_here
from client.nifti import read_nifti, write_nifti
from client.patients import patient_of
from client.pictures import write_png
from client.site_config import DataSource, TableConfig
from tests.series_files import pattern, write_radiograph, write_series
from tests.shared_files import DATA, needs
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.scan import Scan

SECRET = b"s" * 32
SERIES = DATA / "dicom_series"
STS = DATA / "sts_dicom"


def look(folder, **settings):
    return catalogue([DataSource(folder=folder, **settings)], SECRET)


def reasons(found) -> Counter:
    return Counter(entry.reason for entry in (*found.left_out, *found.unreadable))


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.random.default_rng(seed).integers(0, 255, (21, 17)).astype(np.uint8))


def test_files_are_known_by_content_and_not_by_name(tmp_path):
    volume = pattern(5, 9, 7)
    write_series(tmp_path / "a", volume, order=[3, 0, 4, 2, 1])
    write_radiograph(tmp_path / "b" / "holiday.txt", np.arange(99, dtype=np.uint16).reshape(9, 11))
    picture(tmp_path / "c" / "x.dat")
    write_nifti(tmp_path / "v.nii.gz", Scan(volume[None].astype(np.float32), (2.0, 1.0, 1.0), "CT"))
    (tmp_path / "v.nii.gz").rename(tmp_path / "v.bin")
    (tmp_path / "readme.dcm").write_text("no scan")
    (tmp_path / "nothing").touch()
    found = look(tmp_path)
    kinds = sorted((one.format, one.kind, one.modality, len(one.files)) for one in found.candidates)
    assert kinds == [
        ("dicom", "2d", "XR", 1),
        ("dicom", "3d", "CT", 5),
        ("nifti", "3d", "OT", 1),
        ("picture", "2d", "XR", 1),
    ]
    assert reasons(found) == {"not_an_image": 1, "empty_file": 1}
    assert found.files_seen == 10
    series = next(one for one in found.candidates if one.modality == "CT")
    np.testing.assert_array_equal(read(series).voxels[0], volume)


@pytest.mark.parametrize(
    ("shape", "change", "expected"),
    [
        ((13, 9), {}, [("duplicate", 1), ("used", 1)]),
        ((13, 9), {"PatientID": "invented-3"}, [("two_patients_in_series", 2)]),
        ((12, 8), {}, [("used", 2)]),
        ((13, 9), {"PhotometricInterpretation": "MONOCHROME1"}, [("used", 2)]),
        ((13, 9), {"RescaleSlope": 2}, [("used", 2)]),
        ((13, 9), {"RescaleSlope": "1.0"}, [("duplicate", 1), ("used", 1)]),
        ((13, 9), {"FrameOfReferenceUID": "1.2.4"}, [("duplicate", 1), ("used", 1)]),
        ((13, 9), {"Modality": "DX"}, [("used", 2)]),
    ],
)
def test_under_one_uid_only_what_is_alike_in_all_is_a_copy(tmp_path, shape, change, expected):
    alike = dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), "1.2.3") | {"RescaleSlope": 1}
    values = np.arange(117, dtype=np.uint16)
    write_radiograph(tmp_path / "a", values.reshape(13, 9), **alike)
    write_radiograph(tmp_path / "b", values[: shape[0] * shape[1]].reshape(shape), **alike | change)
    found = look(tmp_path)
    counts = {"used": len(found.candidates)} | {entry.reason: len(entry.files) for entry in found.left_out}
    assert sorted((reason, count) for reason, count in counts.items() if count) == expected


def test_a_packed_copy_is_a_copy(tmp_path):
    write_radiograph(tmp_path / "a", np.arange(117, dtype=np.uint16).reshape(13, 9))
    dataset = pydicom.dcmread(tmp_path / "a")
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "b")
    assert reasons(look(tmp_path)) == {"duplicate": 1}


def test_a_picture_called_dcm_is_left_out(tmp_path):
    picture(tmp_path / "a.dcm")
    assert reasons(look(tmp_path)) == {"name_contradicts_content": 1}


def test_pipes_and_dangling_links_do_not_stop_the_walk(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path)
    picture(tmp_path / "a.png")
    found = look(tmp_path)
    assert len(found.candidates) == 1
    assert reasons(found) == {"not_an_image": 1, "cannot_open": 1, "linked_folder": 1}


def test_a_dicomdir_is_an_index_and_its_files_are_found_without_it(tmp_path):
    write_series(tmp_path / "IMAGES", pattern(4, 5, 6))
    write_radiograph(tmp_path / "DICOMDIR", np.ones((4, 4), np.uint8), SOPClassUID="1.2.840.10008.1.3.10")
    found = look(tmp_path)
    assert len(found.candidates) == 1
    assert reasons(found) == {"dicomdir": 1}


def test_patients_come_from_the_path_where_a_pattern_says_so(tmp_path):
    for name in ("7_a.png", "7_b.png", "8_a.png"):
        picture(tmp_path / name)
    found = look(tmp_path, patient_pattern="^(?P<patient>[0-9]+)_")
    assert [one.patient for one in found.candidates] == [patient_of(who, SECRET).key for who in "778"]
    assert len({one.patient for one in look(tmp_path).candidates}) == 3


def test_files_whose_patient_is_only_assumed_are_counted_by_source(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            picture(tmp_path / folder / f"{number}.png", number)
    write_series(tmp_path / "b" / "ct", pattern(7, 20, 30), attributes={"PatientID": "one"})
    ruled = DataSource(folder=tmp_path / "a", patient_pattern="(?P<patient>[0-9])")
    sources = (ruled, DataSource(folder=tmp_path / "b"), DataSource(folder=tmp_path / "c", file_is_patient=True))
    found = catalogue(sources, b"s" * 32)
    assert found.assumed == {1: 3}
    assert Counter("patient_assumed" in one.flags for one in found.candidates) == {True: 3, False: 7}


def test_a_source_cannot_say_two_things_of_its_patients(tmp_path):
    for rule in (
        {"patient_pattern": "(?P<patient>.)"},
        {"table": TableConfig(path=tmp_path / "t.csv", patient="who")},
    ):
        with pytest.raises(ValueError, match="file_is_patient: patient_pattern or the table says otherwise"):
            DataSource(folder=tmp_path, file_is_patient=True, **rule)


def test_patient_ranges_part_a_folder_without_overlap(tmp_path):
    for number in range(40):
        picture(tmp_path / f"{number}_x.png")
    rule = "^(?P<patient>[0-9]+)_"
    parts = [
        {one.files for one in look(tmp_path, patient_pattern=rule, patient_range=part).candidates}
        for part in ((0.0, 0.3), (0.3, 1.0))
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    assert 4 <= len(parts[0]) <= 20
    expected = {(f"{n}_x.png",) for n in range(40) if patient_of(str(n), b"").place < 0.3}
    assert parts[0] == expected


def test_only_files_of_the_table_count(tmp_path):
    for name in ("a.png", "b.png", "mask.png"):
        picture(tmp_path / "scans" / name)
    write_series(tmp_path / "scans" / "ct", pattern(4, 5, 6))
    text = "file,who,kind,use\na.png,1,MR,yes\nb.png,1,CT,no\nct,2,CT,yes\ngone.png,3,CT,yes\n"
    (tmp_path / "t.csv").write_text(text)
    table = TableConfig(path=tmp_path / "t.csv", patient="who", modality="kind", where={"use": ("yes",)})
    found = look(tmp_path / "scans", table=table)
    taken = {(one.kind, one.modality, one.patient) for one in found.candidates}
    assert taken == {("2d", "MR", patient_of("1", SECRET).key), ("3d", "CT", patient_of("2", SECRET).key)}
    assert reasons(found) == {"missing_file": 1}


def test_what_a_table_lists_in_vain_is_told_from_what_cannot_be_read(tmp_path):
    picture(tmp_path / "scans" / "a.png")
    (tmp_path / "scans" / "link.png").symlink_to("nowhere")
    (tmp_path / "t.csv").write_text("file\ngone.png\na.png/below.png\nlink.png\na.png\n")
    assert reasons(look(tmp_path / "scans", table=TableConfig(path=tmp_path / "t.csv"))) == {
        "missing_file": 2,
        "cannot_open": 1,
    }


def test_a_file_that_its_folder_lists_for_another_patient_is_refused(tmp_path):
    picture(tmp_path / "scans" / "one" / "a.png")
    table = TableConfig(path=tmp_path / "t.csv", patient="who")
    table.path.write_text("file,who\none,1\none/a.png,1\n")
    assert len(look(tmp_path / "scans", table=table).candidates) == 1
    table.path.write_text("file,who\none,1\none/a.png,2\n")
    with pytest.raises(ConfigError, match="lists a file both by itself and by its folder"):
        look(tmp_path / "scans", table=table)


def test_dicom_without_a_patient_is_left_out_unless_the_site_knows_better(tmp_path):
    write_series(tmp_path / "p1", pattern(4, 5, 6), attributes={"PatientID": ""})
    assert reasons(look(tmp_path)) == {"no_patient_id": 1}
    (one,) = look(tmp_path, patient_pattern="^(?P<patient>p[0-9])/").candidates
    assert one.patient == patient_of("p1", SECRET).key


def test_a_slice_cut_short_leaves_a_gap_and_not_a_wrong_volume(tmp_path):
    write_series(tmp_path, pattern(12, 9, 8))
    whole = (tmp_path / "file005").read_bytes()
    (tmp_path / "file005").write_bytes(whole[:-40])
    found = look(tmp_path)
    assert not found.candidates
    assert reasons(found) == {"truncated_pixels": 1, "missing_slices": 1}
    (mended,) = catalogue([DataSource(folder=tmp_path)], SECRET, interpolate=True).candidates
    np.testing.assert_allclose(read(mended).voxels[0], pattern(12, 9, 8))  # the pattern is linear across slices


def test_a_few_lone_slices_beside_volumes_are_no_images(tmp_path):
    for number in range(2):
        write_series(tmp_path / f"ct{number}", pattern(4, 9, 7))
        write_series(tmp_path / f"one{number}", pattern(1, 9, 7))
    write_series(tmp_path / "mr", pattern(1, 9, 7), attributes={"Modality": "MR"})
    found = look(tmp_path)
    assert sorted((one.modality, one.kind) for one in found.candidates) == [("CT", "3d"), ("CT", "3d"), ("MR", "2d")]
    assert reasons(found) == {"lone_slice": 2}
    write_series(tmp_path / "one9", pattern(1, 9, 7))  # now slices prevail: they are what the folder is about
    assert sum(one.kind == "2d" and one.modality == "CT" for one in look(tmp_path).candidates) == 3


def test_masks_without_a_header_that_says_so_are_left_out(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (1, 9, 7, 5)).astype(np.float32)
    write_nifti(tmp_path / "mask.nii.gz", Scan(labels, (1.0, 1.0, 1.0), "MR"))
    write_png(tmp_path / "mask.png", (labels[0, 0] > 0).astype(np.uint8) * 255)
    for one in look(tmp_path).candidates:
        with pytest.raises(ScanError, match="label_map"):
            read(one)


def test_a_mask_of_a_small_lesion_is_one(tmp_path):
    """Of large scans every k-th voxel is looked at, and none of these may be the lesion's."""
    mask = np.zeros((1, 128, 128, 160), np.float32)
    mask[0, 60, 60, 1] = 1
    write_nifti(tmp_path / "mask.nii.gz", Scan(mask, (1.0, 1.0, 1.0), "MR"))
    (one,) = look(tmp_path).candidates
    with pytest.raises(ScanError, match="label_map"):
        read(one)


def test_a_volume_larger_than_any_scanner_is_left_out(tmp_path):
    """On a plan's grid it would need more room than there is, and so cost the site all other scans."""
    voxels = np.zeros((1, 60, 61, 62), np.float32)
    write_nifti(tmp_path / "a.nii.gz", Scan(voxels, (29.0, 29.0, 29.0), "MR"))
    write_nifti(tmp_path / "b.nii.gz", Scan(voxels, (25.0, 25.0, 25.0), "MR"))
    found = look(tmp_path)
    assert [one.files for one in found.candidates] == [("b.nii.gz",)]
    assert reasons(found) == {"bad_spacing": 1}


def test_a_row_that_nobody_can_look_at_costs_itself_alone(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"file\na.png\n{'x' * 300}.png\n")
    found = look(tmp_path, table=TableConfig(path=tmp_path / "t.csv"))
    assert [one.files for one in found.candidates] == [("a.png",)]
    assert reasons(found) == {"cannot_open": 1}


def test_a_series_spread_over_folders_is_one_volume(tmp_path):
    volume = pattern(8, 9, 7)
    write_series(tmp_path / "a", volume)
    (tmp_path / "b").mkdir()
    for index in (1, 4, 5):
        (tmp_path / "a" / f"file{index:03d}").rename(tmp_path / "b" / f"{9 - index}")
    (one,) = look(tmp_path).candidates
    np.testing.assert_array_equal(read(one).voxels[0], volume)


def test_two_patients_in_one_folder_stay_two(tmp_path):
    for who in ("a", "b"):
        write_series(tmp_path / who, pattern(4, 9, 7), attributes={"PatientID": who})
        for file in (tmp_path / who).iterdir():
            file.rename(tmp_path / f"{file.name}{who}")
    assert len({one.patient for one in look(tmp_path).candidates}) == 2


def test_reading_in_other_processes_gives_the_same(tmp_path):
    write_series(tmp_path / "a", pattern(4, 5, 6))
    picture(tmp_path / "b.png")
    assert catalogue([DataSource(folder=tmp_path)], SECRET, isolate=True, processes=2) == look(tmp_path)


EXPECTED = {
    "brain_fmri_4d_GE_150": {("used", (15, 64, 64)), ("later_time_point", 135)},
    "brain_mr_T1post_PGBM-003_22": {("used", (22, 320, 280))},
    "brain_mr_mixed_series_missing_slices_one_dir": {
        ("missing_slices", 8),
        ("missing_slices", 16),
        ("parameter_map", 1),
    },
    "chest_ct_LIDC-IDRI-0314_16of275": {("used", (16, 512, 512))},
    "ct_3slice_dcmqi": {("used", (3, 512, 512)), ("unsupported_object", 1)},
    "enhanced_mr_dcm_qa_enh/Philips": {("used", (32, 64, 64)), ("parameter_map", 1)},
    "enhanced_mr_dcm_qa_enh/Siemens": {("used", (6, 64, 64)), ("later_time_point", 3)},
    "hcrop_mr_PGBM-003": {("derived_image", 40)},
    "head_ct_GE_tilt_uneven_14of28": {("used", (7, 529, 512)), ("used", (7, 541, 512))},
    "head_phantom_ct_Philips_localizer": {("localizer", 1)},
}


@needs(SERIES)
@pytest.mark.parametrize("folder", sorted(EXPECTED))
def test_each_real_series_has_its_decision(folder):
    found = look(SERIES / folder)
    outcome = {("used", read(one).voxels.shape[1:]) for one in found.candidates}
    outcome |= {(entry.reason, len(entry.files)) for entry in found.left_out}
    assert outcome == EXPECTED[folder]
    assert not found.unreadable


@needs(STS)
def test_series_equal_the_authors_nifti_exactly():
    found = look(STS / "dicom")
    assert len(found.candidates) == 6
    assert reasons(found) == {"no_pixels": 6}
    for one in found.candidates:
        who, kind = one.files[0].split("/")[:2]
        ours = read(one)
        theirs = read_nifti(STS / "nifti_reference" / who / f"{kind}_image.nii.gz", "OT")
        np.testing.assert_array_equal(ours.voxels, theirs.voxels)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)


HARD = DATA / "hard_dicom"
OUTCOMES = {
    "truncated_pixels.dcm": "truncated_pixels",
    "truncated_header.dcm": "no_pixels",
    "text_named_dcm.dcm": "not_an_image",
    "png_named_dcm.dcm": "name_contradicts_content",
    "random_bytes.dcm": "not_an_image",
    "preamble_only.dcm": "damaged_header",
    "bitflips_in_pixels.dcm": "used",
    "no_geometry.dcm": "no_geometry",
    "no_rows.dcm": "bad_pixel_description",
    "no_uids.dcm": "used",
    "no_patient_id.dcm": "no_patient_id",
    "zero_spacing.dcm": "bad_spacing",
    "dx_inverse_photometric.dcm": "used",
}


@needs(HARD)
@pytest.mark.parametrize("name", sorted(OUTCOMES))
def test_each_broken_file_has_its_decision(name, tmp_path):
    (tmp_path / name).symlink_to(HARD / "derived" / name)
    found = look(tmp_path)
    assert [*reasons(found), *("used" for _ in found.candidates)] == [OUTCOMES[name]]


@needs(HARD)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pet_complete", {("used", 47)}),
        ("pet_shuffled_filenames", {("used", 47)}),
        ("pet_duplicate_slice", {("used", 47), ("duplicate", 1)}),
        ("pet_missing_one", {("missing_slices", 46)}),
        ("pet_two_patient_ids", {("two_patients_in_series", 47)}),
    ],
)
def test_each_broken_series_has_its_decision(name, expected):
    found = look(HARD / "derived_series" / name)
    outcome = {("used", len(one.files)) for one in found.candidates}
    assert outcome | {(entry.reason, len(entry.files)) for entry in found.left_out} == expected


def test_a_scan_that_cannot_be_decoded_says_so(tmp_path):
    picture(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    (one,) = look(tmp_path).candidates
    with pytest.raises(ScanError, match="cannot_decode"):
        read(one)


def test_folders_that_are_links_or_closed_are_named_and_not_passed_over(tmp_path, monkeypatch):
    data = tmp_path / "data"
    picture(data / "a.png")
    picture(tmp_path / "elsewhere" / "b.png", 1)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "closed").mkdir()
    really = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = look(data)
    assert {entry.files[0]: entry.reason for entry in found.unreadable} == {
        "linked": "linked_folder",
        "closed": "cannot_open",
    }
    assert found.files_seen == 3
    assert len(found.candidates) == 1


def test_a_small_file_that_holds_a_large_scan_is_read_by_a_worker(tmp_path):
    picture(tmp_path / "a.png")
    (small,) = look(tmp_path).candidates
    assert safe_here([small])
    assert not safe_here([replace(small, shape=(9000, 9000))])


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_a_picture_that_may_take_long_is_read_by_a_worker(tmp_path, name):
    grey = np.random.default_rng(0).integers(0, 255, (21, 17)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / name, **({"progressive": True} if name == "a.jpg" else {}))
    (found,) = look(tmp_path).candidates
    assert not safe_here([found])
