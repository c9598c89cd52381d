import errno
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from client.pictures import check_header, looks_like_picture, read_picture, write_png
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


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 30)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("side", "reason"), [(60_000, "too_large"), (9_000, "truncated_pixels")])
def test_a_tiny_file_that_claims_a_huge_picture_is_refused_by_its_header(tmp_path, side, reason):
    (tmp_path / "a.png").write_bytes(png_that_claims(side, side))
    with pytest.raises(ScanError, match=f"^{reason}"):
        check_header(tmp_path / "a.png")


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
