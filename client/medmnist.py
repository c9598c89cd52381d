"""MedMNIST's files: arrays by name in a zip archive, read without unpickling anything."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ConfigError


class Arrays:
    """The arrays of an open archive, each decoded when it is asked for."""

    def __init__(self, archive: Any, where: str) -> None:
        self._archive, self._where = archive, where

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Numbers, one item along the first axis for each scan. Raises ConfigError: there is no such array."""
        with _told(self._where):
            array = np.asarray(self._archive[name])
        if array.ndim == 0 or array.dtype.kind not in "biuf":
            raise ConfigError(f"{self._where}: {name} holds no list of numbers")
        return array


@contextmanager
def opened_arrays(file: Path, where: str) -> Iterator[Arrays]:
    """Its arrays. where: what the message calls the file. Raises ConfigError, as `Arrays` does: it is none, damaged,
    holds objects, or lacks an array that is asked for."""
    with _told(where):
        try:
            stream = file.open("rb")  # opened here, for numpy leaves a damaged one open
        except FileNotFoundError:
            raise ConfigError(f"{where}: {file.name} is not there; it counts from the data's root") from None
    with stream:
        with _told(where):
            archive: Any = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of several")
        with archive:
            yield Arrays(archive, where)


@contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, ConfigError):
        raise
    except Exception:  # zipfile, zlib, tokenize, ast: each of numpy's tools has errors of its own for what is damaged
        raise ConfigError(
            f"{where}: is no MedMNIST .npz with train_, val_ and test_images and _labels, or is damaged"
        ) from None


def who_takes(files: Iterable[str]) -> str:
    """What to say where files that are no scans are called as MedMNIST's; nothing where none is."""
    count = sum(file.lower().endswith(".npz") for file in files)
    return f"{count} .npz file(s): MedMNIST's are for `unimiss finetune` and `unimiss probe` alone" if count else ""
