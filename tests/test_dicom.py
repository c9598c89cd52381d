import csv
import itertools
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.dicom import read_frames, read_header, write_dicom
from client.dicom_bytes import looks_like_dicom
from client.dicom_values import grey_of
from client.reasons import REASONS
from tests.series_files import AXIAL, write_radiograph
from tests.shared_files import DATA, needs
from unimiss_core.errors import ScanError

HARD = DATA / "hard_dicom"
GREY = (np.arange(13 * 9) * 31 % 4096).reshape(13, 9).astype(np.uint16)
SECRET = b"s" * 32

CT = {
    "Modality": "CT",
    "PatientID": "invented",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "PixelSpacing": [0.9, 0.7],
    "ImagePositionPatient": [1, 2, 3],
    "ImageOrientationPatient": list(AXIAL),
    "RescaleSlope": 2,
    "RescaleIntercept": -1024,
}


def rewritten(path: Path, change, **options) -> Path:
    dataset = pydicom.dcmread(path, force=True)
    change(dataset)
    dataset.save_as(path, **options)
    return path


def header(path: Path):
    return read_header(path, path.name, SECRET)


def test_values_are_rescaled(tmp_path):
    write_dicom(tmp_path / "a", GREY, CT)
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], GREY * 2.0 - 1024)


def test_an_inverted_radiograph_reads_as_its_negative_written_plainly(tmp_path):
    pixels = (GREY % 256).astype(np.uint8)
    write_radiograph(tmp_path / "a", pixels)
    write_radiograph(tmp_path / "b", 255 - pixels, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0]), read_frames(tmp_path / "b", [0]))


@pytest.mark.parametrize("signed", [False, True])
def test_twelve_bits_in_sixteen_ignore_what_else_the_word_holds(tmp_path, signed):
    values = GREY.astype(np.int32) - (2048 if signed else 0)
    words = (values & 0xFFF) | 0xA000  # an overlay in the unused bits
    kind = np.int16 if signed else np.uint16
    facts = {**CT, "BitsStored": 12, "HighBit": 11, "RescaleSlope": 1, "RescaleIntercept": 0}
    write_dicom(tmp_path / "a", words.astype(np.uint16).view(kind), facts)
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], values)


def test_padding_of_a_radiograph_lies_at_its_low_end(tmp_path):
    pixels = GREY.copy() + 10
    pixels[:4] = 65535
    write_radiograph(tmp_path / "a", pixels, PixelPaddingValue=65535)
    values = read_frames(tmp_path / "a", [0])[0]
    assert (values[:4] == pixels[4:].min()).all()
    np.testing.assert_array_equal(values[4:], pixels[4:])


@pytest.mark.parametrize("without_sign", [False, True])
def test_padding_of_signed_pixels_may_be_given_without_sign(tmp_path, without_sign):
    """As the same bits: 0x8000 is -32768 there."""
    pixels = GREY.astype(np.int16)
    pixels[:4] = -32768

    def pad(dataset):
        dataset.add_new("PixelPaddingValue", *(("US", 32768) if without_sign else ("SS", -32768)))

    write_dicom(tmp_path / "a", pixels, {"Modality": "CR", "PatientID": "invented"}, adjust=pad)
    values = read_frames(tmp_path / "a", [0])[0]
    assert (values[:4] == pixels[4:].min()).all()
    np.testing.assert_array_equal(values[4:], pixels[4:])


def test_the_transfer_syntax_does_not_matter(tmp_path):
    for name, syntax in (("a", ImplicitVRLittleEndian), ("b", DeflatedExplicitVRLittleEndian), ("c", None)):
        write_dicom(tmp_path / name, GREY, CT)
        if syntax is None:
            rewritten(tmp_path / name, lambda dataset: dataset.compress(RLELossless))
        else:
            dataset = pydicom.dcmread(tmp_path / name)
            dataset.file_meta.TransferSyntaxUID = syntax
            dataset.save_as(tmp_path / name, implicit_vr=syntax is ImplicitVRLittleEndian, little_endian=True)
        assert header(tmp_path / name).reason == ""
        assert header(tmp_path / name).compressed == (name == "c")
        np.testing.assert_array_equal(read_frames(tmp_path / name, [0])[0], GREY * 2.0 - 1024)


