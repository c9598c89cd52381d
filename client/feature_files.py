"""Features of scans as files, written as they come: memory does not grow with their number.

FILE.npz      features (N, width) float32, ranks (N,), and of a folder keys (N,), perhaps files (N,)
FILE.parquet  the same as columns feature (a list of float32), rank, key, file; the one file that knows pyarrow

Both appear whole or not at all.
"""

import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from unimiss_core import durable
from unimiss_core.errors import ConfigError
from unimiss_core.extras import way_to

ENDINGS = (".npz", ".parquet")
_IN_ONE_GROUP = 4096
"""Rows of a parquet file that are compressed together."""

Labels = Mapping[str, Sequence[Any]]
"""`rank`, and perhaps `key` and `file`, of each scan of a batch."""


class FeatureFile(Protocol):
    def add(self, features: NDArray[np.float32], labels: Labels) -> None:
        """features (n, width) of the next scans; each batch has the same labels. Raises OSError."""

    def finish(self) -> None:
        """Put the file into its place. Raises OSError."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None:
        """Nothing half written stays."""


def check_ending(path: Path) -> None:
    """Raises ConfigError: no file of these, or what it needs is not installed."""
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--out {path}: the result is an {ENDINGS[0]} or a {ENDINGS[1]} file; give it that ending")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"--out {path}: pyarrow must be installed for parquet: {way_to('parquet')}; "
            "or give a name that ends in .npz"
        )


def feature_file(path: Path) -> FeatureFile:
    """As the name's ending says; the folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return _Parquet(path) if path.suffix == ".parquet" else _Npz(path)


class _File:
    """What both have: a file beside the last one, which takes its name at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(path.name + durable.PARTIAL)
        self.open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()
        self.partial.unlink(missing_ok=True)

    def put_into_place(self) -> None:
        durable.sync(self.partial)
        self.partial.replace(self.path)
        durable.sync_folder(self.path.parent)


class _Npz(_File):
    """Features wait in a file without a name: an array's header says how long it is."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._features: IO[bytes] = self.open.enter_context(tempfile.TemporaryFile(dir=path.parent))  # noqa: SIM115
        self._width = 0
        self._labels: dict[str, list[Any]] = {}

    def add(self, features: NDArray[np.float32], labels: Labels) -> None:
        self._width = features.shape[1]
        self._features.write(np.ascontiguousarray(features, dtype=np.float32).data)
        for name, values in labels.items():
            self._labels.setdefault(name, []).extend(values)

    def finish(self) -> None:
        count = len(self._labels["rank"])
        with zipfile.ZipFile(self.partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                described = {"descr": "<f4", "fortran_order": False, "shape": (count, self._width)}
                npy.write_array_header_1_0(member, described)
                self._features.seek(0)
                shutil.copyfileobj(self._features, member)
            for name, values in self._labels.items():
                with archive.open(f"{name}s.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, np.array(values), allow_pickle=False)
        self.put_into_place()


class _Parquet(_File):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._writer: Any = None
        self._waiting: list[tuple[NDArray[np.float32], Labels]] = []

    def add(self, features: NDArray[np.float32], labels: Labels) -> None:
        self._waiting.append((features, labels))
        if sum(len(rows) for rows, _ in self._waiting) >= _IN_ONE_GROUP:
            self._write()

    def finish(self) -> None:
        self._write()
        self.open.close()
        self.put_into_place()

    def _write(self) -> None:
        """The rows that wait, as one group."""
        import pyarrow
        from pyarrow import parquet

        if not self._waiting:
            return
        features = np.concatenate([rows for rows, _ in self._waiting])
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1])
        columns = {"feature": column}
        for name in self._waiting[0][1]:
            values = [value for _, labels in self._waiting for value in labels[name]]
            columns[name] = pyarrow.array(values, pyarrow.int8() if name == "rank" else pyarrow.string())
        table = pyarrow.table(columns)
        if self._writer is None:
            self._writer = self.open.enter_context(parquet.ParquetWriter(self.partial, table.schema))
        self._writer.write_table(table)
        self._waiting = []
