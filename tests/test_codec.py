"""Packing keeps values, order and size; what does not fit is refused."""

import pytest
import torch

from tests.federation import layout_for, random_tensors, whole_layout
from unimiss_core.codec import pack, released, unpack
from unimiss_core.errors import WireError
from unimiss_core.groups import GROUPS
from unimiss_core.network import empty_network
from unimiss_core.study import ModelConfig


def test_fp32_round_trip_is_exact() -> None:
    layout = whole_layout()
    tensors = random_tensors(layout, 0)
    for group in GROUPS:
        back = unpack(pack(tensors, layout[group], "fp32"), layout[group], "fp32")
        assert back.keys() == {spec.name for spec in layout[group]}
        assert all(torch.equal(back[name], tensors[name]) for name in back)


def test_bf16_round_trip_is_what_a_receiver_is_said_to_see() -> None:
    specs = whole_layout()["3d"]
    tensors = {spec.name: tensor for spec, tensor in zip(specs, random_tensors({"3d": specs}, 1).values(), strict=True)}
    payload = pack(tensors, specs, "bf16")
    assert len(payload) == 2 * sum(spec.size for spec in specs)
    seen = released(tensors, "bf16")
    back = unpack(payload, specs, "bf16")
    assert all(torch.equal(back[name], seen[name]) for name in back)
    assert all((seen[n] - tensors[n]).abs().max() <= tensors[n].abs().max() * 2**-8 for n in back)


def test_layout_names_every_parameter_once() -> None:
    network = empty_network(ModelConfig())
    names = [spec.name for specs in whole_layout(ModelConfig()).values() for spec in specs]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())


def test_two_dimensional_site_has_no_three_dimensional_tensor() -> None:
    assert set(layout_for(frozenset({2}))) == {"shared", "2d", "head"}
    assert not [s.name for specs in layout_for(frozenset({2})).values() for s in specs if "3d" in s.name.split(".")]
    assert set(layout_for(frozenset({3}))) == set(GROUPS)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda _: b""])
def test_wrong_number_of_bytes_is_refused(change) -> None:  # type: ignore[no-untyped-def]
    specs = whole_layout()["2d"]
    payload = pack(random_tensors({"2d": specs}, 2), specs, "bf16")
    with pytest.raises(WireError) as caught:
        unpack(change(payload), specs, "bf16")
    assert caught.value.reason == "wrong_size"