def test_a_file_without_preamble_is_read(tmp_path):
    write_dicom(tmp_path / "a", GREY, CT)
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[132:])
    assert looks_like_dicom((tmp_path / "b").read_bytes()[:348])
    assert header(tmp_path / "b").patient == header(tmp_path / "a").patient
    np.testing.assert_array_equal(read_frames(tmp_path / "b", [0]), read_frames(tmp_path / "a", [0]))


@pytest.mark.parametrize("name", ["PatientID", "IssuerOfPatientID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_a_name_with_a_backslash_is_taken_whole(tmp_path, name):
    """DICOM takes it for several values, of which the first may be the hospital's."""

    def named(text: str):
        write_dicom(tmp_path / "a", GREY, CT | {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.3", name: text})
        found = header(tmp_path / "a")
        return found.patient, found.study, found.series

    assert len({named("1.4\\1"), named("1.4\\2"), named("1.4")}) == 3


@pytest.mark.parametrize("kind", ["OB", "UN", "UT", "PN"])
def test_a_patient_id_of_another_type_is_the_same_text(tmp_path, kind):
    def named(text: str):
        def change(dataset):
            value = text.encode() + b" " * (len(text) % 2)
            dataset._dict[Tag("PatientID")] = RawDataElement(Tag("PatientID"), kind, len(value), value, 0, False, True)

        write_dicom(tmp_path / "a", GREY, CT, adjust=change)
        return header(tmp_path / "a").patient

    for text in ("PAT1", "PAT2", "HOSP\\1"):
        write_dicom(tmp_path / "b", GREY, CT | {"PatientID": text})
        assert named(text) == header(tmp_path / "b").patient


def test_a_patient_id_of_separators_alone_names_nobody(tmp_path):
    write_dicom(tmp_path / "a", GREY, CT | {"PatientID": "\\ \\"})
    assert header(tmp_path / "a").patient is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, "derived_image"),
        ({"ImageType": ["DERIVED", "PRIMARY", "MPR"]}, "derived_image"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "dose_or_screen"),
        ({"Modality": "MR", "ImageType": ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"]}, "parameter_map"),
        ({"Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "P"]}, "phase_image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary_capture"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1", "Modality": "US"}, "unsupported_object"),
        ({"BurnedInAnnotation": "YES"}, "burned_in_annotation"),
        ({"Rows": 0}, "bad_pixel_description"),
        ({"Rows": 14}, "truncated_pixels"),
        ({"Rows": 60_000, "Columns": 60_000}, "too_large"),
        ({"ImageType": ["DERIVED", "SECONDARY"], "Modality": "PT"}, ""),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, ""),
    ],
)
def test_each_kind_of_object_has_its_rule(tmp_path, change, reason):
    write_dicom(tmp_path / "a", GREY, CT | change)
    assert header(tmp_path / "a").reason == reason


def test_an_unsigned_ct_must_say_how_it_becomes_hounsfield_units(tmp_path):
    plain = {key: value for key, value in CT.items() if not key.startswith("Rescale")}
    write_dicom(tmp_path / "a", GREY, plain)
    assert header(tmp_path / "a").reason == "no_rescale"
    write_dicom(tmp_path / "b", GREY.astype(np.int16), plain)
    assert header(tmp_path / "b").reason == ""


def raw(name, value):
    """Puts in the bytes of a number, whatever they are."""

    def change(dataset):
        dataset._dict[Tag(name)] = RawDataElement(Tag(name), "DS", len(value), value, 0, False, True)

    return change


@pytest.mark.parametrize("value", [b"", b"  ", b"\0\0"])
@pytest.mark.parametrize("modality", ["MR", "CR"])
def test_of_all_but_ct_and_pet_an_empty_scale_counts_as_absent(tmp_path, modality, value):
    write_dicom(tmp_path / "a", GREY, CT | {"Modality": modality}, adjust=raw("RescaleSlope", value))
    write_dicom(tmp_path / "b", GREY, CT | {"Modality": modality}, adjust=raw("RescaleIntercept", value))
    for file, values in (("a", GREY - 1024.0), ("b", GREY * 2.0)):
        assert [frame.reason for frame in header(tmp_path / file).frames] == [""]
        np.testing.assert_array_equal(read_frames(tmp_path / file, [0])[0], values)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize(
    ("modality", "value"),
    [
        ("CT", b""),
        ("CT", b"  "),
        ("PT", b""),
        *itertools.product(("CT", "MR", "CR"), (b"NaN ", b"-1,5", b"1\\2 ", b"1\\", b"\\")),
    ],
)
def test_a_scale_that_is_there_and_is_not_one_number_is_never_guessed(tmp_path, modality, name, value):
    write_dicom(tmp_path / "a", GREY, CT | {"Modality": modality}, adjust=raw(name, value))
    (frame,) = header(tmp_path / "a").frames
    assert frame.reason == "bad_pixel_description"
    with pytest.raises(ScanError, match="bad_pixel_description"):
        read_frames(tmp_path / "a", [0])


@pytest.mark.parametrize("shared", [False, True])
def test_a_frame_whose_scale_is_not_one_number_is_left_out(tmp_path, shared):
    def scaled(intercept) -> Dataset:
        item, holder = Dataset(), Dataset()
        item.RescaleIntercept = intercept
        holder.PixelValueTransformationSequence = [item]
        return holder

    def enhance(dataset):
        dataset.SharedFunctionalGroupsSequence = [scaled([1, 2] if shared else 0)]
        dataset.PerFrameFunctionalGroupsSequence = [scaled(-1), Dataset() if shared else scaled([1, 2])]

    facts = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "PatientID": "invented"}
    write_dicom(tmp_path / "a", np.stack([GREY, GREY]), facts, adjust=enhance)
    assert [frame.reason for frame in header(tmp_path / "a").frames] == ["", "bad_pixel_description"]
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], GREY - 1.0)


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_an_empty_scale_of_a_frame_leaves_the_word_to_that_of_all(tmp_path, modality):
    def enhance(dataset):
        own, shared = Dataset(), Dataset()
        own.PixelValueTransformationSequence, shared.PixelValueTransformationSequence = [Dataset()], [Dataset()]
        own.PixelValueTransformationSequence[0].RescaleSlope = None
        shared.PixelValueTransformationSequence[0].RescaleSlope = 3
        dataset.PerFrameFunctionalGroupsSequence, dataset.SharedFunctionalGroupsSequence = [own], [shared]

    classes = {"MR": "1.2.840.10008.5.1.4.1.1.4.1", "CT": "1.2.840.10008.5.1.4.1.1.2.1"}
    write_dicom(tmp_path / "a", GREY[None], {"Modality": modality, "SOPClassUID": classes[modality]}, adjust=enhance)
    (frame,) = header(tmp_path / "a").frames
    assert frame.reason == ("bad_pixel_description" if modality == "CT" else "")
    if modality == "MR":
        np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], GREY * 3.0)


