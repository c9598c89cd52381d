"""Packing keeps values, order and size; what does not fit is refused."""

import numpy as np
import pytest
import torch

from tests.federation import layout_for, random_tensors, whole_layout
from unimiss_core.codec import TensorSpec, carried_over, num_bytes, pack, released, unpack, view
from unimiss_core.errors import WireError
from unimiss_core.formats import BLOCK, FORMATS
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


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-8), ("int8", 1 / 250)])
def test_round_trip_is_what_a_receiver_is_said_to_see(dtype: str, error: float) -> None:
    layout = whole_layout()
    tensors = random_tensors(layout, 1)
    seen = released(tensors, layout, dtype)
    total = 0
    for specs in layout.values():
        payload = pack(tensors, specs, dtype)
        total += len(payload)
        back = unpack(payload, specs, dtype)
        assert all(torch.equal(back[name], seen[name]) for name in back)
        largest = max(tensors[name].abs().max() for name in back)
        assert all((seen[name] - tensors[name]).abs().max() <= largest * error for name in back)
    assert total == num_bytes(layout, dtype)
    assert seen.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_view_holds_what_unpacking_gives_and_copies_nothing_that_it_need_not(dtype: str) -> None:
    specs = whole_layout()["shared"]
    payload = pack(random_tensors({"shared": specs}, 3), specs, dtype)
    seen, expected = view(payload, specs, dtype), unpack(payload, specs, dtype)
    assert {name: t.shape for name, t in seen.items()} == {name: t.shape for name, t in expected.items()}
    assert all(torch.equal(seen[name].float(), tensor) for name, tensor in expected.items())
    if dtype != "int8":
        assert seen[specs[0].name].data_ptr() == np.frombuffer(payload, np.uint8).ctypes.data


def test_bytes_are_what_the_formats_say() -> None:
    values = {group: sum(spec.size for spec in specs) for group, specs in whole_layout().items()}
    assert num_bytes(whole_layout(), "fp32") == 4 * sum(values.values())
    assert num_bytes(whole_layout(), "bf16") == 2 * sum(values.values())
    assert num_bytes(whole_layout(), "int8") == sum(n + 2 * -(-n // BLOCK) for n in values.values())


def test_scales_are_shared_within_a_group_across_tensors() -> None:
    specs = (TensorSpec("a", (3, 2)), TensorSpec("b", (5,)))
    tensors = {"a": torch.full((3, 2), 1e-3), "b": torch.full((5,), 127.0)}
    assert len(pack(tensors, specs, "int8")) == 2 + 11
    back = unpack(pack(tensors, specs, "int8"), specs, "int8")
    assert torch.equal(back["a"], torch.zeros(3, 2))
    assert torch.equal(back["b"], tensors["b"])


def test_layout_names_every_parameter_once() -> None:
    network = empty_network(ModelConfig())
    names = [spec.name for specs in whole_layout(ModelConfig()).values() for spec in specs]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())


def test_two_dimensional_site_has_no_three_dimensional_tensor() -> None:
    assert set(layout_for(frozenset({2}))) == {"shared", "2d", "head"}
    assert not [s.name for specs in layout_for(frozenset({2})).values() for s in specs if "3d" in s.name.split(".")]
    assert set(layout_for(frozenset({3}))) == set(GROUPS)


@pytest.mark.parametrize("read", [unpack, view])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda _: b""])
def test_wrong_number_of_bytes_is_refused(change, dtype, read) -> None:  # type: ignore[no-untyped-def]
    specs = whole_layout()["2d"]
    payload = pack(random_tensors({"2d": specs}, 2), specs, dtype)
    with pytest.raises(WireError) as caught:
        read(change(payload), specs, dtype)
    assert caught.value.reason == "wrong_size"


@pytest.mark.parametrize("rounds", [1, 30])
def test_what_was_received_and_what_is_lost_is_all_there_was(rounds: int) -> None:
    """The telescoping sum of error feedback, in float64; without feedback the errors add up."""
    layout = {group: specs[:3] for group, specs in layout_for(frozenset({2})).items()}
    names = sorted(random_tensors(layout, 0))
    true, received, plain = ({name: torch.zeros(1, dtype=torch.float64) for name in names} for _ in range(3))
    lost: dict[str, torch.Tensor] = {}
    bias = random_tensors(layout, 99)
    for round in range(rounds):
        # Nearly the same update in each round, as in training that goes one way: the same is lost each time.
        update = {name: 1e-5 * t + 0.02 * bias[name] for name, t in random_tensors(layout, round).items()}
        sent, lost = carried_over(update, lost, layout, "int8")
        alone = released(update, layout, "int8")
        for total, part in ((true, update), (received, released(sent, layout, "int8")), (plain, alone)):
            for name in names:
                total[name] = total[name] + part[name].double()
    for name in names:
        torch.testing.assert_close(received[name] + lost[name].double(), true[name], rtol=0, atol=rounds * 1e-8)
    with_feedback, without = (
        sum(float((total[name] - true[name]).square().sum()) for name in names) for total in (received, plain)
    )
    assert with_feedback <= without * (1.001 if rounds == 1 else 0.01)


def test_what_is_not_in_the_layout_is_neither_sent_nor_carried() -> None:
    layout = {"2d": whole_layout()["2d"]}
    everything = random_tensors(whole_layout(), 0)
    sent, lost = carried_over(everything, everything, layout, "int8")
    assert sent.keys() == lost.keys() == {spec.name for spec in layout["2d"]}


def test_an_update_that_is_not_finite_cannot_be_carried_over() -> None:
    layout = whole_layout()
    update = random_tensors(layout, 0)
    next(iter(update.values())).view(-1)[3] = float("nan")
    with pytest.raises(WireError, match="not_finite"):
        carried_over(update, {}, layout, "int8")
