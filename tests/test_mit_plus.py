"""MiTplus against the authors' own code, and what holds of it at any size.

`PUBLISHED` and `NORMS` were measured by running the authors' released network (UniMiSSPlus/MiTplus.py, modal_type 'MM',
with its head of 512 prototypes) in float64 on the weights and inputs that `tests/published.py` makes: images
`rs("x2d").rand(2, 3, 96, 96)` and one volume `rs("x3d").standard_normal((1, 1, 16, 96, 96))`. Of each output there are
the first four values, the last, and the norm. `NORMS` are of the gradients of the loss
mean((sigmoid(reconstruction) - x)^2) + mean(logits^2), where x was brought from its lowest to its highest value to
[0, 1]. Only these numbers, the count of parameters, and the digest of all names and shapes are here.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.published import plus_shapes, plus_weights, random_state
from unimiss_core.layers import Attention, PositionTable
from unimiss_core.mit_plus import PLUS_ARCHITECTURES, MiTPlus, plus_grids
from unimiss_core.network import Network, build_network, empty_network, load_tensors_
from unimiss_core.released import released_names, under_our_names
from unimiss_core.scan import Rank
from unimiss_core.study import ModelConfig
from unimiss_core.views import min_max

PLUS = ModelConfig(size="plus", image_size=(96, 96), volume_size=(16, 96, 96), prototypes=512, reconstruction=True)
NANO = ModelConfig(size="plus_nano", prototypes=16, reconstruction=True)

PUBLISHED = {
    "class_token 2d": (1.50334751, 6.09456603, 1.22638646, -2.15537596, 5.8000796, 72.301852),
    "drawn 2d": (0.56151001, 0.55280626, 0.5713257, 0.48346934, 0.61285265, 124.961849),
    "logits 2d": (0.09489706, 0.00355782, 0.11529594, 0.05536101, -0.0483873, 1.972823),
    "class_token 3d": (-4.6636449, 2.13913444, -3.65105948, 2.42153163, 1.28469853, 48.22561),
    "drawn 3d": (0.50104776, 0.54419198, 0.53758052, 0.49177875, 0.49852628, 202.878713),
    "logits 3d": (0.00993358, 0.04195312, 0.09767163, 0.03194369, 0.02427928, 1.387962),
}
LOSSES = {"2d": 0.09107911422864721, "3d": 0.01672324828628026}
NORMS = {  # the released name, with # for 2D or 3D: of images, of the volume
    "backbone.transformer.ConvBlock#0.0.conv.weight": (0.05147789, 0.03381765),
    "backbone.transformer.ConvBlock#1.1.norm.bias": (0.0005847756, 0.0005546025),
    "backbone.transformer.cls_tokens1": (0.001245296, 0.001648853),
    "backbone.transformer.cls_tokens4.weight": (0.005822787, 0.007502468),
    "backbone.transformer.pos_embed#2": (0.0009087128, 0.001357116),
    "backbone.transformer.patch_embed#3.proj1.conv.weight": (0.00363817, 0.003916819),
    "backbone.transformer.block1.0.attn.sr#.weight": (0.002102553, 0.00322723),
    "backbone.transformer.block3.3.attn.norm.weight": (8.798753e-05, 0.0001061543),
    "backbone.transformer.block4.1.mlp.fc1.weight": (0.00235435, 0.003151873),
    "backbone.DecEmbed#2.proj.weight": (0.000270351, 4.270643e-05),
    "backbone.DecEmbed#1.proj1.norm.weight": (4.134476e-06, 5.549321e-07),
    "backbone.DecPosEmbed#3": (3.995991e-05, 6.507458e-06),
    "backbone.Decblock3.0.attn.kv.weight": (0.000126152, 4.096509e-05),
    "backbone.Decblock2.0.attn.sr#.weight": (0.0001183227, 2.586585e-05),
    "backbone.norm.weight": (3.640976e-05, 7.780483e-06),
    "backbone.TransposeConv#1.bias": (1.518545e-05, 5.289265e-06),
    "backbone.TransposeConv#2.weight": (0.005318304, 0.005173196),
    "backbone.DeConvBlock#1.conv.weight": (0.002158378, 0.000720334),
    "backbone.recon_conv#.weight": (0.04589205, 0.04496781),
    "head.mlp.2.weight": (0.006200509, 0.00768504),
    "head.last_layer.weight_v": (0.005978448, 0.006771684),
}
NAMES_AND_SHAPES = "2ccac65a421c03430c5feb2e49f7af0594836f2b020235eed2e7d62919b2d9e3"
"""sha256 of a line for each tensor, its name and its axes with spaces between, sorted, with newlines between."""


@dataclass(frozen=True)
class Measured:
    """What our network gives for the authors' weights and inputs, and the norms of its gradients by name."""

    outputs: dict[str, Tensor]
    losses: dict[str, float]
    norms: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def measured() -> Measured:
    network = empty_network(PLUS).to_empty(device="cpu")
    load_tensors_(network, under_our_names(plus_weights(PLUS), PLUS))
    found = Measured({}, {}, {})
    for rank, x in (("2d", images()), ("3d", volume())):
        measure(network, rank, x, found)
    return found


