from dataclasses import replace

import numpy as np
import pytest

import client.series
from client.frames import Frame, close_to
from client.patients import Patient
from client.series import Header, sort_out
from client.volumes import assemble, canonical, straighten

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ROWS, COLUMNS = 5, 7


def header(index: int, position, **facts) -> Header:
    frame = Frame(
        file=f"{index:03d}",
        number=0,
        position=None if position is None else tuple(float(value) for value in position),
        orientation=facts.pop("orientation", AXIAL),
        spacing_mm=facts.pop("spacing_mm", (0.9, 0.7)),
        contrast=facts.pop("contrast", ()),
        time=facts.pop("time", (float(index),)),
        acquisition=facts.pop("acquisition", 0.0),
    )
    known = Header(
        file=f"{index:03d}",
        patient=Patient("p", 0.5),
        study="s",
        series="1",
        instance=str(index),
        modality="CT",
        matrix=(ROWS, COLUMNS),
        frame_of_reference="f",
        frames=(frame,),
    )
    return replace(known, **facts)


def heights(values, **facts) -> list[Header]:
    return [header(index, (0, 0, value), **facts) for index, value in enumerate(values)]


def outcome(headers, *, interpolate=False) -> list[tuple[str, int]]:
    """(reason or 'used', frames) of each group, sorted."""
    groups = sort_out(headers, interpolate=interpolate)
    return sorted((group.reason or "used", len(group.frames) or len(group.headers)) for group in groups)


def test_slices_are_sorted_by_place_and_not_by_name():
    (group,) = sort_out(heights([9, 0, 6, 3]), interpolate=False)
    assert [frame.file for frame in group.stack.frames] == ["001", "003", "002", "000"]
    assert group.stack.spacing_mm == pytest.approx((3.0, 0.9, 0.7))
    assert group.stack.shape == (4, ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 3, 6.05, 9], [("used", 4)]),
        ([0, 3, 3, 6, 9], [("duplicate", 1), ("used", 4)]),
        ([0, 3, 0, 6, 3, 6], [("later_time_point", 3), ("used", 3)]),
        ([0, 3, 6, 12, 15, 18], [("missing_slices", 6)]),
        ([0, 3, 6, 9, 10, 15, 20, 25], [("used", 4), ("used", 4)]),
        ([0, 3, 6, 9, 10.1, 12.9], [("uneven_spacing", 2), ("used", 4)]),
        ([0, 2, 7, 7.3, 13], [("uneven_spacing", 5)]),
        ([0, 3], [("too_few_slices", 2)]),
        ([4], [("used", 1)]),
        ([0, 40, 80, 120], [("bad_spacing", 4)]),
    ],
)
def test_each_arrangement_of_slices_has_its_rule(values, expected):
    assert outcome(heights(values)) == expected


def test_a_few_missing_slices_are_made_up_where_the_study_allows():
    values = [3.0 * index for index in range(20) if index != 7]
    (group,) = sort_out(heights(values), interpolate=True)
    assert group.stack.shape[0] == 20
    assert "missing_slices_interpolated" in group.stack.flags
    pixels = np.array(values, dtype=np.float32)[:, None, None] * np.ones((1, ROWS, COLUMNS), np.float32)
    scan = assemble(group.stack, pixels, "CT")
    np.testing.assert_allclose(scan.voxels[0, :, 2, 3], 3.0 * np.arange(20), atol=1e-5)
    assert outcome(heights([0, 3, 6, 12, 15]), interpolate=True) == [("missing_slices", 5)]  # a sixth is too much


def test_at_one_place_the_earliest_comes_first():
    early = [header(index + 10, (0, 0, 3 * index), time=(1.0,)) for index in range(3)]
    late = [header(index, (0, 0, 3 * index), time=(2.0,)) for index in range(3)]
    used = next(group for group in sort_out(late + early, interpolate=False) if group.stack)
    assert [frame.file for frame in used.stack.frames] == ["010", "011", "012"]


def test_echoes_orientations_matrices_and_frames_of_reference_are_volumes_of_their_own():
    first = heights([0, 3, 6])
    for index, change in enumerate(
        [
            {"contrast": ("80",)},
            {"orientation": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)},
            {"spacing_mm": (0.5, 0.5)},
            {"matrix": (9, 9)},
            {"frame_of_reference": "g"},
        ]
    ):
        offset = 100 * (index + 1)
        along = np.array((-3, 0, 0) if "orientation" in change else (0, 0, 3))
        more = [header(offset + step, along * step, **change) for step in range(3)]
        assert outcome(first + more) == [("used", 3), ("used", 3)], change


