"""What single operations of a step cost on a CPU, as a plain reading has them and as ours are: forward and backward.

    python -m benchmarks.operations --threads 1 [--repeats 15] [--json FILE]

Shapes are those of `benchmarks/step.py`: tiny, 65,536 prototypes, two views of two volumes of 16x96x96 or of four
images of 224x224. The two ways of an operation take turns in one process; medians of what the processor took.
tests/test_operations_benchmark.py holds each pair to one outcome and the same gradients.

Legend of shapes: as in the modules that are measured.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.side_by_side import WARM_UP, count, machine
from unimiss_core.convolution import EnlargingConv2d, GreyConv3d, GreyOrColourConv2d, ReducingConv2d
from unimiss_core.head import Prototypes
from unimiss_core.layers import Block, attend

Operation = Callable[..., Tensor]
LayerT = TypeVar("LayerT", bound=nn.Module)


@dataclass(frozen=True)
class Pair:
    """Two ways to one outcome.

    of: what both are given. layer: whose parameters both use, if any. bf16: under autocast.
    """

    plain: Operation
    ours: Operation
    of: tuple[Tensor, ...]
    layer: nn.Module | None = None
    bf16: bool = False

    def outcome(self, operation: Operation) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return operation(*self.of)

    def gradients(self, outcome: Tensor, of_outcome: Tensor) -> tuple[Tensor, ...]:
        """Of what is given and asks for one, then of the layer's parameters."""
        leaves = [*(x for x in self.of if x.requires_grad), *(self.layer.parameters() if self.layer else ())]
        return torch.autograd.grad(outcome, leaves, of_outcome)


def prototypes() -> Pair:
    """Eight rows, two views of two volumes and of their slices; beside weight normalisation as published, torch's."""
    return _beside(lambda weight: torch._weight_norm(weight, torch.ones_like(weight[:, :1]), 0))


def prototypes_normalised() -> Pair:
    """Beside a matrix that is made of unit rows."""
    return _beside(lambda weight: F.normalize(weight, dim=1))


def mean_of_slices() -> Pair:
    """Of four volumes, before the prototypes and not behind them."""
    layer = _drawn(Prototypes(256, 65_536))
    return Pair(lambda h: layer(h).mean(1), lambda h: layer(h.mean(1)), (_unit((4, 16, 256)),), layer)


def class_token_alone() -> Pair:
    """The last block, of which nothing but the class token is read."""
    layer = _drawn(Block(48, 1, 6, qkv_bias=False, norm_eps=1e-5, ranks=[2]))
    grid = torch.Size((56, 56))
    tokens = _given((8, 1 + grid.numel(), 48))
    return Pair(lambda x: layer(x, grid)[:, :1], lambda x: layer(x, grid, class_only=True), (tokens,), layer)


def grey_images() -> Pair:
    layer = _drawn(GreyOrColourConv2d(3, 32, 7, 2, padding=3, bias=False))
    return Pair(lambda x: layer(x.expand(-1, 3, -1, -1)), layer, (torch.rand(8, 1, 224, 224),), layer)


def attention() -> Pair:
    """Of the slices, in the decoder's second stage: 145 queries, ten keys are left."""
    of = tuple(_given((64, 4, n, 32), torch.bfloat16) for n in (145, 10, 10))
    return Pair(F.scaled_dot_product_attention, attend, of, bf16=True)


def reduction_of_keys() -> Pair:
    """Of the slices, in the first stage."""
    layer = _drawn(ReducingConv2d(48, 48, 6, 6))
    return _convolution(layer, F.conv2d, (64, 48, 24, 24))


def doubling() -> Pair:
    """Of the slices, in the decoder's last stage."""
    layer = _drawn(EnlargingConv2d(128, 48, 2, 2))
    return _convolution(layer, F.conv_transpose2d, (64, 128, 12, 12))


def stem_of_volumes() -> Pair:
    layer = _drawn(GreyConv3d(1, 32, 7, (1, 2, 2), padding=3, bias=False))
    return _convolution(layer, F.conv3d, (4, 1, 16, 96, 96), asks=False)


def coarsest_grid_of_volumes() -> Pair:
    """36 windows."""
    layer = _drawn(GreyConv3d(256, 512, 3, 2, padding=1, bias=False))
    return _convolution(layer, F.conv3d, (4, 256, 2, 6, 6))


def coarsest_grid_of_slices() -> Pair:
    """288 windows, with views in turn."""
    layer = _drawn(GreyOrColourConv2d(256, 512, 3, 2, padding=1, bias=False))
    return _convolution(layer, F.conv2d, (32, 256, 6, 6))


PAIRS: Mapping[str, Callable[[], Pair]] = {
    "prototypes; plain: weight_norm": prototypes,
    "prototypes; plain: F.normalize": prototypes_normalised,
    "mean of slices": mean_of_slices,
    "last block, class token alone": class_token_alone,
    "stem of grey images": grey_images,
    "bf16: attention": attention,
    "bf16: reduction of keys": reduction_of_keys,
    "bf16: doubling": doubling,
    "bf16: stem of volumes": stem_of_volumes,
    "bf16: coarsest grid of volumes": coarsest_grid_of_volumes,
    "bf16: coarsest grid of slices": coarsest_grid_of_slices,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--repeats", type=count, default=15, help=f"after {WARM_UP} (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    print("| forward and backward | plain, ms | ours, ms | |\n|---|---|---|---|")
    for row in measured(options.repeats):
        rows.append(row)
        plain, ours = row["plain_s"], row["ours_s"]
        print(f"| {row['operation']} | {plain * 1e3:.1f} | {ours * 1e3:.1f} | {plain / ours:.2f}x |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": rows}, indent=2) + "\n")


def measured(repeats: int) -> Iterator[dict[str, Any]]:
    """By operation, medians of processor seconds by the number of threads; only one pair is held at a time."""
    for name, build in PAIRS.items():
        torch.manual_seed(0)
        pair = build()
        of_outcome = torch.randn_like(pair.outcome(pair.ours))
        taken: dict[str, list[float]] = {"plain_s": [], "ours_s": []}
        for _ in range(WARM_UP + repeats):
            for way, operation in (("plain_s", pair.plain), ("ours_s", pair.ours)):
                began = time.process_time()
                outcome = pair.outcome(operation)
                pair.gradients(outcome, of_outcome.to(outcome.dtype))
                taken[way].append((time.process_time() - began) / torch.get_num_threads())
        yield {"operation": name, **{way: median(seconds[WARM_UP:]) for way, seconds in taken.items()}}


def _convolution(layer: Any, function: Operation, shape: tuple[int, ...], *, asks: bool = True) -> Pair:
    """A layer beside torch's own function of its parameters, in bf16. asks: whether its input has a gradient."""

    def plain(x: Tensor) -> Tensor:
        return function(x, layer.weight, layer.bias, layer.stride, layer.padding)

    x = _given(shape, torch.bfloat16) if asks else torch.rand(shape)
    return Pair(plain, layer, (x,), layer, bf16=True)


def _beside(unit_rows: Callable[[Tensor], Tensor]) -> Pair:
    layer = _drawn(Prototypes(256, 65_536))
    return Pair(lambda h: F.linear(h, unit_rows(layer.weight)), layer, (_unit((8, 256)),), layer)


def _drawn(layer: LayerT) -> LayerT:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def _given(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _unit(shape: tuple[int, ...]) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1).requires_grad_()


if __name__ == "__main__":
    main()