def measure(network: Network, rank: str, x: Tensor, found: Measured) -> None:
    assert network.reconstruction is not None
    features = network.backbone.features(x)
    drawn, logits = network.reconstruction(features.decoder_map, x.shape[2:]), network.head(features.class_token)
    loss = (drawn - min_max(x)).square().mean() + logits.square().mean()
    network.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    seen = {"class_token": features.class_token, "drawn": drawn, "logits": logits}
    found.outputs.update({f"{name} {rank}": value.detach() for name, value in seen.items()})
    found.losses[rank] = loss.item()
    found.norms[rank] = {
        name: p.grad.double().norm().item() for name, p in network.named_parameters() if p.grad is not None
    }


def images() -> Tensor:
    return torch.from_numpy(random_state("x2d").rand(2, 3, 96, 96)).float()


def volume() -> Tensor:
    return torch.from_numpy(random_state("x3d").standard_normal((1, 1, 16, 96, 96))).float()


def test_names_shapes_and_number_of_parameters_are_the_published_ones() -> None:
    shapes = plus_shapes(PLUS)
    lines = sorted(" ".join([name, *map(str, shape)]) for name, shape in shapes.items())
    assert len(lines) == 367
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == NAMES_AND_SHAPES
    network = empty_network(PLUS)
    parts = (network.backbone, network.reconstruction)
    assert sum(p.numel() for part in parts if part is not None for p in part.parameters()) == 41_112_772


@pytest.mark.parametrize("output", PUBLISHED)
def test_class_token_reconstruction_and_logits_are_the_published_ones(measured: Measured, output: str) -> None:
    values = measured.outputs[output].flatten()
    ours = (*values[:4].tolist(), values[-1].item(), values.norm().item())
    assert ours == pytest.approx(PUBLISHED[output], rel=1e-4)


@pytest.mark.parametrize("rank", LOSSES)
def test_gradients_are_as_long_as_the_published_ones(measured: Measured, rank: str) -> None:
    """In float32, where a bias's gradient is a sum over 150,000 voxels. In float64, which takes 14 seconds, all of them
    are the authors' to 1e-14."""
    assert measured.losses[rank] == pytest.approx(LOSSES[rank], rel=1e-5)
    ours = {theirs: measured.norms[rank].get(name) for name, theirs in released_names(PLUS).items()}
    for name, norms in NORMS.items():
        expected = norms[0 if rank == "2d" else 1]
        assert ours[name.replace("#", rank.upper())] == pytest.approx(expected, rel=5e-4), name


def nano(seed: int = 1) -> MiTPlus:
    backbone = build_network(NANO, seed=seed).backbone.double()
    assert isinstance(backbone, MiTPlus)
    return backbone


def scans(*size: int) -> Tensor:
    return torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_plus_nano_is_for_laptops() -> None:
    assert sum(p.numel() for p in empty_network(NANO).backbone.parameters()) == 1_600_768


@pytest.mark.parametrize("size", [(37, 50), (64, 33), (13, 33, 47), (17, 41, 64)])
def test_any_size_is_accepted_and_the_decoders_map_is_as_fine_as_the_scan(size: tuple[int, ...]) -> None:
    architecture = PLUS_ARCHITECTURES["plus_nano"]
    features = nano().features(scans(*size))
    assert features.class_token.shape == (2, architecture.width)
    assert [tuple(x.shape[2:]) for x in features.encoder_maps] == plus_grids(size)
    assert [x.shape[1] for x in features.encoder_maps] == list(architecture.widths)
    assert features.decoder_map.shape == (2, architecture.stem[0], *size)
    assert features.decoder_map.isfinite().all()


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((96, 96), [(24, 24), (12, 12), (6, 6), (3, 3)]),
        ((16, 96, 96), [(8, 24, 24), (4, 12, 12), (4, 6, 6), (4, 3, 3)]),
        ((17, 41, 64), [(9, 11, 16), (5, 6, 8), (5, 3, 4), (5, 2, 2)]),
    ],
)
def test_depth_is_halved_in_two_stages_and_height_and_width_in_all(
    size: tuple[int, ...], grids: list[tuple[int, ...]]
) -> None:
    assert plus_grids(size) == grids


