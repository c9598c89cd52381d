"""How a step is computed, not what it computes: device, precision, and what is traded between memory and time.

Every setting here gives the same loss and the same gradients up to rounding, and none changes a parameter's name.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unimiss_core.backbone import Backbone
from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import first_line
from unimiss_core.layers import Block, ConvBlock
from unimiss_core.scan import Rank

Precision = Literal["fp32", "bf16"]

COMPILER = "inductor"
"""torch.compile's backend: it needs a C++ compiler on a CPU, Triton on a GPU."""

_PROGRAMS = 256
"""Of one kind of block, at most: of each stage, rank, network and number of scans."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a site's hardware asks for.

    precision: bf16 runs the networks in bfloat16; losses, centre, norms, weights and their averages stay float32, and
        on a CPU what does not gain by it (`unimiss_core.precision`).
    views_in_turn: go backward from one view of volumes before looking at the next (`unimiss_core.objective.in_turn`).
    activation_checkpointing: keep less of the student's forward pass, and compute it again in the backward pass; and
        take views in turn.
    compile: compile both backbones' fine blocks; where that fails, the step is computed without.
    cuda_graphs: on a GPU record each rank's steps and launch each as one (`unimiss_core.step_graphs`); where that
        fails, they are launched one operation after the other.
    micro_batch: most scans in one forward pass, by rank; a larger batch is met in parts, with the same outcome.
    patients_at_once: in private steps, most patients whose gradients are worked out together.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    views_in_turn: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = True
    micro_batch: Mapping[Rank, int] = field(default_factory=dict)
    patients_at_once: int = 1

    @property
    def in_pieces(self) -> bool:
        """Whether volumes' views are taken in turn."""
        return self.views_in_turn or self.activation_checkpointing


PLAIN = Execution()
"""In float32 on the CPU, each batch as a whole."""


def set_up_blocks_(backbone: Backbone, *, compiled: bool = False, recomputed: bool = False) -> None:
    """How the convolution and transformer blocks of the fine grids work, in place of how they did: of MiT's stem, its
    first two stages and its last two.

    There most of the time goes, and four fifths of the bytes that a forward pass keeps; the others would give little
    for their time. A forward pass without gradients is recomputed by nobody.

    compiled: each when it is first called on scans of some size, and as many of them, within `compiling`. All blocks of
    a stage share their programs. The whole backbone as one program took several times as long to compile, and so did
    programs for any number of scans (docs/LOG.md).
    recomputed: in the backward pass, from what entered them. Nothing inside is random, so no random state is kept.
    """
    for block in nn.ModuleList(backbone.fine).modules():
        if not isinstance(block, ConvBlock | Block):
            continue
        vars(block).pop("forward", None)
        forward = block.forward
        if compiled:
            forward = torch.compile(forward, backend=COMPILER, dynamic=False)
        if recomputed:
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if compiled or recomputed:
            block.forward = forward  # type: ignore[method-assign]


@contextmanager
def compiling() -> Iterator[None]:
    """Around passes through blocks that are compiled: torch stops at 8 programs of one kind of block, and warns of what
    its compiler looks at."""
    with torch._dynamo.config.patch(recompile_limit=_PROGRAMS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


@contextmanager
def out_of_memory_by_its_name() -> Iterator[None]:
    """Raise torch.OutOfMemoryError too where it is not torch's allocator that finds no memory (`is_out_of_memory`)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"out of memory, told by a library: {first_line(error)}") from None