@pytest.mark.parametrize(("turns", "expected"), [(300, [("used", 3)] * 300), (1100, [("bad_geometry", 3300)])])
def test_an_object_of_more_orientations_than_there_can_be_is_not_told_apart(turns, expected):
    """Which would take as long as the square of their number, in a process without a limit of time."""
    headers = []
    for turn in range(turns):
        row = np.array([np.cos(turn / 200), np.sin(turn / 200), 0.0])
        normal = np.cross(row, (0.0, 0.0, -1.0))
        turned = (*row, 0.0, 0.0, -1.0)
        headers += [header(3 * turn + step, 3 * step * normal, orientation=turned) for step in range(3)]
    assert outcome(headers) == expected


def test_many_different_gaps_are_not_compared_each_with_each(monkeypatch):
    compared = []

    def counted(gaps, gap):
        compared.append(np.size(gaps))
        return close_to(gaps, gap)

    monkeypatch.setattr(client.series, "close_to", counted)
    count = 2000
    gaps = np.where(np.arange(count) < count // 2, 1.0, np.random.default_rng(0).uniform(0.05, 9, count))
    outcome(heights(np.cumsum(gaps)))
    assert sum(compared) < 40 * count


@pytest.mark.parametrize("digits", [1, 2, 9])
def test_the_commonest_gap_sets_the_unit(digits):
    """Oracle: every gap compared with every other. Rounded gaps lie on the edge of the tolerance."""
    rng = np.random.default_rng(digits)
    for _ in range(50):
        gaps = np.round(rng.uniform(0.5, 2, rng.integers(2, 40)), digits)
        votes = [close_to(gaps, gap).sum() for gap in sorted(gaps)]
        assert client.series._commonest(gaps) == sorted(gaps)[int(np.argmax(votes))]


def made(headers) -> list[list[str]]:
    """The files of each volume, from bottom to top."""
    groups = sort_out(headers, interpolate=False)
    return sorted([frame.file for frame in group.stack.frames] for group in groups if group.stack)


def several(count, *, first=0, aside=0.0, start=0.0, tilt=0.0, **facts) -> list[Header]:
    """`count` slices 3 mm apart; aside, tilt: by how many mm along a row they lie, all alike and more from slice to
    slice."""
    places = [(aside + tilt * index, 0, start + 3 * index) for index in range(count)]
    return [header(first + index, place, **facts) for index, place in enumerate(places)]


def names(first, count) -> list[str]:
    return [f"{first + index:03d}" for index in range(count)]


@pytest.mark.parametrize("upper", [8, 10])
def test_stations_beside_each_other_are_volumes_of_their_own(upper):
    legs, pelvis = several(8), several(upper, first=20, aside=250.0)
    assert made(legs + pelvis) == [names(0, 8), names(20, upper)]
    again = several(upper, first=40, aside=250.0)  # the upper station at a later time
    assert made(legs + pelvis + again) == [names(0, 8), names(20, upper)]


def test_time_points_under_a_tilted_gantry_are_no_stations():
    early, late = several(12, tilt=0.2, time=(1.0,)), several(12, first=20, tilt=0.2, time=(2.0,))
    assert made(early + late) == [names(0, 12)]
    assert outcome(early + late) == [("later_time_point", 12), ("used", 12)]


def test_a_phase_of_a_part_is_a_volume_of_its_own():
    whole, part = several(20, acquisition=2.0), several(6, first=40, start=9.0, acquisition=1.0)
    assert made(whole + part) == [names(0, 20), names(40, 6)]
    assert outcome(several(20) + several(6, first=40, start=9.0)) == [("duplicate", 6), ("used", 20)]
    broken = part[:2] + part[3:]
    assert outcome(whole + broken) == [("duplicate", 5), ("used", 20)]  # what it alone would be is unclear


def test_parts_of_a_volume_that_were_acquired_one_after_the_other_stay_together():
    lower, upper = several(5, acquisition=1.0), several(5, first=20, start=15.0, acquisition=2.0)
    odd, even = (
        [header(index, (0, 0, 3 * index), acquisition=float(index % 2)) for index in range(parity, 10, 2)]
        for parity in (0, 1)
    )
    assert made(lower + upper) == [[*names(0, 5), *names(20, 5)]]
    assert made(odd + even) == [names(0, 10)]


def test_a_frame_of_reference_in_every_slice_says_nothing():
    headers = [replace(one, frame_of_reference=one.file) for one in heights([0, 3, 6, 9])]
    assert outcome(headers) == [("used", 4)]


def test_one_series_under_two_patients_is_nobodys():
    headers = heights([0, 3, 6, 9])
    headers[2] = replace(headers[2], patient=Patient("q", 0.1))
    assert outcome(headers) == [("two_patients_in_series", 4)]


def test_copies_of_an_instance_are_dropped():
    headers = heights([0, 3, 6])
    assert outcome([*headers, replace(headers[1], file="900")]) == [("duplicate", 1), ("used", 3)]


@pytest.mark.parametrize("copied", [[0, 1, 2, 3, 4], [1, 3], [0]])
def test_copies_under_another_frame_of_reference_are_dropped_and_those_of_the_fuller_archive_kept(copied):
    """Its copies come first by name, so that the first of each would be slices of both."""
    headers = heights([0, 3, 6, 9, 12])
    again = [replace(headers[place], file=f"!{place}", frame_of_reference="~of the archive") for place in copied]
    assert outcome([*headers, *again]) == [("duplicate", len(copied)), ("used", 5)]


def test_a_lone_slice_beside_a_volume_of_its_study_is_left_out():
    alone = replace(header(50, (0, 0, 99)), series="2")
    assert outcome([*heights([0, 3, 6]), alone]) == [("slice_beside_volume", 1), ("used", 3)]
    assert outcome([*heights([0, 3, 6]), replace(alone, study="t")]) == [("used", 1), ("used", 3)]


def test_a_volume_of_another_patient_says_nothing_about_a_lone_slice():
    """Some anonymisers give one study UID to many patients."""
    alone = replace(header(50, (0, 0, 99)), series="2", patient=Patient("q", 0.1))
    assert outcome([*heights([0, 3, 6]), alone]) == [("used", 1), ("used", 3)]


def test_a_slice_of_a_broken_series_is_no_image_of_its_own():
    headers = heights([0, 3, 6, 9, 12])
    headers[2] = header(2, (0, 0, 6), spacing_mm=(0.8, 0.7))
    assert outcome(headers) == [("lone_slice", 1), ("missing_slices", 4)]
    scouts = [header(0, (0, 0, 0)), header(1, (0, 0, 0), orientation=(0, 1, 0, 0, 0, -1))]
    assert outcome(scouts) == [("used", 1), ("used", 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"orientation": None}, "no_geometry"),
        ({"spacing_mm": None}, "no_geometry"),
        ({"spacing_mm": (0.0, 0.0)}, "bad_spacing"),
        ({"orientation": (1.0, 0, 0, 1.0, 0, 0)}, "bad_geometry"),
        ({"orientation": (0.0,) * 6}, "bad_geometry"),
    ],
)
def test_frames_without_possible_geometry_make_no_volume(change, reason):
    assert outcome(heights([0, 3, 6], **change)) == [(reason, 3)]
    assert outcome([header(0, None)]) == [("no_geometry", 1)]


