import pytest
import torch
from torch import Tensor

from tests.small_tasks import three_answers
from unimiss_core.errors import CheckpointError
from unimiss_core.network import build_network, tensors_of
from unimiss_core.scan import Rank
from unimiss_core.study import ModelConfig
from unimiss_core.tasks import (
    TaskModel,
    Trains,
    build_task_model,
    freeze_,
    layers_of,
    load_task_model,
    rate_groups,
)

NANO = ModelConfig(prototypes=16)
ODD_SIZES: dict[Rank, list[tuple[int, ...]]] = {2: [(33, 47), (64, 64)], 3: [(13, 35, 41), (16, 64, 33)]}


def made(rank: Rank, *, dense: bool = True, seed: int = 0, pretrained: dict[str, Tensor] | None = None) -> TaskModel:
    return build_task_model(NANO, three_answers(rank, dense=dense), seed=seed, pretrained=pretrained)


def scans(*size: int) -> Tensor:
    return torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", ODD_SIZES)
def test_a_mask_is_as_large_as_its_scan_and_every_parameter_of_its_model_counts(rank: Rank) -> None:
    model = made(rank)
    for size in ODD_SIZES[rank]:
        logits = model(scans(*size))
        assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # The class token leaves the decoder unread: a mask is made of the other tokens.
    assert all("class_token" in name or name.endswith(("conv.bias", "key_value.bias")) for name in idle), idle


def test_a_mask_moves_with_what_lies_at_its_place() -> None:
    """A voxel changed at a corner moves the logits there more than at the far corner."""
    model, x = made(2), scans(64, 64)
    changed = x.clone()
    changed[..., :8, :8] += 2
    with torch.no_grad():
        moved = (model(changed) - model(x)).abs().mean((0, 1))
    assert moved[:8, :8].mean() > 3 * moved[-8:, -8:].mean()


@pytest.mark.parametrize("rank", ODD_SIZES)
def test_a_class_is_a_linear_function_of_the_pretrained_class_token(rank: Rank) -> None:
    network = build_network(NANO, seed=5)
    model, x = made(rank, dense=False, pretrained=tensors_of(network)), scans(*ODD_SIZES[rank][0])
    with torch.no_grad():
        expected = network.backbone(x) @ model.head.linear.weight.T + model.head.linear.bias
        torch.testing.assert_close(model(x), expected)


def test_the_backbone_keeps_the_names_of_pretraining() -> None:
    names = {name for name in tensors_of(build_network(NANO, seed=0)) if name.startswith("backbone.")}
    own = {name for name, _ in made(3).named_parameters() if name.startswith("backbone.")}
    assert own == {name for name in names if ".2d." not in name}


def test_a_pretrained_tensor_that_is_missing_or_changed_is_named() -> None:
    tensors = tensors_of(build_network(NANO, seed=0))
    gone = {name: t for name, t in tensors.items() if name != "backbone.decoder.norm.weight"}
    with pytest.raises(CheckpointError, match=r"backbone\.decoder\.norm\.weight"):
        made(2, pretrained=gone)
    with pytest.raises(CheckpointError, match=r"backbone\.decoder\.norm\.bias"):
        made(2, pretrained={**tensors, "backbone.decoder.norm.bias": torch.zeros(3)})


def test_a_model_comes_back_from_its_own_tensors_alone() -> None:
    model, x = made(2, seed=3), scans(40, 40)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    again = load_task_model(NANO, three_answers(2, dense=True), tensors=tensors)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    del tensors["head.classes.bias"]
    with pytest.raises(CheckpointError, match=r"head\.classes\.bias"):
        load_task_model(NANO, three_answers(2, dense=True), tensors=tensors)


@pytest.mark.parametrize(
    ("trains", "prefixes"),
    [
        ("linear_probe", {"head"}),
        ("frozen", {"head", "backbone.decoder"}),
        ("full", {"head", "backbone.decoder", "backbone.encoder"}),
    ],
)
def test_only_what_is_named_is_trained(trains: Trains, prefixes: set[str]) -> None:
    model = made(2)
    freeze_(model, trains)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(tuple(prefixes))}


def test_layers_nearer_the_input_learn_more_slowly() -> None:
    model = made(3)
    layers = layers_of(model)
    assert layers["backbone.encoder.stem.3d.conv.weight"] == layers["backbone.encoder.class_token"] == 0
    assert layers["backbone.encoder.stages.3.blocks.0.mlp.0.weight"] == 4
    assert layers["backbone.decoder.stages.2.position.3d.table"] == layers["backbone.decoder.norm.weight"] == 7
    assert layers["head.classes.weight"] == 8
    groups = rate_groups(model, lr=1.0, decay=0.5, weight_decay=0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["head.classes.weight"])] == (1.0, 0.1)
    assert rates[id(named["head.classes.bias"])] == (1.0, 0.0)
    assert rates[id(named["backbone.encoder.stem.3d.conv.weight"])] == (0.5**8, 0.1)
    assert len(rates) == len(named)
