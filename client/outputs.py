"""Whether what a command will write can be written, before hours of work."""

import tempfile
from pathlib import Path

from unimiss_core.errors import ConfigError


def check_file(option: str, path: Path, *, must_be_new: bool = False) -> None:
    """Makes no folder yet. Raises ConfigError: `path` is a folder, or a file and must be new, or nothing can be written
    beside it."""
    try:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: is a folder; give the name of a file")
        if must_be_new and path.exists():
            raise ConfigError(f"{option} {path}: exists; give another name, or delete it first")
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror})") from None


def make_new_folder(option: str, path: Path) -> None:
    """Raises ConfigError: it holds something, or cannot be made."""
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{option} {path}: exists and is not empty; give a new folder")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror})") from None
