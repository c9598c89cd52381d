"""Which devices do the work."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unimiss_core.errors import ConfigError

if TYPE_CHECKING:  # it takes seconds to import, and most who read a site file only have its names checked
    import torch

_NAME = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: names that no machine could serve together. Whether this one can is not asked."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{name}' is no device's name; give auto, cpu, cuda, or cuda: and a number, as in cuda:1")
    if "auto" in names and len(names) > 1:
        raise ValueError(f"{', '.join(names)}: auto stands alone, for it takes every GPU, or the CPU")
    gpus = ["cuda:0" if name == "cuda" else name for name in names if name.startswith("cuda")]
    if len(set(gpus)) < len(gpus) or 0 < len(gpus) < len(names):
        raise ValueError(
            f"{', '.join(names)}: give each GPU once and no CPU beside it; the CPU alone may stand more often"
        )


def device_of(name: str) -> "torch.device":
    """`cpu`, `cuda`, `cuda:N`, or `auto`, which takes a GPU where there is one.

    Raises ConfigError: no such device here.
    """
    return devices_of([name])[0]


def devices_of(names: Sequence[str]) -> "list[torch.device]":
    """Each named device; `auto` takes every GPU, or the CPU where there is none.

    The CPU may stand several times, for as many processes. Raises ConfigError: names that do not go together, a device
    that is not there.
    """
    import torch

    try:
        check_names(names)
    except ValueError as error:
        raise ConfigError(f"device {error}") from None
    count = torch.cuda.device_count()  # counting claims no memory there
    gpus = [torch.device("cuda", index) for index in range(count)]
    if tuple(names) == ("auto",):
        return gpus or [torch.device("cpu")]
    present = {"cpu": torch.device("cpu"), **({"cuda": gpus[0]} if gpus else {}), **{str(gpu): gpu for gpu in gpus}}
    if missing := [name for name in names if name not in present]:
        there = ", ".join(["cpu", *map(str, gpus)])
        raise ConfigError(f"device {', '.join(missing)} is not on this machine, which has {there}")
    return [present[name] for name in names]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whichever device; torch says so by a RuntimeError and its text."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))
