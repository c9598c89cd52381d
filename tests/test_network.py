import pytest
import torch

from unimiss_core.errors import CheckpointError
from unimiss_core.groups import group_of
from unimiss_core.network import build_network, empty_network, load_tensors_, tensors_of
from unimiss_core.study import ModelConfig

NANO = ModelConfig(prototypes=16)


def test_a_seed_gives_the_same_network_and_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (build_network(NANO, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert name.endswith("bias") or "norm" in name or not torch.equal(a, c), name


def test_a_seed_gives_the_same_values_whatever_torch_draws_by() -> None:
    """Written down by torch 2.11 and 2.13 alike: `trunc_normal_`, which used to draw some, differs between them."""
    tensors = tensors_of(build_network(NANO, seed=1))
    expected = {
        "backbone.encoder.class_token": [0.011261, 0.026928, -0.029182],
        "backbone.encoder.stages.0.position.2d.table": [0.015539, 0.019989, 0.016634],
        "backbone.encoder.stem.3d.conv.weight": [0.012242, 0.108274, -0.028869],
        "backbone.encoder.stages.0.blocks.0.mlp.0.weight": [-0.005569, -0.064896, -0.062466],
        "head.prototypes.weight": [-0.203091, 0.119517, -0.002599],
    }
    for name, values in expected.items():
        assert tensors[name].flatten()[:3].tolist() == pytest.approx(values, abs=1e-6), name


def test_a_site_without_volumes_holds_no_3d_tensor_and_begins_with_the_same_values() -> None:
    whole, flat = tensors_of(build_network(NANO, seed=5)), tensors_of(build_network(NANO, seed=5, ranks=(2,)))
    assert flat.keys() == {name for name in whole if group_of(name) != "3d"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in flat.items())


def test_every_initial_value_is_finite_and_convolutions_do_not_all_begin_alike() -> None:
    tensors = tensors_of(build_network(NANO, seed=0))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    kernels = [tensor.flatten()[:8] for name, tensor in tensors.items() if name.endswith("conv.weight")]
    assert len({tuple(kernel.tolist()) for kernel in kernels}) == len(kernels)


def test_loading_refuses_other_names_and_shapes_before_it_changes_anything() -> None:
    network = build_network(NANO, seed=0)
    before = {name: tensor.clone() for name, tensor in tensors_of(network).items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()}
    wrong["backbone.extra"] = wrong.pop("head.mlp.0.bias")
    wrong["head.mlp.2.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"missing head\.mlp\.0\.bias; unexpected backbone\.extra; head\.mlp\.2"):
        load_tensors_(network, wrong)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(network).items())


def test_an_empty_network_costs_no_memory() -> None:
    big = ModelConfig(size="small", prototypes=65_536)
    assert all(parameter.is_meta for parameter in empty_network(big).parameters())
