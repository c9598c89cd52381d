"""The wire's formats, against a numpy oracle of the block quantiser and bounds that hold for any values."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from unimiss_core.errors import WireError
from unimiss_core.formats import BLOCK, FORMATS
from unimiss_core.study import WireConfig

INT8 = FORMATS["int8"]
TINY = np.finfo(np.float32).tiny


def up_to_bfloat16(x: float) -> float:
    """The smallest number of 8 significant bits that is not below x; x is normal."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(math.ceil(fraction * 256), exponent - 8)


def oracle(values: NDArray[np.float32]) -> tuple[list[float], list[int]]:
    """(scales, codes) in Python's own float64 arithmetic, block by block and value by value."""
    scales, codes = [], []
    for start in range(0, len(values), BLOCK):
        block = [float(x) for x in values[start : start + BLOCK]]
        least = float(np.float32(max(abs(x) for x in block) / 127))
        scales.append(up_to_bfloat16(max(least, float(TINY))))
        codes += [round(float(np.float32(x / scales[-1]))) for x in block]  # Python rounds half to even
    return scales, codes


def drawn(seed: int, size: int) -> Tensor:
    """Values of very different magnitudes, block by block, as updates of a network have them."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (torch.rand(-(-size // 50), generator=generator) * 12 - 10)
    return torch.randn(size, generator=generator) * magnitudes.repeat_interleave(50)[:size]


def seen(values: Tensor, name: str = "int8") -> Tensor:
    payload = FORMATS[name].encode([values])
    assert len(payload) == FORMATS[name].num_bytes(len(values))
    return FORMATS[name].decode(payload, len(values))


@pytest.mark.parametrize("size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_int8_is_what_the_oracle_says(size: int) -> None:
    values = drawn(size, size)
    scales, codes = oracle(values.numpy())
    payload = INT8.encode([values])
    blocks = len(scales)
    assert len(payload) == INT8.num_bytes(size) == 2 * blocks + size
    halves = np.frombuffer(payload[: 2 * blocks], np.uint16).astype(np.uint32)
    assert (halves << 16).view(np.float32).tolist() == scales
    assert np.frombuffer(payload[2 * blocks :], np.int8).tolist() == codes
    expected = [code * scales[at // BLOCK] for at, code in enumerate(codes)]
    assert INT8.decode(payload, size).tolist() == expected  # exactly: a code of 7 bits times a scale of 8


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=2 * BLOCK))
def test_no_value_is_further_off_than_half_a_scale_and_the_loss_is_exact(raw: list[float]) -> None:
    values = np.array(raw, np.float32)
    if np.abs(values).max() > 1e38:
        values /= 8  # the largest floats may round to infinity, which a receiver refuses
    back = seen(torch.from_numpy(values)).numpy()
    scales = np.repeat(oracle(values)[0], BLOCK)[: len(values)]
    loss = values.astype(np.float64) - back.astype(np.float64)
    assert (np.abs(loss) <= scales / 2 * (1 + 2**-16)).all()  # the quotient that is rounded has 24 bits
    assert ((values - back).astype(np.float64) == loss).all()


def test_zeros_stay_zeros_and_denormals_become_zeros() -> None:
    for values in (torch.zeros(300), torch.full((300,), 1e-44), torch.full((300,), -0.0)):
        assert torch.equal(seen(values), torch.zeros(300))


def test_a_large_value_does_not_drown_other_blocks() -> None:
    values = torch.full((4 * BLOCK,), 1e-6)
    values[BLOCK] = 1e6
    back = seen(values)
    assert torch.equal(back[BLOCK + 1 : 2 * BLOCK], torch.zeros(BLOCK - 1))
    rest = torch.cat([back[:BLOCK], back[2 * BLOCK :]])
    torch.testing.assert_close(rest, torch.full_like(rest, 1e-6), rtol=0.004, atol=0)


def test_halves_go_to_the_even_code() -> None:
    values = torch.zeros(BLOCK)
    values[:6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert seen(values)[:6].tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_by_the_receiver(name: str, odd: float) -> None:
    values = drawn(0, 2 * BLOCK + 5)
    values[BLOCK + 3] = odd
    if FORMATS[name].carries_over:
        with pytest.raises(WireError) as caught:
            seen(values, name)
        assert caught.value.reason == "not_finite"
    else:
        assert not seen(values, name).isfinite().all()


def test_a_value_beyond_a_bf16_scale_is_not_silently_made_small() -> None:
    values = torch.full((BLOCK,), torch.finfo(torch.float32).max)
    assert not seen(values).isfinite().all() or torch.allclose(seen(values), values, rtol=0.01)


@pytest.mark.parametrize(
    ("bits", "reason"),
    [
        *((bits, "not_finite") for bits in (0x7FC0, 0x7F80, 0xFF80, 0xFFC1)),
        *((bits, "malformed") for bits in (0x0000, 0x8000, 0xBF80, 0x0001)),
    ],
)
def test_a_scale_that_no_sender_writes_is_refused(bits: int, reason: str) -> None:
    """NaN, infinities; zero, minus zero, minus one, a denormal."""
    payload = bytearray(INT8.encode([drawn(1, 3 * BLOCK)]))
    payload[2:4] = bits.to_bytes(2, "little")
    with pytest.raises(WireError) as caught:
        INT8.decode(bytes(payload), 3 * BLOCK)
    assert caught.value.reason == reason


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=INT8.num_bytes(BLOCK + 1), max_size=INT8.num_bytes(BLOCK + 1)))
def test_any_bytes_give_numbers_or_a_refusal(payload: bytes) -> None:
    try:
        values = INT8.decode(payload, BLOCK + 1)
    except WireError:
        return
    assert values.shape == (BLOCK + 1,)
    assert not values.isnan().any()


def test_the_bytes_do_not_depend_on_the_number_of_threads() -> None:
    values = drawn(7, 200_001)
    threads = torch.get_num_threads()
    try:
        payloads = set()
        for count in (1, 2):
            torch.set_num_threads(count)
            payloads.add(INT8.encode([values]))
    finally:
        torch.set_num_threads(threads)
    assert len(payloads) == 1


def test_floats_are_rounded_each_by_itself() -> None:
    values = drawn(2, 999)
    assert torch.equal(seen(values, "fp32"), values)
    assert torch.equal(seen(values, "bf16"), values.bfloat16().float())


def test_every_format_of_a_study_is_here() -> None:
    assert set(FORMATS) == set(get_args(WireConfig.model_fields["dtype"].annotation))
