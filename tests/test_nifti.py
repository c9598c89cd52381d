import errno
import gzip
import itertools
import tracemalloc

import nibabel
import numpy as np
import pytest

from client.nifti import check_header, read_nifti, write_mask, write_nifti
from unimiss_core.errors import ScanError
from unimiss_core.scan import Scan

SHAPE = (5, 7, 4)  # X, Y, Z of the file


def save(path, voxels, affine, **header):
    image = nibabel.Nifti1Image(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)


SPACING = np.array([0.8, 1.1, 2.5])


def every_orientation(world):
    """(X, Y, Z) along R, A, S from the origin -> the same in each order and direction of axes, with its affine."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            voxels, affine = world.transpose(order), np.eye(4)
            affine[:3, :3] = np.diag(SPACING)[:, list(order)]
            for axis, sign in enumerate(signs):
                if sign < 0:
                    affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
                    affine[:3, axis] *= -1
                    voxels = np.flip(voxels, axis)
            yield np.ascontiguousarray(voxels), affine


def test_every_orientation_reads_as_the_same_volume(tmp_path):
    world = np.random.default_rng(0).integers(0, 999, SHAPE).astype(np.int16)  # axes R, A, S
    for voxels, affine in every_orientation(world):
        save(tmp_path / "a.nii", voxels, affine)
        scan = read_nifti(tmp_path / "a.nii", "CT")
        # S first and rising, then A to P, then R to L.
        np.testing.assert_array_equal(scan.voxels[0], world[::-1, ::-1].transpose(2, 1, 0))
        np.testing.assert_allclose(scan.spacing_mm, SPACING[[2, 1, 0]], atol=1e-6)
        np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [0.8 * 4, 1.1 * 6, 0, 1], atol=1e-5)


@pytest.mark.parametrize("thin", [0, 1, 2])  # sagittal, coronal, axial
def test_every_orientation_of_a_slice_reads_as_it_is_shown_and_its_mask_goes_back(tmp_path, thin):
    """Head up, posterior down in an axial slice and to the right in a sagittal one, the patient's left to the right."""
    world = np.random.default_rng(thin).integers(0, 2, [1 if axis == thin else n for axis, n in enumerate(SHAPE)])
    shown = (world[0, ::-1, ::-1].T, world[::-1, 0, ::-1].T, world[::-1, ::-1, 0].T)[thin]
    corner = [[0, 6, 3], [4, 0, 3], [4, 6, 0]][thin]  # of the first pixel: A and S; R and S; R and A
    for voxels, affine in every_orientation(world.astype(np.int16)):
        save(tmp_path / "a.nii", voxels, affine)
        scan = read_nifti(tmp_path / "a.nii", "CT")
        np.testing.assert_array_equal(scan.voxels[0], shown)
        np.testing.assert_allclose(scan.spacing_mm, SPACING[[[2, 1], [2, 0], [1, 0]][thin]], atol=1e-6)
        np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [*(SPACING * corner), 1], atol=1e-5)
        write_mask(tmp_path / "m.nii", scan.voxels[0].astype(np.uint8), scan.affine, like=tmp_path / "a.nii")
        mask = nibabel.load(tmp_path / "m.nii")
        np.testing.assert_array_equal(np.asarray(mask.dataobj), voxels)
        np.testing.assert_allclose(mask.affine, affine, atol=1e-5)


def test_what_is_written_reads_back(tmp_path):
    voxels = np.random.default_rng(1).normal(size=(1, 3, 6, 5)).astype(np.float32)
    affine = np.array([[0, 0, -0.7, 30], [0, -0.9, 0, 40], [2.0, 0, 0, -7], [0, 0, 0, 1]])
    write_nifti(tmp_path / "a.nii.gz", Scan(voxels, (2.0, 0.9, 0.7), "MR", affine))
    again = read_nifti(tmp_path / "a.nii.gz", "MR")
    np.testing.assert_array_equal(again.voxels, voxels)
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)
    image = Scan(voxels[:, 0], (0.9, 0.7), "XR")
    write_nifti(tmp_path / "b.nii", image)
    again = read_nifti(tmp_path / "b.nii", "XR")
    np.testing.assert_array_equal(again.voxels, image.voxels)
    np.testing.assert_allclose(again.spacing_mm, image.spacing_mm, rtol=1e-6)


def test_the_first_volume_of_a_4d_file_is_read_and_scaled(tmp_path):
    voxels = np.arange(5 * 7 * 4 * 3, dtype=np.int16).reshape(5, 7, 4, 3)
    image = nibabel.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1]))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii.gz")
    stored = np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj)[..., 0]
    scan = read_nifti(tmp_path / "a.nii.gz", "MR")
    np.testing.assert_allclose(scan.voxels[0], stored.transpose(2, 1, 0), atol=1e-4)
    assert check_header(tmp_path / "a.nii.gz")[2] == ("first_of_several_times",)


def test_disagreement_of_qform_and_sform_is_noticed(tmp_path):
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([1.0, 1, 1.5, 1]), 1)
    nibabel.save(image, tmp_path / "a.nii")
    assert "qform_and_sform_disagree" in check_header(tmp_path / "a.nii")[2]


