"""How a step is computed, not what it computes: device, precision, and what is traded between memory and time.

Every setting here gives the same loss and the same gradients up to rounding, and none changes a parameter's name.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unimiss_core.backbone import Backbone
from unimiss_core.layers import Block, ConvBlock
from unimiss_core.scan import Rank

Precision = Literal["fp32", "bf16"]

COMPILER = "inductor"
"""torch.compile's backend: it needs a C++ compiler on a CPU, Triton on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a site's hardware asks for.

    precision: bf16 runs the networks in bfloat16; losses, centre, norms, weights and their averages stay float32, and
        on a CPU what does not gain by it (`unimiss_core.precision`).
    views_in_turn: go backward from one view of volumes before looking at the next (`unimiss_core.objective.in_turn`).
    activation_checkpointing: keep less of the student's forward pass, and compute it again in the backward pass; and
        take views in turn.
    compile: compile both backbones; where that fails, the step is computed without.
    micro_batch: most scans in one forward pass, by rank; a larger batch is met in parts, with the same outcome.
    patients_at_once: in private steps, most patients whose gradients are worked out together.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    views_in_turn: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    micro_batch: Mapping[Rank, int] = field(default_factory=dict)
    patients_at_once: int = 1

    @property
    def in_pieces(self) -> bool:
        """Whether volumes' views are taken in turn."""
        return self.views_in_turn or self.activation_checkpointing


PLAIN = Execution()
"""In float32 on the CPU, each batch as a whole."""


def checkpoint_activations_(backbone: Backbone) -> None:
    """Recompute the fine grids' convolution and transformer blocks in the backward pass; keep what enters them.

    Four fifths of the kept bytes are of MiT's stem, its first two stages and its last two, whose grids are fine; the
    others would give little memory for their time. Nothing inside is random, so no random state is kept. A forward
    pass without gradients is as it was.
    """
    for module in nn.ModuleList(backbone.fine).modules():
        if isinstance(module, ConvBlock | Block):
            module.forward = partial(  # type: ignore[method-assign]
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


def compile_(backbone: Backbone) -> None:
    """Compile the forward pass, when first called. One program serves all batches of a size of scan.

    The other axes are fixed: position tables, odd grids and the reduction of keys differ with them.
    """
    compiled = torch.compile(backbone.forward, backend=COMPILER)

    def forward(x: Tensor) -> Tensor:
        x = x.clone()  # what x is a view of would be looked at too: a single scan would get a program of its own
        torch._dynamo.maybe_mark_dynamic(x, 0)
        for axis in range(1, x.ndim):
            torch._dynamo.mark_static(x, axis)
        class_token: Tensor = compiled(x)
        return class_token

    backbone.forward = forward  # type: ignore[method-assign]


def uncompile_(backbone: Backbone) -> None:
    """Undo `compile_`."""
    del backbone.forward


@contextmanager
def out_of_memory_by_its_name() -> Iterator[None]:
    """Raise torch.OutOfMemoryError too where it is cuBLAS, cuDNN or the CPU's allocator that finds no memory: they say
    so in a RuntimeError's text alone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in ("ALLOC_FAILED", "can't allocate memory")):
            raise
        raise torch.OutOfMemoryError("out of memory, told by a library") from None
