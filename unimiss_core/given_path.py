"""A path as a configuration file gives it."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def _possible(path: Path) -> Path:
    """Python raises ValueError, and no OSError, wherever such a path is used."""
    if "\0" in str(path):
        raise ValueError("no path holds a zero byte")
    return path


GivenPath = Annotated[Path, AfterValidator(_possible)]
"""What a `Config` has for every path; that it leads somewhere is for who uses it."""
