"""A simulation's labelled scans: read by the ordinary readers once, and kept as a coordinator takes them."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from client.cache import READING_VERSION
from client.patients import read_column, read_table
from client.phantoms import PhantomConfig
from client.reading import read_scans
from client.site_config import DataSource
from server.simulated_data import require_either_data_or_phantom, sources_of
from unimiss_core import durable, progress
from unimiss_core.config import Config, Name
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.plan import prepare
from unimiss_core.scan import Rank
from unimiss_core.study import PlanConfig, StudyConfig
from unimiss_core.views import whole


class SimulatedProbe(Config):
    """Labelled scans that no site trains on; read by the readers, then probed before and after the run."""

    name: Name
    data: tuple[DataSource, ...] = ()
    phantom: PhantomConfig | None = None
    rank: Rank
    label: str
    """Column of the table with the label; a scan whose label is empty is left out, and counted on the screen."""
    positive: tuple[str, ...] | None = None
    """Labels that count as positive, all others as negative; None keeps every label a class of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_either_data_or_phantom(self)
        return self


def probe_file(probe: SimulatedProbe, study: StudyConfig, base: Path, out: Path) -> Path:
    """Read the labelled scans once, through the ordinary readers, and keep them as the coordinator takes them. Raises
    ConfigError: `problems`, or there is no such scan."""
    if (path := _kept(probe, study, out)).exists():
        return path
    if found := list(problems(probe, study, base, out)):
        raise ConfigError("\n".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    progress.report(progress.Note(f"reading the labelled scans of {probe.name}"))
    scans, labels, patients = [], [], []
    for source in sources_of(probe, base, out):
        for patient, label, values in _labelled_scans(probe, source, study.plan):
            scans.append(whole(values, study.size_of(probe.rank)).numpy().astype(np.float16))
            labels.append(str(int(label in probe.positive)) if probe.positive else label)
            patients.append(patient)
    if not scans:
        raise ConfigError(f"probe '{probe.name}': no scan of rank {probe.rank} with a label in column '{probe.label}'")
    packed = io.BytesIO()
    np.savez(packed, scans=np.stack(scans), labels=np.array(labels), patients=np.array(patients))
    durable.write_bytes(path, packed.getvalue())
    return path


def problems(probe: SimulatedProbe, study: StudyConfig, base: Path, out: Path) -> Iterator[str]:
    """What folders and tables say against it, while no scan is read; nothing where its scans are kept already."""
    if probe.phantom is not None or _kept(probe, study, out).exists():
        return
    for source in sources_of(probe, base, out):
        if not source.folder.is_dir():
            yield f"probe '{probe.name}': {source.folder} is not a folder"
        if source.table is None:
            yield f"probe '{probe.name}': its folder needs a table with the column '{probe.label}'"
            continue
        try:
            read_column(source.table, probe.label)
            read_table(source.table)
        except ConfigError as error:
            yield f"probe '{probe.name}': {error}"


def _kept(probe: SimulatedProbe, study: StudyConfig, out: Path) -> Path:
    told = (READING_VERSION, probe.canonical(), study.plan.canonical(), study.views.canonical())
    settings = hashlib.sha256(" ".join(map(str, (*told, study.size_of(probe.rank)))).encode()).hexdigest()
    return out / "probe" / settings[:8] / f"{probe.name}.npz"


def _labelled_scans(
    probe: SimulatedProbe, source: DataSource, plan: PlanConfig
) -> Iterator[tuple[str, str, NDArray[np.float32]]]:
    """Patient, label and prepared values of each scan of the source; at its end, how many had no label is told."""
    assert source.table is not None  # or `problems` would have said so
    column = read_column(source.table, probe.label)
    count = unlabelled = 0
    for origin, scan in read_scans([source], plan):
        if scan.rank != probe.rank:
            continue
        count += 1
        below = PurePosixPath(origin.files[0])
        if not (label := next((column[name] for name in (below, *below.parents) if name in column), "")):
            unlabelled += 1  # by a row of its own or, of a series, of its folder
            continue
        try:
            yield origin.patient, label, prepare(scan, plan)[0]
        except ScanError as error:
            progress.report(progress.Note(f"{probe.name}: left out 1 {error.reason}"))
    if unlabelled:
        told = f"{unlabelled} of {count} scans of rank {probe.rank}, which have no label in column '{probe.label}'"
        progress.report(progress.Note(f"{probe.name}: left out {told}"))
