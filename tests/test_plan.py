import numpy as np
import pytest

from unimiss_core.errors import ScanError
from unimiss_core.plan import prepare, resample, target_grid
from unimiss_core.scan import Scan
from unimiss_core.study import PlanConfig


def scan(voxels, spacing, modality="MR", **facts) -> Scan:
    return Scan(np.asarray(voxels, dtype=np.float32)[None], spacing, modality, **facts)


def naive_resample(line: np.ndarray, length: int, step: float) -> np.ndarray:
    """Each new point by itself: a triangle of half-width max(1, step) old points around its place."""
    result = []
    for index in range(length):
        centre = (index - (length - 1) / 2) * step + (len(line) - 1) / 2
        reach = max(1.0, step)
        total = weight = 0.0
        for place in range(-50, len(line) + 50):
            share = max(0.0, 1 - abs(place - centre) / reach)
            total += share * line[min(max(place, 0), len(line) - 1)]
            weight += share
        result.append(total / weight)
    return np.array(result)


@pytest.mark.parametrize(("length", "step"), [(5, 2.2), (29, 0.37), (11, 1.0), (1, 11.0), (4, 3.1), (13, 1.0)])
def test_resampling_equals_a_triangle_around_each_new_point(length, step):
    line = np.random.default_rng(0).normal(size=11).astype(np.float32)
    stack = np.stack([line, 2 * line])[:, :, None]
    new = resample(stack, 1, length, step)
    np.testing.assert_allclose(new[0, :, 0], naive_resample(line, length, step), atol=1e-5)
    np.testing.assert_allclose(new[1], 2 * new[0], atol=1e-5)


def test_resampling_keeps_a_slope_and_the_centre():
    ramp = np.arange(20, dtype=np.float32)[None]
    new = resample(ramp, 1, 13, 1.5)
    np.testing.assert_allclose(new[0, 1:-1], (np.arange(13) - 6)[1:-1] * 1.5 + 9.5, atol=1e-4)


def test_ct_is_windowed_in_hounsfield_units():
    volume = np.full((3, 5, 4), -1000.0)
    volume[1] = 0
    volume[2] = 3000
    values, spacing = prepare(scan(volume, (3.0, 1.0, 1.0), "CT"), PlanConfig())
    assert spacing == (3.0, 1.0, 1.0)
    np.testing.assert_allclose(values[0, :, 0, 0], [24 / 2048, 0.5, 1.0], atol=1e-6)


def test_other_modalities_are_clipped_to_percentiles_of_the_scan():
    picture = np.arange(1000, dtype=np.float32).reshape(25, 40)
    values, _ = prepare(scan(picture, (1.0, 1.0), "XR"), PlanConfig(percentiles=(1.0, 99.0)))
    low, high = np.percentile(picture, [1, 99])
    np.testing.assert_allclose(values[0], np.clip((picture - low) / (high - low), 0, 1), atol=1e-6)


def test_scale_and_offset_of_the_scanner_do_not_matter_outside_ct():
    picture = np.random.default_rng(1).normal(size=(21, 33))
    one, _ = prepare(scan(picture, (1.0, 1.0)), PlanConfig())
    other, _ = prepare(scan(picture * 1e4 + 77, (1.0, 1.0)), PlanConfig())
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_volumes_come_to_the_studys_spacing():
    volume = np.random.default_rng(2).normal(size=(10, 21, 15))
    values, spacing = prepare(scan(volume, (4.0, 0.5, 0.8)), PlanConfig(volume_spacing_mm=(3.0, 1.0, 1.0)))
    assert values.shape == (1, 13, 10, 12)
    assert spacing == (3.0, 1.0, 1.0)
    assert values.dtype == np.float32
    assert values.min() >= 0
    assert values.max() <= 1


def test_images_shrink_to_the_longest_side_and_never_grow():
    assert target_grid((700, 1400), (0.2, 0.2), PlanConfig())[0] == (256, 512)
    assert target_grid((70, 140), (0.2, 0.2), PlanConfig())[0] == (70, 140)
    assert target_grid((700, 1400), (0.2, 0.2), PlanConfig(image_longest_side=None))[0] == (700, 1400)


def test_images_come_to_a_spacing_only_where_theirs_is_known():
    plan = PlanConfig(image_spacing_mm=(0.4, 0.4))
    assert target_grid((100, 200), (0.2, 0.2), plan) == ((50, 100), (0.4, 0.4))
    assert target_grid((100, 200), (1.0, 1.0), plan, spacing_known=False) == ((100, 200), (1.0, 1.0))


def test_a_scan_with_nothing_to_see_is_left_out():
    for voxels, modality in [(np.full((9, 7), 3.0), "XR"), (np.full((3, 4, 5), 2000.0), "CT")]:
        with pytest.raises(ScanError, match="blank"):
            prepare(scan(voxels, (1.0,) * voxels.ndim, modality), PlanConfig())


def test_a_mostly_empty_scan_falls_back_to_its_extremes():
    picture = np.zeros((50, 50))
    picture[3, 4] = 9
    values, _ = prepare(scan(picture, (1.0, 1.0)), PlanConfig())
    assert values.max() == 1
    assert (values == 1).sum() == 1


def test_nan_counts_as_outside_unless_it_prevails():
    picture = np.linspace(0, 1, 99).reshape(9, 11)
    picture[0] = np.nan
    values, _ = prepare(scan(picture, (1.0, 1.0)), PlanConfig())
    assert np.isfinite(values).all()
    assert values[0, 0].max() == 0
    with pytest.raises(ScanError, match="not_finite"):
        prepare(scan(np.full((3, 5), np.inf), (1.0, 1.0)), PlanConfig())
