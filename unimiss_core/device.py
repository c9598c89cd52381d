"""Which devices do the work."""

from collections.abc import Sequence

import torch

from unimiss_core.errors import ConfigError


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto`, which takes a GPU where there is one.

    Raises ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    index = device.index or 0
    if device.type == "cuda" and index < torch.cuda.device_count():  # counting claims no memory there
        return torch.device("cuda", index)
    if device.type == "cpu":
        return torch.device("cpu")
    raise ConfigError(f"device '{name}': is not there; give auto, cpu, cuda or cuda:N")


def devices_of(names: Sequence[str]) -> list[torch.device]:
    """Each named device; `auto` alone takes every GPU, or the CPU where there is none.

    The CPU may stand several times, for as many processes. Raises ConfigError: a device that is not there, a GPU that
    stands twice, GPUs beside the CPU.
    """
    if tuple(names) == ("auto",) and (count := torch.cuda.device_count()):
        return [torch.device("cuda", index) for index in range(count)]
    devices = [device_of(name) for name in names]
    gpus = [device for device in devices if device.type == "cuda"]
    if len(set(gpus)) < len(gpus) or 0 < len(gpus) < len(devices):
        raise ConfigError(
            f"devices {', '.join(names)}: give each GPU once and no CPU beside it; the CPU alone may stand more often"
        )
    return devices
