from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from tests.published import SIZES, Published, golden, needs_reference, network
from unimiss_core import gathering
from unimiss_core.head import Head, Prototypes
from unimiss_core.prototypes_gradient import PrototypesGradient


def head() -> Head:
    torch.manual_seed(0)
    made = Head(width=6, hidden=10, bottleneck=5, prototypes=7)
    torch.nn.init.normal_(made.prototypes.weight)
    return made.double()


@needs_reference
@pytest.mark.parametrize("size", SIZES)
def test_logits_are_the_published_ones(size: Published) -> None:
    made, expected = network(size, "").head, golden(size)
    with torch.no_grad():
        for rank in ("2d", "3d"):
            logits = made(expected[f"features{rank}"])
            torch.testing.assert_close(logits, expected[f"head{rank}"], atol=1e-5, rtol=0)


def test_a_bottleneck_has_length_one() -> None:
    lengths = torch.linalg.vector_norm(head().bottleneck(torch.randn(4, 6, dtype=torch.float64)), dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_prototypes_are_the_product_with_normalised_rows_in_value_and_gradient() -> None:
    prototypes = head().prototypes
    h = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    explicit = h @ (prototypes.weight / prototypes.weight.square().sum(1, keepdim=True).sqrt()).T
    torch.testing.assert_close(prototypes(h), explicit)
    ours = torch.autograd.grad(prototypes(h).pow(3).sum(), [h, prototypes.weight])
    theirs = torch.autograd.grad(explicit.pow(3).sum(), [h, prototypes.weight])
    torch.testing.assert_close(ours, theirs)


def test_the_length_of_a_prototype_does_not_matter() -> None:
    prototypes = head().prototypes
    h = torch.randn(3, 5, dtype=torch.float64)
    before = prototypes(h)
    with torch.no_grad():
        prototypes.weight.mul_(torch.arange(1.0, 8.0, dtype=torch.float64)[:, None])
    torch.testing.assert_close(prototypes(h), before)


def test_the_logits_of_a_mean_are_the_mean_of_the_logits() -> None:
    prototypes = head().prototypes
    h = torch.randn(2, 11, 5, dtype=torch.float64)
    torch.testing.assert_close(prototypes(h.mean(1)), prototypes(h).mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap of an in-place product, here only
def test_prototypes_have_per_sample_gradients() -> None:
    prototypes = Prototypes(5, 7)
    torch.nn.init.normal_(prototypes.weight)
    weights = {"weight": prototypes.weight.detach()}
    h = torch.randn(3, 5)

    def cost(tensors: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(prototypes, tensors, (row,))
        return logits.square().sum()

    together = torch.func.vmap(torch.func.grad(cost), in_dims=(None, 0))(weights, h)["weight"]
    one_by_one = torch.stack([torch.func.grad(cost)(weights, row)["weight"] for row in h])
    torch.testing.assert_close(together, one_by_one)


PARTS = (2, 1, 4)
"""Samples of each; together their rows would take more memory than a small layer's gradient."""


def parts_of_a_batch() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3, 6, generator=generator, dtype=torch.float64) for rows in PARTS]


@contextmanager
def gathered(made: Head) -> Iterator[list[gathering.GatheredGradient]]:
    """Of the prototypes, then of the three layers."""
    layers = [layer for layer in made.modules() if isinstance(layer, gathering.Gathers)]
    with made.gathering() as prototypes, gathering.gathered_by(layers) as others:
        yield [prototypes, *others]


def test_gathered_gradients_are_those_of_all_parts() -> None:
    plain, ours = head(), head()
    for _ in range(2):  # the second adds to the first
        for features in parts_of_a_batch():
            torch.autograd.backward(plain(features).pow(3).sum())
        with gathered(ours) as gradients:
            for features in parts_of_a_batch():
                torch.autograd.backward(ours(features).pow(3).sum())
        assert len(gradients) == 4
        for gradient in gradients:
            gradient.write()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_blocks_of_a_gathered_gradient_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "BLOCK_VALUES", 3 * 5 + 2)
    plain, ours = head(), head()
    with gathered(ours) as gradients:
        for features in parts_of_a_batch():
            torch.autograd.backward(plain(features).pow(3).sum())
            torch.autograd.backward(ours(features).pow(3).sum())
    assert [(rows.start, len(block)) for rows, block in gradients[0].blocks()] == [(0, 3), (3, 3), (6, 1)]
    matrices = [plain.prototypes.weight, *(p for p in plain.mlp.parameters() if p.ndim == 2)]
    for gradient, expected in zip(gradients, matrices, strict=True):
        assert expected.grad is not None
        assert gradient.weight.grad is None
        torch.testing.assert_close(torch.cat([block for _, block in gradient.blocks()]), expected.grad)
        torch.testing.assert_close(gradient.norm(), expected.grad.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_of_few_rows_is_that_of_the_gradient_which_they_make(dtype: torch.dtype) -> None:
    """Rows nearly along the prototypes, where most of each product is taken off again."""
    prototypes = Prototypes(6, 300).to(dtype)
    torch.nn.init.normal_(prototypes.weight, mean=2.0)
    prototypes.gathered = gradient = PrototypesGradient(prototypes.weight)
    for rows in (1, 3):
        h = torch.nn.functional.normalize(torch.randn(rows, 6, dtype=dtype) + 2.0, dim=-1)
        torch.autograd.backward(prototypes(h.requires_grad_()).pow(3).sum())
    assert gradient._products._whole is None
    norm = gradient.norm()
    assert norm.dtype == dtype
    torch.testing.assert_close(norm, torch.cat([block for _, block in gradient.blocks()]).norm())
    gradient._along[0] = torch.nan
    assert gradient.norm().isnan()


def test_rows_that_cancel_have_a_length_that_is_a_number() -> None:
    for seed in range(20):  # of which rounding leaves some below nothing
        left = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
        right = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed + 100))
        products = gathering.OuterProducts(torch.empty(50, 40))
        products.add(torch.cat([left, -left]), torch.cat([right, right * (1 + 1e-7)]))
        assert products.are_rows
        length = products.square_norm().sqrt().item()
        assert 0 <= length <= 1e-3 * (left.norm() * right.norm()).item()


def test_few_rows_stay_rows_and_many_become_their_product() -> None:
    """What is kept never holds more values than the product."""
    generator = torch.Generator().manual_seed(0)
    products, expected = gathering.OuterProducts(torch.empty(8, 6)), torch.zeros(8, 6)
    for rows in (1, 2, 3, 1, 1):
        left, right = torch.randn(rows, 8, generator=generator), torch.randn(rows, 6, generator=generator)
        products.add(left, right)
        expected += left.T @ right
        held = [*products._left, *products._right] + ([] if products._whole is None else [products._whole])
        assert sum(tensor.numel() for tensor in held) <= 2 * expected.numel()
        torch.testing.assert_close(products.rows(slice(2, 5)), expected[2:5])
        torch.testing.assert_close(products.rows(slice(None)), expected)


def test_no_gradient_is_given_where_a_part_fails() -> None:
    made = head()
    features = torch.rand(2, 6, dtype=torch.float64)
    matrices = [p for p in made.parameters() if p.ndim == 2]
    with suppress(RuntimeError), gathered(made):
        torch.autograd.backward(made(features).sum())
        raise RuntimeError("out of memory")
    assert [p.grad for p in matrices] == [None] * 4
    torch.autograd.backward(made(features).sum())
    assert None not in [p.grad for p in matrices]