def test_an_empty_table_of_values_says_nothing(tmp_path):
    plain = {key: value for key, value in CT.items() if not key.startswith("Rescale")}
    write_dicom(tmp_path / "a", GREY, plain | {"ModalityLUTSequence": []})
    assert header(tmp_path / "a").reason == "no_rescale"


def test_an_enhanced_object_gives_each_frame_its_place_and_scale(tmp_path):
    def enhance(dataset):
        shared, frames = Dataset(), []
        shared.PixelMeasuresSequence = [Dataset()]
        shared.PixelMeasuresSequence[0].PixelSpacing = [0.9, 0.7]
        shared.PlaneOrientationSequence = [Dataset()]
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
        for number in range(3):
            frame = Dataset()
            frame.PlanePositionSequence = [Dataset()]
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 5.0 * number]
            frame.PixelValueTransformationSequence = [Dataset()]
            frame.PixelValueTransformationSequence[0].RescaleSlope = number + 1
            frame.PixelValueTransformationSequence[0].RescaleIntercept = -number
            frames.append(frame)
        dataset.SharedFunctionalGroupsSequence = [shared]
        dataset.PerFrameFunctionalGroupsSequence = frames

    pixels = np.stack([GREY, GREY + 1, GREY + 2])
    facts = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "PatientID": "invented"}
    write_dicom(tmp_path / "a", pixels, facts, adjust=enhance)
    found = header(tmp_path / "a")
    assert [frame.position for frame in found.frames] == [(0, 0, 0), (0, 0, 5), (0, 0, 10)]
    assert found.frames[2].spacing_mm == (0.9, 0.7)
    values = read_frames(tmp_path / "a", [2, 0])
    np.testing.assert_array_equal(values, [(GREY + 2) * 3.0 - 2, GREY])