def test_a_tilted_gantry_is_straightened_into_the_patients_place():
    angle = np.radians(18.0)
    orientation = (1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), -float(np.sin(angle)))
    depth, rows, columns = 6, 40, 9
    headers = [
        replace(
            header(index, (0, 0, 4.0 * index), orientation=orientation, spacing_mm=(1.0, 1.0)), matrix=(rows, columns)
        )
        for index in range(depth)
    ]
    (group,) = sort_out(headers, interpolate=False)
    assert "gantry_tilt_corrected" in group.stack.flags
    # The scanned thing is a ramp in the patient's y: wherever it was sampled, it must come out as its place says.
    grid = np.arange(rows)[None, :, None] * np.cos(angle) * np.ones((depth, 1, columns))
    scan = assemble(group.stack, grid.astype(np.float32) + 100, "CT")
    inside = scan.voxels[0] > 101
    d, h, w = np.nonzero(inside)
    _, y, _, _ = scan.affine @ np.stack([d, h, w, np.ones_like(d)])
    # Linear interpolation of a ramp is exact; only the row at the very edge repeats.
    error = np.abs(scan.voxels[0][inside] - 100 - (-y))
    assert np.median(error) < 1e-3
    assert (error < 1e-3).mean() > 0.9
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)


def test_offsets_that_do_not_grow_evenly_are_refused():
    headers = [header(index, (9.0 * (index % 2), 0, 3 * index)) for index in range(6)]
    assert outcome(headers) == [("uneven_offsets", 6)]
    steep = [header(index, (9.0 * index, 0, 3 * index)) for index in range(6)]
    assert outcome(steep) == [("tilt_too_steep", 6)]