@pytest.mark.parametrize("size", [(40, 57), (14, 40, 57)])
def test_forward_is_the_class_token_of_features_and_leaves_the_decoder_alone(size: tuple[int, ...]) -> None:
    backbone, x = nano(), scans(*size)
    whole = backbone.features(x).class_token
    wanted = dict(backbone.encoder.named_parameters())
    gradients = torch.autograd.grad(whole.square().sum(), list(wanted.values()), allow_unused=True)
    expected = dict(zip(wanted, gradients, strict=True))
    backbone.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the decoder was run"))
    short = backbone(x)
    torch.testing.assert_close(short, whole)
    torch.autograd.backward(short.square().sum())
    found = {name: p.grad for name, p in backbone.encoder.named_parameters()}
    torch.testing.assert_close(found, expected)
    other = f"{5 - len(size)}d"
    assert {name for name, gradient in found.items() if gradient is None} == {n for n in found if other in n.split(".")}


@pytest.mark.parametrize("size", [(40, 57), (14, 40, 57)])
def test_features_and_head_are_the_two_halves_that_timm_knows(size: tuple[int, ...]) -> None:
    backbone, x = nano(), scans(*size)
    with torch.no_grad():
        tokens, last = backbone.forward_features(x), backbone.features(x).encoder_maps[-1]
        torch.testing.assert_close(backbone.forward_head(tokens, pre_logits=True), backbone(x))
    assert tokens.shape == (2, 1 + math.prod(last.shape[2:]), backbone.num_features)
    for number, cell in enumerate(np.ndindex(*last.shape[2:]), start=1):
        torch.testing.assert_close(tokens[:, number], last[(..., *cell)])


@pytest.mark.parametrize("grid", [(6, 9), (3, 6, 9)])
def test_a_table_without_class_row_is_resized_in_all_its_rows(grid: tuple[int, ...]) -> None:
    """Where the released code would take the first cell for a class token's row."""
    bare, full = (PositionTable(grid, width=4, class_rows=rows) for rows in (0, 1))
    with torch.no_grad():
        bare.table.normal_(generator=torch.Generator().manual_seed(0))
        full.table[1:] = bare.table
        finer = torch.empty(1, 1, *(2 * n for n in grid))
        assert torch.equal(bare(finer), full(finer)[1:])
        assert bare(torch.empty(1, 1, *grid)) is bare.table


def test_an_axis_shorter_than_a_reduction_counts_as_one_patch_filled_with_zeros() -> None:
    """Of one key every query gets the same value: that of a kernel's first seven rows."""
    attention = Attention(8, 2, 8, bias=True, ranks={2}, depthwise=True).double()
    cells = torch.randn(3, 8, 7, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel, bias = attention.reduce["2d"].weight[:, 0], attention.reduce["2d"].bias
    key = attention.reduce_norm(torch.einsum("bchw,chw->bc", cells, kernel[:, :7]) + bias)
    expected = attention.project(attention.key_value(key)[:, 8:])
    found = attention(cells.flatten(2).mT, cells.shape[2:])
    torch.testing.assert_close(found, expected[:, None].expand(3, 56, 8))


@pytest.mark.parametrize("size", [(37, 50), (13, 33, 40)])
def test_without_one_rank_the_other_is_the_same(size: tuple[int, ...]) -> None:
    rank: Rank = 2 if len(size) == 2 else 3
    alone = build_network(NANO, seed=1, ranks=(rank,)).backbone.double()
    assert not any(f"{5 - rank}d" in name.split(".") for name, _ in alone.named_parameters())
    torch.testing.assert_close(alone.features(scans(*size)).decoder_map, nano().features(scans(*size)).decoder_map)
    with pytest.raises(ValueError, match=f"the model takes {rank}D"):
        alone(torch.rand(1, 1, *(33,) * (5 - rank)))


def test_what_is_drawn_at_a_place_is_a_linear_function_of_the_map_there() -> None:
    network, x = build_network(NANO, seed=1).double(), scans(40, 57)
    assert network.reconstruction is not None
    kernel, bias = network.reconstruction.patch["2d"].weight[:, :, 0, 0], network.reconstruction.patch["2d"].bias
    found = network.backbone.features(x).decoder_map
    expected = torch.sigmoid(torch.einsum("bchw,cd->bdhw", found, kernel) + bias[:, None, None])
    torch.testing.assert_close(network.bottleneck_and_reconstruction(x)[1], expected)
