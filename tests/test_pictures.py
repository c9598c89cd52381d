import errno
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from client.pictures import check_header, looks_like_picture, may_take_long, read_picture, write_png
from unimiss_core.errors import ScanError
from unimiss_core.plan import prepare
from unimiss_core.study import PlanConfig

GREY = (np.arange(35 * 22) * 7 % 251).reshape(35, 22)


def test_a_picture_of_a_ct_keeps_its_contrast(tmp_path):
    # Its grey values are no Hounsfield units, whose window is 2048 wide.
    write_png(tmp_path / "a.png", GREY.astype(np.uint8))
    values, _ = prepare(read_picture(tmp_path / "a.png", "CT"), PlanConfig())
    assert np.ptp(values) > 0.9


def test_png_of_8_and_16_bit_reads_back_exactly(tmp_path):
    for kind, factor in ((np.uint8, 1), (np.uint16, 257)):
        write_png(tmp_path / "a.png", (GREY * factor).astype(kind))
        scan = read_picture(tmp_path / "a.png", "XR")
        np.testing.assert_array_equal(scan.voxels[0], GREY * factor)
        assert scan.rank == 2
        assert not scan.spacing_known
        assert scan.affine is None


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_stored_in_colours_is_grey(tmp_path, mode):
    Image.fromarray(GREY.astype(np.uint8)).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "XR").voxels[0], GREY)


def test_grey_behind_a_colour_jpeg_is_grey_and_near(tmp_path):
    smooth = np.linspace(0, 255, 40 * 56).reshape(40, 56).astype(np.uint8)
    Image.fromarray(smooth).convert("RGB").save(tmp_path / "a.jpg", quality=90)
    assert np.abs(read_picture(tmp_path / "a.jpg", "XR").voxels[0] - smooth).mean() < 3


def test_tiff_of_16_bit_with_white_as_zero_is_turned_over(tmp_path):
    stored = GREY.astype(np.uint16) * 200
    Image.fromarray(stored).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif", "XR").voxels[0], stored)
    Image.fromarray(stored).save(tmp_path / "b.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_picture(tmp_path / "b.tif", "XR").voxels[0], stored.max() - stored)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)), "colour_image"),
        (Image.fromarray(GREY.astype(np.uint8)).convert("1"), "binary_image"),
    ],
)
def test_colours_and_line_art_are_left_out(tmp_path, picture, reason):
    picture.save(tmp_path / "a.png")
    with pytest.raises(ScanError, match=f"^{reason}"):
        read_picture(tmp_path / "a.png", "XR")


def png(width: int, height: int, rows: bytes, *, bits: int = 8, kind: int = 0) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header, packed = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0), zlib.compress(rows)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", packed[:9]), chunk(b"IDAT", packed[9:]), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_that_claims(width: int, height: int) -> bytes:
    return png(width, height, b"\0" * 30)


def deep_png(samples: np.ndarray, kind: int) -> bytes:
    """Samples (H, W, C) of 16 bit; each row is written as its differences to the row above, as real files are."""
    rows = samples.astype(">u2").reshape(len(samples), -1).view(np.uint8)
    steps = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    return png(samples.shape[1], samples.shape[0], b"".join(b"\2" + row.tobytes() for row in steps), bits=16, kind=kind)


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_grey_of_16_bit_stored_in_colours_or_with_alpha_keeps_every_bit(tmp_path, kind, channels):
    grey = GREY * 16 + 7  # 12 bits: the upper byte alone would be a label map
    samples = np.dstack([grey] * channels)
    if kind != 2:
        samples[..., -1] = 65535
    (tmp_path / "a.png").write_bytes(deep_png(samples, kind))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "XR").voxels[0], grey)


def test_colours_of_16_bit_are_left_out(tmp_path):
    (tmp_path / "a.png").write_bytes(deep_png(np.dstack([GREY * 200, GREY, GREY * 90]), 2))
    with pytest.raises(ScanError, match="colour_image"):
        read_picture(tmp_path / "a.png", "XR")


