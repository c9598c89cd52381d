"""What stays in float32 where a step runs in bfloat16 on a CPU, and what is done once."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_learner import apart, images, study, volumes
from unimiss_core.execution import Execution
from unimiss_core.head import Head
from unimiss_core.layers import INSTANCE_NORM, attend
from unimiss_core.learner import Learner
from unimiss_core.precision import FEW_ROWS, MLP, Linear, _over_cells, in_bf16_on_cpu


def bf16(*, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def test_bf16_is_what_autocast_or_the_tensor_says() -> None:
    x = torch.ones(2)
    assert not in_bf16_on_cpu(x)
    assert in_bf16_on_cpu(x.to(torch.bfloat16))
    with bf16():
        assert in_bf16_on_cpu(x)
        assert not in_bf16_on_cpu(x.to("meta"))
    with torch.autocast("cpu", torch.float16):
        assert not in_bf16_on_cpu(x)


def test_few_rows_are_multiplied_in_float32() -> None:
    layer, plain = Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(layer.state_dict())
    few, many = torch.randn(2, FEW_ROWS // 2, 5), torch.randn(3, FEW_ROWS // 2, 5)
    with bf16():
        assert torch.equal(layer(many), plain(many))
        found, rounded = layer(few), plain(few)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plain(few).to(torch.bfloat16))
    assert not torch.equal(found, rounded)
    assert torch.equal(layer(few), plain(few))


@pytest.mark.parametrize("tokens", [FEW_ROWS, 3], ids=["many", "few"])
def test_an_mlp_in_bf16_is_its_layers_one_after_the_other(tokens: int) -> None:
    """Bit for bit forward; the gradients of weights are summed in float32 over parts, where torch rounds the whole."""
    ours = MLP(6, 24)
    plain = nn.Sequential(Linear(6, 24), nn.GELU(), Linear(24, 6))
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, tokens, 6).to(torch.bfloat16).requires_grad_()
    towards = torch.randn(4, tokens, 6).to(torch.bfloat16)
    outcomes = []
    for layer in (ours, plain):
        with bf16():
            y = layer(x)
        outcomes.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], towards)])
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for found, right in zip(*outcomes, strict=True):
        assert found.dtype == right.dtype
        torch.testing.assert_close(found, right, rtol=0.02, atol=0.02 * right.abs().max().item())


@pytest.mark.parametrize(("scans", "parts"), [(6, [3, 3]), (7, [4, 3]), (3, [3])])
def test_an_mlp_in_bf16_keeps_what_enters_it_and_takes_scans_in_equal_parts(
    scans: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = MLP(6, 24), torch.randn(scans, FEW_ROWS + 1, 6).to(torch.bfloat16)
    monkeypatch.setattr("unimiss_core.precision.HIDDEN_VALUES", 4 * (FEW_ROWS + 1) * 24)  # of four scans
    kept: list[Tensor] = []
    with bf16(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Products() as of:
        y = layer(x)
    assert {id(t) for t in kept} == {id(t) for t in (x, *layer.parameters())}
    torch.autograd.backward(y.float().sum())
    assert of.rows == [scans * (FEW_ROWS + 1) for scans in parts for _ in range(2)]


class Products(TorchDispatchMode):
    """Rows of each product with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.default:
            self.rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def test_a_head_is_in_float32_and_its_gradient_with_it() -> None:
    head = Head(4, 8, 5, 6)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(3, 4).to(torch.bfloat16)
    found: list[list[Tensor]] = []
    for enabled in (False, True):
        with bf16(enabled=enabled):
            h = head.bottleneck(features.float() if not enabled else features)
        found.append([h, *torch.autograd.grad(h.pow(3).sum(), list(head.mlp.parameters()))])
    assert all(map(torch.equal, *found))


def test_attention_in_bf16_rounds_its_outcome_alone() -> None:
    query, key, value = (torch.randn(2, 3, n, 8).to(torch.bfloat16) for n in (7, 4, 4))
    exact = attend(query.float(), key.float(), value.float())
    with bf16():
        found = attend(query, key, value)
    assert torch.equal(found, exact.to(torch.bfloat16))


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.of_shape: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, found.dtype) == (torch.float32, torch.bfloat16):
            self.of_shape[tuple(args[0].shape)] += 1
        return found


