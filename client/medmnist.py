"""MedMNIST's files: arrays by name in a zip archive, read without unpickling anything."""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimiss_core.errors import ConfigError


@contextmanager
def opened_arrays(file: Path, where: str) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Its arrays, each decoded when it is asked for.

    where: what the message calls the file. Raises ConfigError: it is none, damaged, holds objects, or lacks an array
    that is asked for.
    """
    try:
        with file.open("rb") as stream:  # opened here, for numpy leaves a damaged one open
            archive: Any = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of several")
            with archive:
                yield archive
    except FileNotFoundError:
        raise ConfigError(f"{where}: {file.name} is not there; it counts from the data's root") from None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ConfigError(
            f"{where}: is no MedMNIST .npz with train_, val_ and test_images and _labels, or is damaged"
        ) from None
