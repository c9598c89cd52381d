"""A GPU that is lost in mid-round - an ECC error, one that fell off the bus, a kernel that went astray - where the
training runs in this process. torch raises an error of its own for it, often from a later operation than the culprit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import DeviceError, MemoryTooSmallError, first_line, where


@contextmanager
def told_by_kind(device: torch.device) -> Iterator[None]:
    """Raises DeviceError where the block fails because `device` is lost, MemoryTooSmallError where memory ran out that
    smaller parts of a batch did not give back; any other error is raised as it is."""
    try:
        yield
    except RuntimeError as error:
        told = f"{first_line(error)} ({where(error)})"
        if is_out_of_memory(error):
            raise MemoryTooSmallError(
                f"the memory of {device} ran out beside a step's own: {told}. Free it of other work, or in the site "
                "file lower micro_batch or set cuda_graphs to false"
            ) from None
        if not is_lost(error, device):
            raise
        raise DeviceError(f"{device} was lost in mid-round: {told}") from None


def is_lost(error: RuntimeError, device: torch.device) -> bool:
    """Whether nothing can be computed on `device` any more, by an error that came of it. What merely ran out of memory
    is not lost. cuBLAS and cuDNN say no more than that they failed, so then the device itself is asked."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as answer:
        return not is_out_of_memory(answer)
    return False