def test_metres_are_millimetres(tmp_path):
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.diag([0.001, 0.001, 0.002, 1]))
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(check_header(tmp_path / "a.nii")[1], [1, 1, 2], rtol=1e-5)


def test_units_that_the_standard_does_not_know_say_nothing(tmp_path):
    save(tmp_path / "a.nii", np.zeros(SHAPE, np.int16), np.diag([1.0, 1, 2, 1]), xyzt_units=7)
    np.testing.assert_allclose(check_header(tmp_path / "a.nii")[1], [1, 1, 2])
    _, affine = canonical_of(tmp_path / "a.nii")
    write_mask(tmp_path / "mask.nii", np.zeros((4, 7, 5), np.uint8), affine, like=tmp_path / "a.nii")
    assert int(nibabel.load(tmp_path / "mask.nii").header["xyzt_units"]) == 7


def canonical_of(path):
    scan = read_nifti(path, "MR")
    return scan.voxels, scan.affine


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([1.0, 1, 99, 1]), "bad_spacing"),
        (np.diag([1e-5, 1, 1, 1]), "bad_spacing"),
        (np.array([[1.0, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "bad_geometry"),
    ],
)
def test_absurd_geometry_is_refused(tmp_path, affine, reason):
    save(tmp_path / "a.nii", np.zeros(SHAPE, np.int16), affine)
    with pytest.raises(ScanError, match=f"^{reason}"):
        check_header(tmp_path / "a.nii")


def test_a_header_that_claims_more_than_the_file_is_refused_before_reading(tmp_path):
    save(tmp_path / "a.nii", np.zeros(SHAPE, np.int16), np.eye(4))
    claims = bytearray((tmp_path / "a.nii").read_bytes())
    claims[42:48] = np.array([30_000] * 3, dtype="<i2").tobytes()
    (tmp_path / "b.nii").write_bytes(claims)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(bytes(claims)))
    for name in ("b.nii", "c.nii.gz"):
        with pytest.raises(ScanError, match="truncated_pixels"):
            check_header(tmp_path / name)


def test_gzip_of_something_else_and_cut_files_are_left_out(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"no scan" * 99))
    with pytest.raises(ScanError, match="not_an_image"):
        check_header(tmp_path / "a.nii.gz")
    save(tmp_path / "b.nii.gz", np.random.default_rng(0).integers(0, 999, (30, 31, 32), dtype=np.int16), np.eye(4))
    (tmp_path / "c.nii.gz").write_bytes((tmp_path / "b.nii.gz").read_bytes()[:-9000])
    with pytest.raises(ScanError, match="truncated_pixels"):
        read_nifti(tmp_path / "c.nii.gz", "MR")


@pytest.mark.parametrize("damage", ["voxel", "trailer"])
def test_gzip_whose_checksum_fails_is_left_out(tmp_path, damage):
    packed = bytearray(gzip.compress(nifti_bytes(tmp_path), 0))  # stored, so that what is changed still unpacks
    if damage == "voxel":
        packed[-500] ^= 0x40
    (tmp_path / "b.nii.gz").write_bytes(packed[:-8] if damage == "trailer" else packed)
    with pytest.raises(ScanError, match="truncated_pixels"):
        read_nifti(tmp_path / "b.nii.gz", "MR")


def nifti_bytes(folder):
    save(folder / "a.nii", np.random.default_rng(0).integers(0, 999, (30, 31, 32), dtype=np.int16), np.eye(4))
    return (folder / "a.nii").read_bytes()


def test_extensions_without_end_are_not_read(tmp_path):
    save(tmp_path / "a.nii", np.ones(SHAPE, np.int16), np.eye(4))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[348] = 1  # extensions follow ...
    content[352:360] = bytes(8)  # ... the first 0 bytes long: nibabel would read all there is
    content[108:112] = np.float32(368).tobytes()
    with gzip.open(tmp_path / "b.nii.gz", "wb") as file:
        file.write(content[:352] + bytes(16) + content[352:] + bytes(64 * 2**20))
    tracemalloc.start()
    try:
        assert read_nifti(tmp_path / "b.nii.gz", "CT").voxels.size == np.prod(SHAPE)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_voxels_that_begin_behind_the_file_are_refused(tmp_path):
    save(tmp_path / "a.nii", np.ones(SHAPE, np.int16), np.eye(4))
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[108:112] = np.float32(2**30).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ScanError, match="truncated_pixels"):
        check_header(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ESTALE, "stale"), "cannot_open"), (OSError("CRC check failed"), "truncated_pixels")],
)
def test_a_disk_that_fails_is_no_fault_of_the_scan(tmp_path, monkeypatch, error, reason):
    """The system's errors have a number; such a scan is tried again."""
    save(tmp_path / "a.nii.gz", np.ones(SHAPE, np.int16), np.eye(4))

    def fail(*_):
        raise error

    monkeypatch.setattr(nibabel.arrayproxy.ArrayProxy, "__getitem__", fail)
    with pytest.raises(ScanError) as found:
        read_nifti(tmp_path / "a.nii.gz", "CT")
    assert found.value.reason == reason
