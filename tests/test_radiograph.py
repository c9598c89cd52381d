"""Radiographs against closed forms: chords through a box and a ball, and the projection that the phantoms use."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from client.phantoms import WATER_PER_MM, project
from unimiss_core.radiograph import Radiographer, attenuation, thickness_mm
from unimiss_core.views import intensities, min_max, resize, standardise

WINDOW = (-1024.0, 1024.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[Tensor]:
    """Distance from the middle of the volume along each axis, at every voxel."""
    axes = [(torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    return list(torch.meshgrid(*axes, indexing="ij"))


def test_attenuation_is_that_of_the_window_and_air_has_none() -> None:
    values = torch.tensor([0.0, 24 / 2048, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(attenuation(values, WINDOW), torch.tensor([0, 0, 1, 2.024], dtype=torch.float64))


def test_a_box_of_water_is_as_thick_as_its_chord() -> None:
    volume = torch.zeros(1, 3, 9, 7, dtype=torch.float64)
    volume[:, 1, 2:6, 3:5] = 1.0
    seen = thickness_mm(volume, spacing_mm=(2.5, 4.0))
    expected = torch.zeros(1, 3, 7, dtype=torch.float64)
    expected[:, 1, 3:5] = 4 * 2.5
    torch.testing.assert_close(seen, expected)
    sideways = thickness_mm(volume, spacing_mm=(2.5, 4.0), angle_deg=90.0)
    expected = torch.zeros(1, 3, 9, dtype=torch.float64)
    expected[:, 1, 3:7] = 2 * 4.0  # rows 2 to 5, counted from the back
    torch.testing.assert_close(sideways, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("angle_deg", [0.0, 30.0, 90.0, -135.0])
def test_a_ball_shows_the_chords_of_a_ball_from_every_side(angle_deg: float) -> None:
    """Voxels are not cubes: (3, 1, 1.6) mm. The chord at distance r of a ball of radius R is 2 sqrt(R^2 - r^2)."""
    spacing_mm, radius = (3.0, 1.0, 1.6), 30.0
    z, y, x = grid_mm((25, 71, 45), spacing_mm)
    inside = radius - (z.square() + y.square() + x.square()).sqrt()
    ball = (inside + 0.5).clamp(0, 1)[None]  # its surface is a voxel wide, as partial volumes are
    seen = thickness_mm(ball, spacing_mm=spacing_mm[1:], angle_deg=angle_deg)[0]
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    pitch = 1.0 * s**2 + 1.6 * c**2
    rows, columns = grid_mm(tuple(seen.shape), (3.0, pitch))
    expected = 2 * (radius**2 - rows.square() - columns.square()).clamp(min=0).sqrt()
    assert (seen - expected).abs().mean() < 0.02 * radius
    # A shadow is as heavy as the body from every side.
    assert seen.sum().item() * 3.0 * pitch == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.01)


def test_the_logarithm_of_what_passes_two_bodies_is_the_sum_of_each() -> None:
    one, other = random(2, 5, 6, 7), random(2, 5, 6, 7, seed=1)
    for angle_deg in (0.0, 37.0):
        both = thickness_mm(one + other, spacing_mm=(1.0, 2.0), angle_deg=angle_deg)
        parts = [thickness_mm(body, spacing_mm=(1.0, 2.0), angle_deg=angle_deg) for body in (one, other)]
        torch.testing.assert_close(both, parts[0] + parts[1])


def test_turned_by_quarters_the_axes_swap() -> None:
    volume, spacing = random(2, 5, 9, 6), (1.5, 2.5)
    lying = volume.transpose(2, 3)
    expected = {
        0.0: thickness_mm(volume, spacing_mm=spacing),
        90.0: thickness_mm(lying, spacing_mm=spacing[::-1]).flip(2),
        180.0: thickness_mm(volume, spacing_mm=spacing).flip(2),
        -90.0: thickness_mm(lying, spacing_mm=spacing[::-1]),
    }
    for angle_deg, seen in expected.items():
        turned = thickness_mm(volume, spacing_mm=spacing, angle_deg=angle_deg)
        torch.testing.assert_close(turned, seen, msg=str(angle_deg))
    # Nothing jumps as the angle leaves 0, where no interpolation is needed.
    nearly = thickness_mm(volume, spacing_mm=spacing, angle_deg=1e-9)
    torch.testing.assert_close(nearly, expected[0.0])


def test_what_passes_is_what_the_phantoms_detector_counts() -> None:
    hu = np.random.default_rng(0).uniform(*WINDOW, (5, 8, 7)).astype(np.float32)
    values = torch.from_numpy((hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0])).double()
    thickness = thickness_mm(attenuation(values[None], WINDOW), spacing_mm=(3.0, 1.0))
    np.testing.assert_allclose(torch.exp(-WATER_PER_MM * thickness[0]), project(hu, 3.0), rtol=1e-5)


def test_a_radiograph_is_a_standardised_picture_with_the_head_above() -> None:
    views = standardise(random(3, 1, 13, 37, 40).float())
    taken = Radiographer(size=(33, 50), ct_window_hu=WINDOW)(views)
    assert taken.shape == (3, 1, 33, 50)
    assert taken.dtype == torch.float32
    for view, picture in zip(views, taken, strict=True):
        shadow = attenuation(intensities(view), WINDOW).sum(2).flip(1)  # (1, D, W)
        expected = min_max(resize(shadow, (33, 50))[None])[0]
        torch.testing.assert_close(intensities(picture), expected, atol=1e-5, rtol=0)
    assert taken.amin((1, 2, 3)).tolist() == [-2.0] * 3
    assert taken.amax((1, 2, 3)).tolist() == [2.0] * 3


def test_each_volume_has_its_own_radiograph() -> None:
    volumes = standardise(random(4, 1, 13, 33, 35))
    take = Radiographer(size=(40, 33), ct_window_hu=WINDOW, spacing_mm=(1.0, 1.2), angle_deg=20.0)
    together = take(volumes)
    torch.testing.assert_close(together.flip(0), take(volumes.flip(0)))
    for volume, picture in zip(volumes, together, strict=True):
        torch.testing.assert_close(take(volume[None])[0], picture)


@pytest.mark.parametrize("value", [-2.0, 0.3])
def test_nothing_to_see_is_dark_not_stretched_rounding(value: float) -> None:
    take = Radiographer(size=(33, 41), ct_window_hu=WINDOW)
    pictures = take(torch.full((2, 1, 13, 96, 57), value))
    assert (pictures + 2).max() < 0.5


def test_min_max_spans_each_scan_over_its_channels() -> None:
    x = random(3, 2, 4, 5) * torch.tensor([1.0, 30.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1) - 7
    scaled = min_max(x)
    for before, after in zip(x, scaled, strict=True):
        torch.testing.assert_close(after, (before - before.min()) / (before.max() - before.min()))
    assert torch.equal(min_max(torch.full((1, 1, 2, 2), 3.0)), torch.zeros(1, 1, 2, 2))