@pytest.mark.parametrize(
    ("component", "reason"), [("MAGNITUDE", ""), ("PHASE", "phase_image"), ("REAL", "phase_image")]
)
@pytest.mark.parametrize("of_frames", [False, True])
def test_an_enhanced_mr_says_by_component_what_is_no_picture(tmp_path, component, reason, of_frames):
    def enhance(dataset):
        frame, told = Dataset(), Dataset()
        told.ComplexImageComponent = component
        if of_frames:
            frame.MRImageFrameTypeSequence = [told]
        dataset.ComplexImageComponent = "MIXED" if of_frames else component
        dataset.SharedFunctionalGroupsSequence = [Dataset()]
        dataset.PerFrameFunctionalGroupsSequence = [frame]

    facts = {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "PatientID": "invented"}
    write_dicom(tmp_path / "a", GREY[None], facts, adjust=enhance)
    found = header(tmp_path / "a")
    assert (found.frames[0].reason if of_frames else found.reason) == reason


def test_a_palette_and_colours_mean_grey_only_where_they_are():
    ramp = np.arange(60, dtype=np.uint8).reshape(6, 10)
    np.testing.assert_array_equal(grey_of(np.stack([ramp] * 3, axis=2)), ramp)
    with pytest.raises(ScanError, match="colour_image"):
        grey_of(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2))


@needs(HARD)
def test_every_hard_file_is_read_or_named():
    """Files that decode with every codec give their pixels; no other exception than ScanError leaves the reader."""
    with (HARD / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        path, decodes = HARD / row["file"], row["decode_all_codecs"].startswith("ok")
        if not looks_like_dicom(path.read_bytes()[:348]):
            continue
        try:
            found = header(path)
        except ScanError as error:
            found = None
            reason = error.reason
        else:
            reason = found.reason
        assert reason in REASONS or not reason
        if decodes:
            assert found is not None, (row["file"], reason)
        if found is not None and decodes and not reason:
            frames = read_frames(path, range(len(found.frames)))
            assert frames.shape == (len(found.frames), int(row["rows"]), int(row["cols"])), row["file"]


@needs(HARD)
def test_the_same_slice_in_many_encodings_has_the_same_values():
    paths = sorted((HARD / "singles").glob("cornerstone3D__*CTImage.dcm_*"))
    assert len(paths) >= 5
    first = read_frames(paths[0], [0])
    for path in paths[1:]:
        np.testing.assert_array_equal(read_frames(path, [0]), first)


@needs(HARD)
def test_the_inverted_copy_of_a_radiograph_is_the_same_picture():
    plain = read_frames(HARD / "singles" / "highdicom__dx_image.dcm", [0])
    np.testing.assert_array_equal(read_frames(HARD / "derived" / "dx_inverse_photometric.dcm", [0]), plain)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header changed, or the file cut."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
    return bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.3 else changed)


def test_broken_files_end_in_a_reason(tmp_path):
    write_dicom(tmp_path / "a", GREY, CT)
    content, rng, path = (tmp_path / "a").read_bytes(), random.Random(0), tmp_path / "b"
    reasons = set()
    for _ in range(300):
        path.write_bytes(mutated(content, rng))
        try:
            found = header(path)
            reasons.add(found.reason)
            if not found.reason and not found.compressed:
                read_frames(path, range(len(found.frames)))
        except ScanError as error:
            reasons.add(error.reason)
    assert reasons <= REASONS.keys() | {""}
    assert len(reasons) > 4


def test_a_short_file_that_claims_a_huge_image_allocates_nothing(tmp_path):
    write_dicom(tmp_path / "a", GREY[:2, :2], CT | {"Rows": 20_000, "Columns": 20_000})
    tracemalloc.start()
    assert header(tmp_path / "a").reason == "truncated_pixels"
    with pytest.raises(ScanError, match="truncated_pixels"):
        read_frames(tmp_path / "a", [0])
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_short_encoded_file_that_claims_a_huge_image_never_meets_its_codec(tmp_path, syntax):
    def encoded(dataset):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([bytes([2, 0, 0, 0, 64, 0, 0, 0, 66, 0, 0, 0]) + bytes(56)])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True

    write_dicom(tmp_path / "a", GREY[:2, :2], CT | {"Rows": 20_000, "Columns": 20_000}, adjust=encoded)
    assert header(tmp_path / "a").reason == "truncated_pixels"


