"""The prototypes' gradient as rows: that what is added of it is never longer than is said, whatever rounding does."""

import math

import pytest
import torch
from torch import Tensor

from unimiss_core import gathering
from unimiss_core.head import Prototypes
from unimiss_core.prototypes_gradient import PrototypesGradient

CLIP = 0.5
WIDTH, MANY = 16, 300


def prototypes(dtype: torch.dtype = torch.float32, *, apart: float = 1.0) -> Prototypes:
    """apart: how far rows are from one common direction; their lengths are unlike."""
    generator = torch.Generator().manual_seed(0)
    made = Prototypes(WIDTH, MANY).to(dtype)
    with torch.no_grad():
        common = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
        made.weight.copy_(common + apart * torch.randn((MANY, WIDTH), generator=generator))
        made.weight.mul_(torch.linspace(0.1, 10, MANY)[:, None])
    return made


def gathered(made: Prototypes, h: Tensor, grad: Tensor) -> PrototypesGradient:
    """Of rows h (R, E) that a loss has the gradient `grad` (R, K) by the logits of."""
    gradient = PrototypesGradient(made.weight)
    torch.autograd.backward(gradient.logits(h.clone().requires_grad_()), grad)
    return gradient


def added(gradient: PrototypesGradient, scale: float, to: Tensor | None = None) -> Tensor:
    total = torch.zeros_like(gradient.weight.detach()) if to is None else to
    gradient.add_to_(total, scale)
    return total


def some_rows(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn((rows, WIDTH), generator=generator).to(dtype)
    return torch.nn.functional.normalize(h, dim=-1), torch.randn((rows, MANY), generator=generator).to(dtype)


def cancelling(size: float) -> tuple[Tensor, Tensor]:
    """Four rows whose products add up to nothing, and two more of usual size."""
    h, grad = some_rows(2, seed=1)
    usual_h, usual = some_rows(2, seed=2)
    return torch.cat([h, -h, usual_h]), torch.cat([size * grad, size * grad, usual])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_length_and_sum_are_those_of_the_gradient_by_autograd(dtype: torch.dtype, near: float, rows: int) -> None:
    made, (h, grad) = prototypes(dtype), some_rows(rows, dtype=dtype)
    exactly = prototypes(torch.float64)
    with torch.no_grad():
        exactly.weight.copy_(made.weight)
    torch.autograd.backward(exactly(h.double()), grad.double())
    expected = exactly.weight.grad
    assert expected is not None
    bound = gathered(made, h, grad).norm_at_most()
    assert expected.norm().item() * (1 - 1e-12 if dtype == torch.float64 else 1) <= bound
    assert bound <= expected.norm().item() * (1 + near)
    total = added(gathered(made, h, grad), 0.25)
    assert (total.double() - 0.25 * expected).norm().item() <= near * 0.25 * expected.norm().item()


ADVERSARIAL = {
    "usual": (prototypes(), some_rows(4)),
    "all along the prototypes": (prototypes(apart=1e-6), (torch.full((2, WIDTH), 0.25), torch.ones(2, MANY))),
    "along them, of great size": (prototypes(apart=1e-4), (torch.full((2, WIDTH), 0.25), torch.full((2, MANY), 1e12))),
    "cancelling": (prototypes(), cancelling(1e4)),
    "cancelling, of great size": (prototypes(), cancelling(1e9)),
    "cancelling, as large as float32 goes": (prototypes(), cancelling(1e34)),
    "cancelling, along the prototypes": (prototypes(apart=1e-3), cancelling(1e6)),
    "small": (prototypes(), (some_rows(4)[0], 1e-30 * some_rows(4)[1])),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_what_is_added_of_one_patient_is_no_longer_than_the_clip_norm(name: str) -> None:
    """In float64, of the values that are added in float32."""
    made, rows = ADVERSARIAL[name]
    length = gathered(made, *rows).norm_at_most()
    assert added(gathered(made, *rows), CLIP / length).double().norm().item() <= CLIP


def test_by_the_exact_length_rows_that_cancel_would_overstep_it() -> None:
    """So the margin for rounding is needed, and where rows do not cancel it is next to nothing."""
    made, (h, grad) = prototypes(), cancelling(1e9)
    kept = gathered(made, h, grad)
    (s, rows), c = (part.double() for part in kept._products.kept_rows()), kept._multiples(slice(None)).double()
    exact = (s.mT @ rows - c[:, None] * made.weight.detach().double()).norm().item()
    assert added(gathered(made, h, grad), CLIP / exact).double().norm().item() > 2 * CLIP
    usual = gathered(made, *some_rows(4))
    assert usual.norm_at_most() == pytest.approx(usual.norm().item(), rel=1e-5)


def test_what_is_added_hangs_on_nobody_elses_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, but for the rounding of one sum; one product over all rows would lose the small ones."""
    monkeypatch.setattr(gathering, "BLOCK_VALUES", 64 * WIDTH)
    made, large, small = prototypes(), cancelling(1e9), some_rows(2)
    alone = added(gathered(made, *small), 1.0)
    others = added(gathered(made, *large), 1.0)
    assert torch.equal(added(gathered(made, *small), 1.0, to=others.clone()), others + alone)
    assert torch.equal(added(gathered(made, *large), 1.0, to=alone.clone()), alone + others)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_have_no_finite_length(bad: float) -> None:
    made, (h, grad) = prototypes(), some_rows(3)
    for broken in (h, grad):
        good = broken[1, 2].item()
        broken[1, 2] = bad
        assert not math.isfinite(gathered(made, h, grad).norm_at_most())
        broken[1, 2] = good


def test_prototypes_too_short_to_be_measured_have_no_gradient_that_could_be_bounded() -> None:
    made = prototypes()
    with torch.no_grad():
        made.weight[7] *= 1e-18
    assert gathered(made, *some_rows(2)).norm_at_most() == math.inf


def test_without_rows_there_is_no_gradient() -> None:
    nothing = PrototypesGradient(prototypes().weight)
    assert nothing.is_rows
    assert nothing.norm_at_most() == 0.0
    assert added(nothing, 1.0).count_nonzero() == 0
