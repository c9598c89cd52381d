from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.published import SIZES, Published, golden, image, needs_reference, network, published_model, volume
from unimiss_core.layers import PositionTable
from unimiss_core.model import ARCHITECTURES, MiT, token_grids
from unimiss_core.network import build_network, empty_network
from unimiss_core.scan import SMALLEST
from unimiss_core.study import ModelConfig

NANO = ModelConfig(prototypes=16)


def _in_float64(size: Published) -> MiT:
    return deepcopy(network(size, "").backbone).double()  # a copy, because every caller is given the same network


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_features_are_the_published_ones(size: Published) -> None:
    """In float64: the golden vectors' own float32 error fills most of the bound, and ours differs by processor."""
    backbone, expected = _in_float64(size), golden(size)
    with torch.no_grad():
        for x, features in ((image("x2d"), "features2d"), (volume("x3d"), "features3d")):
            torch.testing.assert_close(backbone(x.double()).float(), expected[features], atol=1e-5, rtol=0)


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_float32_costs_features_a_hundred_thousandth(size: Published) -> None:
    single, double = network(size, "").backbone, _in_float64(size)
    with torch.no_grad():
        for x in (image("x2d"), volume("x3d")):
            exact = double(x.double())
            assert (single(x) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize(("size", "count"), [("tiny", 20_380_336), ("small", 43_942_944)])
def test_parameter_counts_are_the_published_ones(size: Published, count: int) -> None:
    backbone = empty_network(published_model(size)).backbone
    assert sum(p.numel() for p in backbone.parameters()) == count


def test_nano_is_for_laptops() -> None:
    """A ninth of tiny; not less, because 16 features in place of 32 hardly learned (docs/LOG.md)."""
    assert sum(p.numel() for p in empty_network(NANO).backbone.parameters()) == 2_218_320


@pytest.mark.parametrize("size", [(37, 50), (64, 33), (13, 33, 47), (17, 41, 64)])
def test_any_size_is_accepted_and_maps_have_the_grids_that_token_grids_says(size: tuple[int, ...]) -> None:
    backbone = build_network(NANO, seed=0).backbone
    features = backbone.features(torch.rand(2, 1, *size))
    assert features.class_token.shape == (2, ARCHITECTURES["nano"].width)
    assert [tuple(x.shape[2:]) for x in features.encoder_maps] == token_grids(size)
    assert [x.shape[1] for x in features.encoder_maps] == list(ARCHITECTURES["nano"].widths)
    assert features.decoder_map.shape == (2, ARCHITECTURES["nano"].width, *token_grids(size)[0])


@pytest.mark.parametrize("size", [(40, 57), (14, 40, 57)])
def test_forward_is_the_class_token_of_features_in_value_and_gradient(size: tuple[int, ...]) -> None:
    backbone = build_network(NANO, seed=1).backbone.double()
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    wanted = [p for name, p in backbone.named_parameters() if f"{5 - len(size)}d" not in name.split(".")]
    short, whole = backbone(x), backbone.features(x).class_token
    torch.testing.assert_close(short, whole)
    for ours, theirs in zip(
        torch.autograd.grad(short.square().sum(), wanted),
        torch.autograd.grad(whole.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(40, 57), (14, 40, 57)])
def test_features_and_head_are_the_two_halves_that_timm_knows(size: tuple[int, ...]) -> None:
    backbone = build_network(NANO, seed=1).backbone.double()
    x = torch.rand(2, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        tokens, grid, maps = backbone.forward_features(x), token_grids(size)[0], backbone.features(x)
        torch.testing.assert_close(backbone.forward_head(tokens, pre_logits=True), backbone(x))
    assert tokens.shape == (2, 1 + int(np.prod(grid)), backbone.num_features)
    for number, cell in enumerate(np.ndindex(*grid), start=1):
        assert torch.equal(tokens[:, number], maps.decoder_map[(..., *cell)])


@needs_reference
def test_the_first_token_is_the_published_feature() -> None:
    tokens = _in_float64("tiny").forward_features(image("x2d").double())
    torch.testing.assert_close(tokens[:, 0].float(), golden("tiny")["features2d"], atol=1e-5, rtol=0)


def test_a_grey_image_counts_as_three_equal_channels() -> None:
    backbone = build_network(NANO, seed=2).backbone.double()
    grey = torch.rand(2, 1, 40, 57, dtype=torch.float64)
    torch.testing.assert_close(backbone(grey), backbone(grey.expand(-1, 3, -1, -1)))


def test_scans_of_a_batch_do_not_see_each_other() -> None:
    backbone = build_network(NANO, seed=3).backbone.double()
    x = torch.rand(3, 1, 13, 40, 36, dtype=torch.float64)
    torch.testing.assert_close(backbone(x)[1:2], backbone(x[1:2]))


@pytest.mark.parametrize("size", [SMALLEST[2], SMALLEST[3]])
def test_the_smallest_input_works_and_anything_smaller_is_refused_in_words(size: tuple[int, ...]) -> None:
    backbone = build_network(NANO, seed=0).backbone
    assert backbone(torch.rand(1, 1, *size)).isfinite().all()
    for axis in range(len(size)):
        smaller = [n - (i == axis) for i, n in enumerate(size)]
        with pytest.raises(ValueError, match=r"is too small: every axis needs at least"):
            backbone(torch.rand(1, 1, *smaller))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 64), r"the model takes 2D \(B, C, H, W\) or 3D \(B, C, D, H, W\); got a tensor of shape \(64, 64\)"),
        ((1, 2, 64, 64), "2D input needs 1 or 3 channels; got 2"),
        ((1, 3, 16, 64, 64), "3D input needs 1 channels; got 3"),
    ],
)
def test_input_of_another_rank_or_channels_is_refused_in_words(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(NANO, seed=0).backbone(torch.rand(shape))


def test_a_model_without_volumes_says_so() -> None:
    backbone = build_network(NANO, seed=0, ranks=(2,)).backbone
    with pytest.raises(ValueError, match=r"the model takes 2D \(B, C, H, W\); got"):
        backbone(torch.rand(1, 1, 16, 64, 64))


@pytest.mark.parametrize("grid", [(6, 9), (3, 6, 9)])
def test_a_resized_position_table_keeps_its_class_row_and_the_order_of_its_axes(grid: tuple[int, ...]) -> None:
    table = PositionTable(grid, width=len(grid))
    ramps = torch.meshgrid(*(torch.linspace(0, 1, n) for n in grid), indexing="ij")
    with torch.no_grad():
        table.table[0] = 7.0
        table.table[1:] = torch.stack(ramps, -1).flatten(0, -2)
        resized = table(torch.empty(1, 1, *(2 * n for n in grid)))
        assert table(torch.empty(1, 1, *grid)) is table.table
    assert (resized[0] == 7.0).all()
    cells = resized[1:].unflatten(0, [2 * n for n in grid])
    for axis in range(len(grid)):
        steps = cells[..., axis].diff(dim=axis)
        assert steps.mean() > 0
        across = cells[..., axis].movedim(axis, 0).flatten(1)
        torch.testing.assert_close(across, across[:, :1].expand_as(across))