def test_a_deflated_file_that_unfolds_without_end_is_refused(tmp_path):
    write_dicom(tmp_path / "a", np.zeros((9000, 9000), np.uint8), CT)
    dataset = pydicom.dcmread(tmp_path / "a")
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(tmp_path / "a", implicit_vr=False, little_endian=True)
    with pytest.raises(ScanError, match="too_large"):
        header(tmp_path / "a")


def test_nothing_of_a_file_gets_into_an_error_or_onto_a_screen(tmp_path, capfd, caplog):
    write_dicom(tmp_path / "a", GREY, CT | {"PatientID": "Zzyzx^Invented", "PatientName": "Zzyzx"})
    content = (tmp_path / "a").read_bytes().replace(b"0.9\\0.7 ", b"Zz\\Zyzx ")
    (tmp_path / "a").write_bytes(content)
    found = header(tmp_path / "a")
    assert "Zzyzx" not in repr(found)
    assert found.frames[0].spacing_mm is None
    said = capfd.readouterr()
    assert "Zz" not in said.out + said.err + caplog.text


def test_an_inverted_radiograph_with_a_table_of_values_is_turned_over_behind_it(tmp_path):
    table = np.arange(4096, dtype=np.uint16)[::-1] // 2  # falls, so that the order of the two steps shows

    def describe(dataset):
        item = Dataset()
        item.add_new(0x00283002, "US", [4096, 0, 16])
        item.ModalityLUTType = "US"
        item.add_new(0x00283006, "OW", table.tobytes())
        dataset.ModalityLUTSequence = [item]

    facts = {"Modality": "CR", "PatientID": "invented", "BitsStored": 12, "HighBit": 11}
    write_dicom(tmp_path / "a", GREY, facts | {"PhotometricInterpretation": "MONOCHROME1"}, adjust=describe)
    expected = int(table.max()) + int(table.min()) - table[GREY].astype(int)
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], expected)


@pytest.mark.parametrize(("padding", "outside"), [(4000, -1024.0), (-2000, -3024.0)])
def test_padding_of_a_ct_is_never_bright_and_else_stays_as_it_is(tmp_path, padding, outside):
    pixels = np.array([[padding, 0, 900], [padding, 50, 60]], dtype=np.int16)
    write_dicom(tmp_path / "a", pixels, CT | {"RescaleSlope": 1, "PixelPaddingValue": padding})
    expected = np.array([[outside, -1024, -124], [outside, -974, -964]])
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], expected)


def test_run_lengths_hold_the_unused_bits_of_words_too(tmp_path):
    write_dicom(tmp_path / "a", GREY | 0xA000, CT | {"BitsStored": 12, "HighBit": 11})
    rewritten(tmp_path / "a", lambda dataset: dataset.compress(RLELossless))
    np.testing.assert_array_equal(read_frames(tmp_path / "a", [0])[0], GREY * 2.0 - 1024)


def test_pictures_in_visible_light_are_no_secondary_captures(tmp_path):
    for sop_class, reason in (
        ("1.2.840.10008.5.1.4.1.1.7", "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.7.2", "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.77.1.4", "unsupported_object"),
    ):
        write_dicom(tmp_path / "a", GREY, CT | {"SOPClassUID": sop_class, "Modality": "XC"})
        assert header(tmp_path / "a").reason == reason


def test_frames_without_number_are_refused_before_each_is_described(tmp_path):
    write_dicom(tmp_path / "a", GREY, CT)

    def claim(dataset: Dataset) -> None:
        dataset.compress(RLELossless)
        dataset.PixelData = encapsulate([bytes(2**17)])
        dataset.Rows = dataset.Columns = 1
        dataset.NumberOfFrames = 2**28

    rewritten(tmp_path / "a", claim)
    tracemalloc.start()
    try:
        assert header(tmp_path / "a").reason == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
