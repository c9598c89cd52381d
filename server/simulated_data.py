"""Where a simulation's scans are: folders that exist, or a phantom hospital, which is written first."""

from pathlib import Path
from typing import Protocol

from client.phantoms import PhantomConfig, write_hospital
from client.site_config import DataSource, TableConfig
from unimiss_core import durable, progress


class Entry(Protocol):
    """A site or a probe of a simulation's file."""

    @property
    def name(self) -> str: ...
    @property
    def data(self) -> tuple[DataSource, ...]: ...
    @property
    def phantom(self) -> PhantomConfig | None: ...


def require_either_data_or_phantom(entry: Entry) -> None:
    """Raises ValueError."""
    if bool(entry.data) == (entry.phantom is not None):
        raise ValueError(f"'{entry.name}': give either data (folders that exist) or phantom (a hospital to be written)")


def sources_of(entry: Entry, base: Path, out: Path) -> tuple[DataSource, ...]:
    """Where the entry's scans are, by absolute paths; a phantom hospital is written if it is not there yet.

    base: the folder that relative paths count from."""
    if entry.phantom is None:
        return tuple(anchored(source, base) for source in entry.data)
    folder = out / "hospitals" / f"{entry.name}-{entry.phantom.digest()[:8]}"
    if not folder.exists():
        progress.report(progress.Note(f"writing {entry.phantom.patients} synthetic patients of {entry.name}"))
        with durable.new_folder(folder) as partial:
            write_hospital(entry.phantom, partial)
    return (DataSource(folder=folder, table=TableConfig(path=folder / "labels.csv", patient="patient")),)


def anchored(source: DataSource, base: Path) -> DataSource:
    table = source.table and source.table.model_copy(update={"path": (base / source.table.path).resolve()})
    return source.model_copy(update={"folder": (base / source.folder).resolve(), "table": table})