def tiff(stored: np.ndarray, *, photometric: int = 1, samples: int = 1) -> bytes:
    """An uncompressed TIFF of numbers of any type."""
    content, bits = stored.tobytes(), stored.dtype.itemsize * 8
    many = np.array([bits] * samples, np.uint16).tobytes() if samples > 1 else b""
    begin = 8 + 2 + 10 * 12 + 4
    entries = [
        (256, stored.shape[1], 1), (257, stored.shape[0], 1), (258, begin if many else bits, samples), (259, 1, 1),
        (262, photometric, 1), (273, begin + len(many), 1), (277, samples, 1), (278, stored.shape[0], 1),
        (279, len(content), 1), (339, "uif".index(stored.dtype.kind) + 1, 1),
    ]  # fmt: skip
    told = b"".join(struct.pack("<HHII", tag, 3, count, value) for tag, value, count in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + told + bytes(4) + many + content


@pytest.mark.parametrize(
    ("stored", "photometric", "expected"),
    [
        ((GREY % 256 - 128).astype(np.int8), 1, GREY % 256 - 128),
        (GREY.astype(np.uint32) * 2**24, 1, GREY * 2.0**24),
        (GREY.astype(np.int32) - 120, 1, GREY - 120),
        (GREY.astype(np.float32) / 4, 1, GREY / 4),
        (GREY.astype(np.float32) / 4, 0, (GREY.max() - GREY) / 4),
    ],
)
def test_a_tiff_of_any_numbers_is_read_as_they_are(tmp_path, stored, photometric, expected):
    (tmp_path / "a.tif").write_bytes(tiff(stored, photometric=photometric))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif", "XR").voxels[0], expected)


def test_a_tiff_of_grey_stored_in_colours_of_16_bit_is_not_read_with_eight(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(np.dstack([GREY.astype(np.uint16) * 16] * 3), photometric=2, samples=3))
    with pytest.raises(ScanError, match="cannot_decode"):
        read_picture(tmp_path / "a.tif", "XR")


TURNED = {
    1: GREY,
    2: np.fliplr(GREY),
    3: np.rot90(GREY, 2),
    4: np.flipud(GREY),
    5: GREY.T,
    6: np.rot90(GREY, -1),
    7: np.rot90(GREY, 2).T,
    8: np.rot90(GREY),
}
"""EXIF's number -> GREY as every viewer shows it."""


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_picture_that_was_stored_turned_is_read_as_it_is_shown(tmp_path, orientation, kind):
    picture, exif = Image.fromarray(GREY.astype(kind)), Image.Exif()
    exif[274] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    picture.save(tmp_path / "a.tif", tiffinfo={274: orientation})
    picture.save(tmp_path / "b.tif", tiffinfo={274: orientation}, compression="tiff_lzw")
    for file in (tmp_path / "a.png", tmp_path / "a.tif", tmp_path / "b.tif"):
        np.testing.assert_array_equal(read_picture(file, "XR").voxels[0], TURNED[orientation])
        assert check_header(file) == TURNED[orientation].shape
    if kind is np.uint8:
        picture.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
        assert check_header(tmp_path / "a.jpg") == TURNED[orientation].shape
        assert np.abs(read_picture(tmp_path / "a.jpg", "XR").voxels[0] - TURNED[orientation]).mean() < 3


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0", b"\0" * 9])
def test_a_damaged_exif_says_nothing(tmp_path, exif):
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "XR").voxels[0], GREY)


@pytest.mark.parametrize(("side", "reason"), [(60_000, "too_large"), (9_000, "truncated_pixels")])
def test_a_tiny_file_that_claims_a_huge_picture_is_refused_by_its_header(tmp_path, side, reason):
    (tmp_path / "a.png").write_bytes(png_that_claims(side, side))
    with pytest.raises(ScanError, match=f"^{reason}"):
        check_header(tmp_path / "a.png")


def test_what_may_go_over_its_pixels_without_end_is_known_by_its_header(tmp_path):
    def takes_long(content: bytes) -> bool:
        (tmp_path / "a").write_bytes(content)
        return may_take_long(tmp_path / "a")

    def written(form: str, mode: str = "L", **options) -> bytes:
        Image.fromarray(GREY.astype(np.uint8)).convert(mode).save(tmp_path / "b", form, **options)
        return (tmp_path / "b").read_bytes()

    grey, colour = written("JPEG"), written("JPEG", "RGB", exif=Image.Exif(), comment=b"none")
    assert not any(map(takes_long, (written("PNG"), grey, colour)))
    assert all(takes_long(written("JPEG", mode, progressive=True)) for mode in ("L", "RGB"))
    assert takes_long(written("TIFF"))
    begin = colour.index(b"\xff\xda")
    assert takes_long(colour[: begin + 4] + b"\1" + colour[begin + 5 :])  # one of three colours: two scans to come
    begin = grey.index(b"\xff\xc0")
    assert takes_long(grey[:begin] + b"\xff" + grey[begin:])  # which decoders pass over
    assert takes_long(grey[: begin + 3])


def test_a_cut_file_cannot_be_decoded(tmp_path):
    write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 48)).astype(np.uint8))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    assert looks_like_picture((tmp_path / "b.png").read_bytes())
    with pytest.raises(ScanError, match="cannot_decode"):
        read_picture(tmp_path / "b.png", "XR")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.EIO, "input/output error"), "cannot_open"), (OSError("broken"), "cannot_decode")],
)
def test_a_disk_that_fails_is_no_fault_of_the_picture(tmp_path, monkeypatch, error, reason):
    write_png(tmp_path / "a.png", GREY.astype(np.uint8))

    def fail(*_):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(ScanError) as found:
        read_picture(tmp_path / "a.png", "XR")
    assert found.value.reason == reason