@pytest.mark.parametrize("recompute", [False, True])
def test_a_students_weights_are_cast_once_a_step_however_many_parts_it_has(recompute: bool) -> None:
    execution = Execution(precision="bf16", micro_batch={2: 1}, activation_checkpointing=recompute)
    learner = apart(Learner(study(), ranks={2}, execution=execution))
    shape = tuple(learner.student.backbone.encoder.stages[0].blocks[0].attention.query.weight.shape)
    layers = [tuple(p.shape) for p in learner.student.parameters()].count(shape)
    assert layers == 4  # with the attention's outcome, and the decoder's stage of as many tokens
    with Casts() as casts:
        learner.step(images(scans=3), step=0)
    # The decoder's two meet class tokens, few rows; a teacher's have no place in autocast's cache.
    assert casts.of_shape[shape] == 2 * (1 + 3)


@pytest.mark.parametrize("batch", [images(), volumes()], ids=["images", "volumes"])
def test_bf16_in_parts_is_nearly_the_whole_batch_and_autocast_ends_with_the_step(
    batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every product in bfloat16: else parts, which have fewer rows, would have fewer of them rounded."""
    monkeypatch.setattr("unimiss_core.precision.FEW_ROWS", 0)
    whole = apart(Learner(study(), ranks={2, 3}, execution=Execution(precision="bf16")))
    parts = Execution(precision="bf16", micro_batch={2: 1, 3: 1}, activation_checkpointing=True)
    ours = apart(Learner(study(), ranks={2, 3}, execution=parts))
    expected, report = whole.step(batch, step=0), ours.step(batch, step=0)
    assert not torch.is_autocast_enabled("cpu")
    assert report.terms == pytest.approx(expected.terms, rel=1e-4)
    assert report.diagnostics["grad_norm"] == pytest.approx(expected.diagnostics["grad_norm"], rel=5e-3)
    moments, right = ours.state().tensors, whole.state().tensors
    assert moments.keys() == right.keys()
    assert all(moments[name].dtype == torch.float32 for name in moments)


@pytest.mark.parametrize("batch", [images(), volumes()], ids=["images", "volumes"])
def test_few_rows_in_float32_leave_a_gradient_about_as_near_as_bfloat16_throughout(
    batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network that enlarges what is rounded, as a whole batch and in parts."""
    whole, parts = Execution(precision="bf16"), Execution(precision="bf16", micro_batch={2: 1, 3: 1})
    exact = gradient(Execution(), batch)
    off = [(gradient(execution, batch) - exact).norm() for execution in (whole, parts)]
    monkeypatch.setattr("unimiss_core.precision.FEW_ROWS", 0)
    throughout = (gradient(whole, batch) - exact).norm()
    assert max(off) <= 1.25 * throughout


def gradient(execution: Execution, batch: Tensor) -> Tensor:
    """All that a first step's gradient comes to, clipped, as one vector."""
    learner = apart(Learner(study(), ranks={2, 3}, execution=execution))
    learner.step(batch, step=0)
    moments = learner.state().tensors
    return torch.cat([moments[name].flatten() for name in sorted(moments) if name.startswith("adam_moment1")])


@pytest.mark.parametrize("size", [(5, 7), (3, 5, 7)], ids=["2d", "3d"])
def test_instance_norm_over_cells_is_instance_norm(size: tuple[int, ...]) -> None:
    """In the form that a GPU in bfloat16 gets, with gradients."""
    norm = INSTANCE_NORM[2 if len(size) == 2 else 3](4, affine=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for of in (norm.weight, norm.bias):
        nn.init.normal_(of, generator=generator)
    x = torch.randn(2, 4, *size, dtype=torch.float64, generator=generator).transpose(-1, -2).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    expected, ours = (
        [computed, *torch.autograd.grad(computed, [x, norm.weight, norm.bias], upstream)]
        for computed in (norm(x), _over_cells(x, norm))
    )
    torch.testing.assert_close(ours, expected)
