"""Which device does the work."""

import torch

from unimiss_core.errors import ConfigError


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto`, which takes a GPU where there is one.

    Raises ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device '{name}': is not there; give auto, cpu, cuda or cuda:N") from None
    return device
