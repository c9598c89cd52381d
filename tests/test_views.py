"""Views: what is cut, how it is resized and shaded, and that the same generator gives the same views."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage, stats

from unimiss_core.study import ViewConfig
from unimiss_core.views import (
    Strengths,
    blur_matrix,
    draw,
    draw_batch,
    draw_strengths,
    generator_for,
    normal,
    resize,
    shade_,
    shrink_matrix,
    split,
    standardise,
    whole,
)

IMAGE, VOLUME = (1, 41, 53), (1, 9, 33, 47)
PLAIN = {"blur": 0.0, "noise": 0.0, "brightness": 0.0, "contrast": 0.0, "gamma": 0.0}
"""No augmentation of intensities."""
ENTIRE = {"area": (1.0, 1.0), "aspect": (1.0, 1.0), "flip": (0.0, 0.0, 0.0), "volume_region": None}
"""The one crop that covers the scan."""


class Held:
    """A scan in memory that remembers which boxes were read."""

    def __init__(self, voxels: NDArray[np.float32]) -> None:
        self.voxels = voxels
        self.boxes: list[tuple[slice, ...]] = []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.voxels.shape

    def crop(self, box: tuple[slice, ...]) -> NDArray[np.float32]:
        self.boxes.append(box)
        return self.voxels[(slice(None), *box)].copy()


def scan(shape: tuple[int, ...], seed: int = 0) -> Held:
    return Held(np.random.default_rng(seed).random(shape, dtype=np.float32))


def config(**changes: object) -> ViewConfig:
    """Views smaller than any network takes, and more of them: neither matters to how they are drawn."""
    unchecked = {"image_size": (20, 28), "volume_size": (5, 20, 28), "views": 2}
    unchecked |= {name: changes.pop(name) for name in tuple(unchecked) if name in changes}
    return ViewConfig.model_validate(changes).model_copy(update=unchecked)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augment(values: torch.Tensor, seed: int = 0, **changes: object) -> torch.Tensor:
    """(B, C, *S) in [0, 1] -> (B, V, C, *S): views that are the scans themselves but for the augmentation named."""
    size = {"volume_size" if values.ndim == 5 else "image_size": tuple(values.shape[2:])}
    drawn = draw_batch(
        [Held(each.numpy()) for each in values], config(**{**ENTIRE, **PLAIN, **size, **changes}), generator(seed)
    )
    return drawn * 0.25 + 0.5


# ---------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("shape", [IMAGE, VOLUME, (1, 500, 3), (1, 1, 9, 7), (2, 40, 20), (1, 3, 70, 11)])
def test_views_have_the_size_of_the_study_whatever_the_scan_s(shape: tuple[int, ...]) -> None:
    rank = len(shape) - 1
    drawn = draw_batch([scan(shape), scan(shape, 1)], config(views=3), generator())
    assert drawn.shape == (2, 3, shape[0], *config().size_of(2 if rank == 2 else 3))
    assert drawn.dtype == torch.float32
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize("shape", [(1, 20, 28), (1, 5, 20, 28)])
def test_a_crop_of_the_whole_scan_at_the_view_s_size_is_the_scan(shape: tuple[int, ...]) -> None:
    held = scan(shape)
    drawn = torch.stack([*draw(held, config(**ENTIRE), generator())])
    assert torch.equal(drawn, torch.from_numpy(held.voxels).expand(2, *shape))


def test_a_mirrored_view_is_the_mirror_image_along_the_axes_named() -> None:
    held = scan((1, 5, 20, 28))
    drawn = [*draw(held, config(**{**ENTIRE, "flip": (1.0, 0.0, 1.0)}), generator())]
    assert np.array_equal(drawn[0].numpy(), held.voxels[:, ::-1, :, ::-1])
    flat = scan((1, 20, 28))
    drawn = [*draw(flat, config(**{**ENTIRE, "flip": (1.0, 1.0, 0.0)}), generator())]  # an image has no first axis
    assert np.array_equal(drawn[0].numpy(), flat.voxels[:, ::-1])


def test_an_image_s_crop_covers_its_share_of_the_area_and_its_aspect() -> None:
    held = scan((1, 400, 500))
    wide = config(area=(0.2, 0.5), aspect=(0.8, 1.25), image_size=(30, 20), views=400)
    list(draw(held, wide, generator()))
    sides = np.array([[side.stop - side.start for side in box] for box in held.boxes], dtype=float)
    area = sides.prod(axis=1) / (400 * 500)
    aspect = sides[:, 0] / sides[:, 1] / (30 / 20)
    assert 0.19 < area.min() < 0.22
    assert 0.47 < area.max() < 0.51
    assert abs(area.mean() - 0.35) < 0.02  # uniform
    assert 0.78 < aspect.min() < 0.83
    assert 1.2 < aspect.max() < 1.27
    assert abs(np.log(aspect).mean()) < 0.02  # taller as often as wider
    starts = np.array([[side.start for side in box] for box in held.boxes])
    assert (starts >= 0).all()
    assert (starts + sides <= [400, 500]).all()


def test_all_views_of_a_volume_lie_in_one_region_and_regions_differ() -> None:
    held = scan((1, 60, 90, 120))
    limits = []
    for seed in range(6):
        held.boxes.clear()
        list(draw(held, config(volume_region=1.5, views=8), generator(seed)))
        low = [min(box[axis].start for box in held.boxes) for axis in range(3)]
        high = [max(box[axis].stop for box in held.boxes) for axis in range(3)]
        assert all(
            top - bottom <= round(1.5 * n) for bottom, top, n in zip(low, high, config().volume_size, strict=True)
        )
        limits.append(tuple(low))
    assert len(set(limits)) > 3


def test_a_volume_s_crop_is_zoomed_alike_in_plane_and_depth() -> None:
    held = scan((1, 50, 100, 100))
    plain = config(volume_region=None, area=(0.25, 0.25), aspect=(1.0, 1.0), volume_size=(5, 20, 20))
    list(draw(held, plain, generator()))
    assert {tuple(side.stop - side.start for side in box) for box in held.boxes} == {(25, 50, 50)}


def test_only_the_crops_are_read() -> None:
    held = scan((1, 64, 64))
    list(draw(held, config(area=(0.1, 0.1), views=4), generator()))
    assert len(held.boxes) == 4
    assert all((box[0].stop - box[0].start) * (box[1].stop - box[1].start) < 0.11 * 64 * 64 for box in held.boxes)


def triangle_resize(signal: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """The naive form of `resize` along one axis."""
    step = len(signal) / length
    reach = max(step, 1.0)
    result = np.zeros(length)
    for i in range(length):
        centre = (i + 0.5) * step - 0.5
        weights = np.array([max(0.0, 1 - abs(j - centre) / reach) for j in range(len(signal))])
        result[i] = (weights / weights.sum()) @ signal
    return result


@pytest.mark.parametrize(
    ("old", "new"),
    [((7, 31, 43), (5, 20, 28)), ((3, 11, 9), (5, 20, 28)), ((5, 40, 28), (5, 20, 28)), ((150, 201), (70, 99))],
)
def test_resizing_follows_the_naive_triangle_filter_along_each_axis(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    voxels = np.random.default_rng(1).random(old)
    expected = voxels
    for axis, length in enumerate(new):
        expected = np.apply_along_axis(triangle_resize, axis, expected, length)
    got = resize(torch.from_numpy(voxels)[None].float(), new)
    np.testing.assert_allclose(got[0].numpy(), expected, atol=1e-5)


def test_resizing_is_torch_s_own_antialiased_filter() -> None:
    picture = torch.rand(2, 131, 187, generator=generator())
    for size in ((40, 77), (131, 187), (200, 64)):
        expected = F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(resize(picture, size), expected, atol=2e-5, rtol=0)  # its places are float32


@pytest.mark.parametrize("size", [(37, 70), (4, 37, 70), (1, 5, 9)])
def test_resizing_mirrors_and_blurs_as_if_one_came_after_the_other(size: tuple[int, ...]) -> None:
    x = torch.rand(1, *(length + 6 for length in size), generator=generator())
    mirrored = [True, False, True][-len(size) :]
    got = resize(x, size, mirrored=mirrored, blur_sigma=1.3)[0]
    plain = resize(x, size)[0].flip([axis for axis, mirror in enumerate(mirrored) if mirror])
    expected = ndimage.gaussian_filter(plain.double().numpy(), 1.3, mode="reflect", truncate=10)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)  # the blur ends after 5 sigma: 6e-7 is cut


def test_the_rows_of_either_matrix_sum_to_one() -> None:
    for length, size in ((3, 40), (41, 40), (500, 33), (1, 5)):
        np.testing.assert_allclose(shrink_matrix(length, size).sum(axis=1), 1, atol=1e-6)
    for sigma, length in ((0.1, 5), (2.0, 50), (9.0, 3)):
        np.testing.assert_allclose(blur_matrix(sigma, length).sum(axis=1), 1, atol=1e-6)


def test_resizing_a_volume_that_is_constant_in_depth_resizes_its_slice() -> None:
    plane = torch.rand(2, 31, 43, generator=generator())
    volume = plane[:, None].expand(-1, 7, -1, -1)
    torch.testing.assert_close(resize(volume, (4, 20, 28)), resize(plane, (20, 28))[:, None].expand(-1, 4, -1, -1))


def test_the_whole_view_is_all_of_the_scan_and_nothing_random() -> None:
    held = scan(IMAGE)
    expected = F.interpolate(torch.from_numpy(held.voxels)[None], size=(20, 28), mode="bilinear", antialias=True)
    torch.testing.assert_close(whole(held.voxels, (20, 28)), standardise(expected)[0], atol=1e-5, rtol=0)
    assert whole(scan(VOLUME).voxels, (5, 20, 28)).shape == (1, 5, 20, 28)


# ------------------------------------------------------------------------------------------------------- intensities


@pytest.mark.parametrize("size", [(21, 30), (3, 21, 30), (1, 4, 9)])
def test_blur_is_scipy_s_gaussian_filter(size: tuple[int, ...]) -> None:
    values = torch.rand(1, 1, *size, generator=generator())
    blurred = augment(values, blur=1.0, blur_sigma=(1.3, 1.3))
    expected = ndimage.gaussian_filter(values[0, 0].double().numpy(), 1.3, mode="reflect", truncate=10)
    for got in blurred[0, :, 0]:
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_each_view_is_blurred_by_its_own_width() -> None:
    point = torch.zeros(1, 1, 31, 31)
    point[..., 15, 15] = 1.0
    blurred = augment(point, views=6, blur=1.0, blur_sigma=(0.8, 2.0))
    place = torch.arange(31.0) - 15
    widths = ((blurred[0, :, 0].sum(-1) * place**2).sum(-1) / blurred[0, :, 0].sum((-1, -2))).sqrt()
    assert len(set(widths.round(decimals=4).tolist())) == 6
    assert (0.79 < widths).all()
    assert (widths < 2.01).all()


def test_a_blur_of_next_to_nothing_changes_nothing() -> None:
    np.testing.assert_allclose(blur_matrix(1e-3, 7), np.eye(7), atol=1e-7)


def test_noise_has_its_standard_deviation_and_no_mean() -> None:
    noise = augment(torch.full((1, 1, 120, 130), 0.5), noise=1.0, noise_sigma=(0.05, 0.05)) - 0.5
    assert abs(noise.std() - 0.05) < 0.001
    assert abs(noise.mean()) < 0.001
    assert not torch.equal(noise[0, 0], noise[0, 1])


def test_noise_follows_the_normal_distribution_value_by_value() -> None:
    drawn = normal((3, 100_001), generator()).double().numpy()
    assert drawn.shape == (3, 100_001)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    assert abs(drawn.std() - 1) < 0.005
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.02
    neighbours = np.corrcoef(drawn[:, 1:].ravel(), drawn[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.01
    assert torch.equal(normal((2, 5), generator(3)), normal((2, 5), generator(3)))
    assert not torch.equal(normal((2, 5), generator(3)), normal((2, 5), generator(4)))


def test_brightness_multiplies_contrast_stretches_about_the_mean_and_gamma_is_a_power() -> None:
    values = 0.3 + 0.2 * torch.rand(2, 1, 9, 11, generator=generator())
    views = values[:, None].expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(augment(values, brightness=1.0, brightness_factor=(1.2, 1.2)), 1.2 * views)
    stretched = augment(values, contrast=1.0, contrast_factor=(1.5, 1.5))
    mean = views.mean((2, 3, 4), keepdim=True)
    torch.testing.assert_close(stretched, mean + 1.5 * (views - mean))
    torch.testing.assert_close(augment(values, gamma=1.0, gamma_exponent=(0.7, 0.7)), views**0.7)


def test_gamma_keeps_black_and_white() -> None:
    ends = torch.tensor([0.0, 1.0, 1e-30]).repeat(1, 1, 3, 1)
    powered = augment(ends, gamma=1.0, gamma_exponent=(1.4, 1.4))
    torch.testing.assert_close(powered[0, 0], ends[0] ** 1.4)


def test_brightness_and_contrast_together_are_one_after_the_other() -> None:
    values = 0.3 + 0.2 * torch.rand(1, 1, 9, 11, generator=generator())
    both = augment(values, brightness=1.0, brightness_factor=(1.2, 1.2), contrast=1.0, contrast_factor=(0.7, 0.7))
    bright = 1.2 * values
    torch.testing.assert_close(both[:, 0], bright.mean() + 0.7 * (bright - bright.mean()))


def test_intensities_stay_between_zero_and_one() -> None:
    values = torch.rand(2, 1, 9, 11, generator=generator())
    shaded = augment(
        values, noise=1.0, noise_sigma=(0.5, 0.5), brightness=1.0, contrast=1.0, contrast_factor=(3.0, 3.0)
    )
    assert shaded.min() == 0
    assert shaded.max() == 1


def test_each_augmentation_happens_as_often_as_its_chance_says_and_as_strongly() -> None:
    often = config(views=4000, gamma=0.3, gamma_exponent=(0.5, 0.9), noise=0.0, blur=1.0, blur_sigma=(1.0, 2.0))
    strengths = draw_strengths(often, generator())
    gammas = np.array([each.gamma for each in strengths])
    assert abs((gammas != 1).mean() - 0.3) < 0.03
    assert gammas[gammas != 1].min() >= 0.5
    assert abs(gammas[gammas != 1].mean() - 0.7) < 0.02
    assert all(each.noise_sigma == 0 and 1 <= each.blur_sigma <= 2 for each in strengths)


def test_without_augmentation_views_stay_as_they_are_and_a_scan_is_never_changed() -> None:
    values = torch.rand(2, 1, 9, 11, generator=generator())
    before = values.clone()
    torch.testing.assert_close(augment(values), values[:, None].expand(-1, 2, -1, -1, -1), atol=1e-7, rtol=0)
    augment(values, blur=1.0, noise=1.0, gamma=1.0)
    assert torch.equal(values, before)


def test_a_volume_of_one_slice_is_shaded_as_that_image() -> None:
    image = torch.rand(1, 9, 11, generator=generator())
    volume = image[:, None].clone()
    strengths = Strengths(noise_sigma=0.1, brightness=1.2, contrast=0.8, gamma=0.7)
    shade_(image, strengths, generator(4))
    shade_(volume, strengths, generator(4))
    torch.testing.assert_close(volume[:, 0], image)


def test_standardised_values_span_two_standard_deviations() -> None:
    assert standardise(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-2.0, 0.0, 2.0]


# ---------------------------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_the_same_generator_gives_the_same_views(shape: tuple[int, ...]) -> None:
    scans = [scan(shape, seed) for seed in range(3)]
    always = config(blur=1.0, noise=1.0)
    first = draw_batch(scans, always, generator_for(1, "a", 2, 3))
    assert torch.equal(first, draw_batch(scans, always, generator_for(1, "a", 2, 3)))
    assert not torch.equal(first, draw_batch(scans, always, generator_for(1, "a", 2, 4)))
    assert not torch.equal(first[:, 0], first[:, 1])


def test_a_scan_s_views_do_not_depend_on_the_rest_of_its_batch() -> None:
    always = config(blur=1.0, noise=0.5)
    a, b, c, large = scan(IMAGE, 1), scan(IMAGE, 2), scan(IMAGE, 3), scan((1, 90, 80), 4)
    pair = draw_batch([a, b], always, generator(7))
    other = draw_batch([large, b, c], always, generator(7))
    torch.testing.assert_close(pair[1], other[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(draw_batch([a], always, generator(7))[0], pair[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_a_part_of_a_batch_has_the_views_of_the_whole_and_reads_no_other_scan(shape: tuple[int, ...]) -> None:
    scans = [scan(shape, seed) for seed in range(5)]
    always = config(blur=1.0, noise=1.0)
    together = draw_batch(scans, always, generator(7))
    for part in (slice(0, 2), slice(2, 5), slice(1, None, 2), slice(3, 3)):
        for each in scans:
            each.boxes.clear()
        assert torch.equal(draw_batch(scans, always, generator(7), part=part), together[part])
        assert [bool(each.boxes) for each in scans] == [i in range(5)[part] for i in range(5)]


def test_a_part_leaves_the_generator_where_the_whole_batch_does() -> None:
    scans = [scan(IMAGE, seed) for seed in range(3)]
    alone, together = generator(7), generator(7)
    draw_batch(scans, config(), alone, part=slice(1, 2))
    draw_batch(scans, config(), together)
    assert torch.equal(alone.get_state(), together.get_state())


def test_each_seed_site_and_place_has_a_generator_of_its_own() -> None:
    keys = [*itertools.product((0, 1), ("a", "b"), ((1, 2), (2, 1), (12,)))]
    firsts = {
        torch.rand(2, generator=generator_for(seed, site, *place)).numpy().tobytes() for seed, site, place in keys
    }
    assert len(firsts) == len(keys)
    seed = int.from_bytes(hashlib.sha256(b'[5, "a", 7]').digest()[:8], "little")
    assert generator_for(5, "a", 7).initial_seed() == seed  # fixed for ever: studies are replayed by it


def test_splitting_gives_a_new_generator_each_time() -> None:
    source = generator()
    assert split(source).initial_seed() != split(source).initial_seed()
    assert split(generator(3)).initial_seed() == split(generator(3)).initial_seed()


# ------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"area": (0.9, 0.1)}, "area: the lower bound 0.9 must not be above"),
        ({"area": (0.0, 1.0)}, "area: the lower bound 0.0 must be above 0"),
        ({"gamma_exponent": (-1.0, 1.0)}, "gamma_exponent: the lower bound -1.0 must be above 0"),
        ({"noise_sigma": (-0.1, 1.0)}, "noise_sigma: the lower bound -0.1 must be at least 0"),
    ],
)
def test_intervals_that_make_no_sense_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ViewConfig.model_validate(wrong)
