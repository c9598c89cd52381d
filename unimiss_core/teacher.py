"""The teacher: an exponential moving average of the student, in a step and over rounds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unimiss_core.stretches import stretches


def advance_teacher(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], retention: Mapping[str, float]
) -> dict[str, Tensor]:
    """teacher <- m teacher + (1 - m) student for each tensor, m = `retention[name]`; m = 1 leaves it bit for bit.
    student: of any float type that float32 holds.

    Between rounds coordinator and sites call this on the same released values, so that a site can rebuild the
    global teacher instead of receiving it. It is the cheap form of averaging the sites' teachers: EMA is linear, so
    the mean of teachers is the EMA of the mean student path, here with that path replaced by its end.

    In operations that IEEE 754 rounds alike everywhere: `torch.lerp`, and `alpha` of `add_`, fuse them on some
    processors and not on others.
    """
    return {
        name: before if (kept := retention[name]) == 1.0 else _advanced(before, student[name], kept)
        for name, before in teacher.items()
    }


def _advanced(before: Tensor, towards: Tensor, kept: float) -> Tensor:
    """kept before + (1 - kept) towards, of any float type, as `before` is."""
    after = torch.empty_like(before, memory_format=torch.contiguous_format)
    for result, old, new in stretches(after, before, towards):
        torch.mul(old, kept, out=result).add_(new.to(old.dtype) * (1.0 - kept))
    return after