def test_straightening_moves_whole_pixels_without_changing_them():
    pixels = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    canvas, origin = straighten(pixels, [(0.0, 0.0), (1.0, -2.0), (2.0, -4.0)])
    assert canvas.shape == (3, 6, 9)
    assert origin == (0.0, -4.0)
    for index in range(3):
        np.testing.assert_array_equal(canvas[index, index : index + 4, 4 - 2 * index : 9 - 2 * index], pixels[index])


@pytest.mark.parametrize("orientation", [AXIAL, (0.0, 1, 0, 0, 0, -1), (1.0, 0, 0, 0, 0, -1), (-1.0, 0, 0, 0, -1, 0)])
def test_every_voxel_keeps_its_place_in_the_patient(orientation):
    normal = np.cross(orientation[:3], orientation[3:])
    headers = [header(index, normal * 2.5 * index + [1, 2, 3], orientation=orientation) for index in range(4)]
    (group,) = sort_out(headers, interpolate=False)
    pixels = np.random.default_rng(1).random((4, ROWS, COLUMNS)).astype(np.float32)
    scan = assemble(group.stack, pixels, "MR")
    to_index = np.linalg.inv(scan.affine)
    for s, r, c in np.ndindex(pixels.shape):
        place = np.array([1.0, 2, 3]) + normal * 2.5 * s
        place = place + np.array(orientation[3:]) * 0.9 * r + np.array(orientation[:3]) * 0.7 * c
        d, h, w, _ = np.rint(to_index @ [-place[0], -place[1], place[2], 1]).astype(int)
        assert scan.voxels[0, d, h, w] == pixels[s, r, c]
    directions = scan.affine[:3, :3] / scan.spacing_mm
    np.testing.assert_allclose(directions, [[0, 0, -1], [0, -1, 0], [1, 0, 0]], atol=1e-9)


@pytest.mark.parametrize(
    ("rows_and_columns", "wanted"),
    [
        ((AXIAL, (0.0, -1, 0, 1, 0, 0), (-1.0, 0, 0, 0, -1, 0)), AXIAL),
        (((1.0, 0, 0, 0, 0, -1), (0.0, 0, 1, 1, 0, 0), (-1.0, 0, 0, 0, 0, -1)), (1.0, 0, 0, 0, 0, -1)),
        (((0.0, 1, 0, 0, 0, -1), (0.0, 0, 1, 0, -1, 0), (0.0, -1, 0, 0, 0, 1)), (0.0, 1, 0, 0, 0, -1)),
    ],
)
def test_a_lone_slice_is_an_image_as_it_is_shown_whatever_its_rows_and_columns_are(rows_and_columns, wanted):
    """To the right: left, of a sagittal slice posterior. Down: posterior, of others inferior."""
    for orientation in rows_and_columns:
        (group,) = sort_out([header(0, (1.0, 2, 3), orientation=orientation)], interpolate=False)
        pixels = np.random.default_rng(3).random((1, ROWS, COLUMNS)).astype(np.float32)
        scan = assemble(group.stack, pixels, "MR")
        to_index = np.linalg.inv(scan.affine)
        for r, c in np.ndindex(ROWS, COLUMNS):
            place = np.array([1.0, 2, 3]) + np.array(orientation[3:]) * 0.9 * r + np.array(orientation[:3]) * 0.7 * c
            d, h, w, _ = np.rint(to_index @ [-place[0], -place[1], place[2], 1]).astype(int)
            assert d == 0
            assert scan.voxels[0, h, w] == pixels[0, r, c]
        down, right = (scan.affine[:3, 1:3] / scan.spacing_mm).T * [-1, -1, 1]
        np.testing.assert_allclose([*right, *down], wanted, atol=1e-9)


def test_canonical_axes_stay_as_they_are():
    voxels = np.random.default_rng(2).random((1, 3, 4, 5)).astype(np.float32)
    affine = np.array([[0, 0, -1.0, 9], [0, -2, 0, 8], [3, 0, 0, 7], [0, 0, 0, 1]])
    same, still = canonical(voxels, affine)
    np.testing.assert_array_equal(same, voxels)
    np.testing.assert_array_equal(still, affine)


def test_slices_that_all_bear_one_uid_are_no_copies_of_each_other():
    slices = [header(index, (0, 0, 3 * index), instance="same") for index in range(5)]
    again = [replace(one, file=f"copy{index}", frames=(replace(one.frames[0], file=f"copy{index}"),))
             for index, one in enumerate(slices)]  # fmt: skip
    groups = sort_out([*slices, *again], interpolate=False)
    assert sorted((group.reason, len(group.frames) or len(group.headers)) for group in groups) == [
        ("", 5),
        ("duplicate", 5),
    ]
