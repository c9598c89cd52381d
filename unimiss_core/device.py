"""Which devices do the work."""

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from unimiss_core.errors import ConfigError, first_line

if TYPE_CHECKING:  # it takes seconds to import, and most who read a site file only have its names checked
    import torch

_NAME = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_ARCHITECTURE = re.compile(r"(sm|compute)_([0-9]+)([0-9])([af]?)")
_OUT_OF_MEMORY = re.compile(
    r"(?i:(can't|cannot|could not|failed to|unable to|tried to) allocate|not enough memory|out of memory)"
    r"|ALLOC_FAILED|ALLOCATION_FAILED"  # of cuBLAS and older cuDNN; of cuDNN 9, on the device and on the host
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate"  # which finds no room for its handle
)


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
    """`cpu`, `cuda`, `cuda:N`, or `auto`, which takes a GPU where there is one that torch can use.

    Raises ConfigError: no such device here, or torch cannot use it.
    """
    return devices_of([name])[0]


def devices_of(names: Sequence[str]) -> "list[torch.device]":
    """Each named device; `auto` takes every GPU that torch can use, or the CPU where there is none.

    The CPU may stand several times, for as many processes. Raises ConfigError: names that do not go together, a device
    that is not there or that torch cannot use.
    """
    import torch

    try:
        check_names(names)
    except ValueError as error:
        raise ConfigError(f"device {error}") from None
    if all(name == "cpu" for name in names):  # whether CUDA starts is none of its business
        return [torch.device("cpu") for _ in names]
    asked = ["cuda:0" if name == "cuda" else name for name in names]
    obstacles = gpu_obstacles(None if asked == ["auto"] else asked)
    gpus = [torch.device(name) for name, why in obstacles.items() if why is None]
    if asked == ["auto"]:
        return gpus or [torch.device("cpu")]
    if missing := [name for name, gpu in zip(names, asked, strict=True) if gpu not in obstacles]:
        there = ", ".join(["cpu", *map(str, gpus)])
        raise ConfigError(f"device {', '.join(missing)} is not on this machine, which has {there}")
    if whys := [f"device {gpu} cannot be used: {why}" for gpu in asked if (why := obstacles[gpu]) is not None]:
        raise ConfigError("; ".join(whys))
    return [torch.device(gpu) for gpu in asked]


def left_unused(names: Sequence[str]) -> dict[str, str]:
    """GPUs that `auto` leaves, with why; none where devices are named."""
    return {gpu: why for gpu, why in gpu_obstacles().items() if why is not None} if tuple(names) == ("auto",) else {}


def gpu_obstacles(asked: Collection[str] | None = None) -> dict[str, str | None]:
    """Each GPU that the driver counts -> in words why torch cannot use it, None where it can.

    asked: the only ones that are looked at; another may hang, or be somebody else's.

    What counts them (NVML) does so also where CUDA cannot start, and torch's wheels lack the programs for cards that
    are too old or too new for them, which shows at the first operation and not before.
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if gpus and not torch.cuda.is_available():
        return dict.fromkeys(gpus, "CUDA does not start, as with a driver too old for this torch; see nvidia-smi")
    return {gpu: _obstacle(gpu) if asked is None or gpu in asked else None for gpu in gpus}


def _obstacle(gpu: str) -> str | None:
    import torch

    try:
        capability = torch.cuda.get_device_capability(gpu)
    except _no_answer() as error:
        return f"it does not answer ({first_line(error)}); see nvidia-smi"
    has = torch.cuda.get_arch_list()
    if runs_on(capability, has):
        return None
    return (
        f"the installed torch has no programs for its architecture, sm_{capability[0]}{capability[1]}, "
        f"but for {', '.join(has)}; install one that has"
    )


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a card has programs among those that torch was compiled to, as `torch.cuda.get_arch_list` names them.

    sm_86 runs on cards of its major capability from its minor one on; compute_86 is compiled on any card from there on
    when it is first used; sm_90a is for that one capability, sm_100f for its major one. Where none is named so (ROCm,
    a torch for CPUs), nothing can be said against the card.
    """
    known = [found for each in architectures if (found := _ARCHITECTURE.fullmatch(each))]
    return not known or any(_has_programs(capability, *each.groups()) for each in known)


def _has_programs(capability: tuple[int, int], kind: str, major: str, minor: str, only: str) -> bool:
    least = (int(major), int(minor))
    if only == "a":
        return capability == least
    same_major = capability[0] == least[0] or (kind == "compute" and not only)
    return same_major and capability >= least


def memory_of(device: "torch.device") -> tuple[int, int]:
    """Bytes of a GPU that are free, and all. Raises ConfigError: it gives no answer, as where all is taken."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
    except _no_answer() as error:
        raise ConfigError(
            f"{device} cannot be used ({first_line(error)}); nvidia-smi shows what it lacks, or who holds it"
        ) from None
    return free, total


def _no_answer() -> tuple[type[Exception], ...]:
    """What torch raises where CUDA or one GPU fails: also where torch is for CPUs alone, or fewer GPUs start than the
    driver counts."""
    import torch

    return RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of whichever device.

    Torch has an error of its own for what its allocator does not find; CUDA, cuBLAS, cuDNN and the CPU's allocator say
    it by the first line of a RuntimeError alone. Further lines may be a compiler's, which may say anything.
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    by_kind = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # torch need not be loaded
    return by_kind or _OUT_OF_MEMORY.search(first_line(error)) is not None
