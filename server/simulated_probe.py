"""A simulation's labelled scans: read by the ordinary readers once, and kept as a coordinator takes them."""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.cache import READING_VERSION
from client.patients import read_column, read_table
from client.phantoms import PhantomConfig
from client.reading import Reading
from client.site_config import DataSource
from server.simulated_data import require_either_data_or_phantom, sources_of
from server.simulated_overlap import shared_patients
from unimiss_core import durable, progress
from unimiss_core.config import Config, Name
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.label_counts import class_counts, counts_in_words
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
    """Labels that count as positive; None keeps every label a class of its own."""
    negative: Annotated[tuple[str, ...] | None, Field(exclude_if=lambda labels: labels is None)] = None
    """Labels that count as negative; scans with neither are left out, and counted on the screen. None: all but the
    positive ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_either_data_or_phantom(self)
        if self.negative is not None and self.positive is None:
            raise ValueError("negative has no meaning without positive; leave it out, or say which labels are positive")
        if both := set(self.positive or ()) & set(self.negative or ()):
            raise ValueError(f"positive and negative both hold '{min(both)}'; a label is one of the two")
        return self

    def class_of(self, label: str) -> str | None:
        """What the scans of this label are of; None: left out."""
        if self.positive is None:
            return label
        if label in self.positive:
            return "1"
        return "0" if self.negative is None or label in self.negative else None


class _Labelled(NamedTuple):
    """A scan of the probe. paths: its files. patient: the key by the secret of this reading."""

    paths: tuple[Path, ...]
    patient: str
    label: str
    values: NDArray[np.float32]


def probe_file(
    probe: SimulatedProbe, study: StudyConfig, base: Path, out: Path, *, sites: Mapping[str, Path] = {}
) -> Path:
    """Read the labelled scans once, through the ordinary readers, and keep them as the coordinator takes them.

    sites: name -> site file of those that are looked through for the probe's patients, who are counted on the screen.
    Raises ConfigError: `problems`, or there is no such scan.
    """
    if (path := _kept(probe, study, out)).exists():
        return path
    if found := list(problems(probe, study, base, out)):
        raise ConfigError("\n".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    progress.report(progress.Note(f"reading the labelled scans of {probe.name}"))
    scans, classes, patients, used = [], [], [], []
    labels = list[tuple[str, str]]()
    for source in (sources := sources_of(probe, base, out)):
        for scan in _labelled_scans(probe, source, study.plan):
            labels.append((scan.label, scan.patient))
            if (kind := probe.class_of(scan.label)) is not None:
                scans.append(whole(scan.values, study.size_of(probe.rank)).numpy().astype(np.float16))
                classes.append(kind)
                patients.append(scan.patient)
                used.append(scan.paths)
    _tell_of_labels(probe, labels)
    if not scans:
        raise ConfigError(
            f"probe '{probe.name}': no scan of rank {probe.rank} with a label in column '{probe.label}'"
            + ("" if probe.positive is None else " that is positive or negative")
        )
    for told in shared_patients(sources, used, sites, study):
        _tell(probe, told)
    packed = io.BytesIO()
    np.savez(packed, scans=np.stack(scans), labels=np.array(classes), patients=np.array(patients))
    durable.write_bytes(path, packed.getvalue())
    return path


def _tell(probe: SimulatedProbe, words: str) -> None:
    progress.report(progress.Note(f"{probe.name}: {words}"))


def _tell_of_labels(probe: SimulatedProbe, labels: Sequence[tuple[str, str]]) -> None:
    """labels: of each scan, and its patient. What of the table's labels counts as what, where they are not classes."""
    if probe.positive is None:
        return
    counts = class_counts((label for label, _ in labels), (patient for _, patient in labels))
    for kind, name in {"1": "positive", "0": "negative", None: "left out, as neither positive nor negative"}.items():
        of_kind = [label for label, _ in labels if probe.class_of(label) == kind]
        if counts is not None and of_kind:
            named = {label: count for label, count in counts.items() if label in of_kind}
            _tell(probe, f"{name}: {counts_in_words(named)}")
        elif of_kind or kind is not None:
            _tell(probe, f"{name}: {len(of_kind)} scans")


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


def _labelled_scans(probe: SimulatedProbe, source: DataSource, plan: PlanConfig) -> Iterator[_Labelled]:
    """Each scan of the source with its label; at its end, how many had none, and of how many nothing says whose they
    are, is told."""
    assert source.table is not None  # or `problems` would have said so
    column = read_column(source.table, probe.label)
    count = unlabelled = 0
    reading = Reading.of_sources([source], plan)
    for origin, scan in reading:
        if scan.rank != probe.rank:
            continue
        count += 1
        below = PurePosixPath(origin.files[0])
        if not (label := next((column[name] for name in (below, *below.parents) if name in column), "")):
            unlabelled += 1  # by a row of its own or, of a series, of its folder
            continue
        try:
            yield _Labelled(origin.paths, origin.patient, label, prepare(scan, plan)[0])
        except ScanError as error:
            _tell(probe, f"left out 1 {error.reason}")
    reading.tell()
    if unlabelled:
        told = f"{unlabelled} of {count} scans of rank {probe.rank}, which have no label in column '{probe.label}'"
        _tell(probe, f"left out {told}")
    if unowned := sum(reading.found.assumed.values()):
        _tell(
            probe,
            f"{unowned} files count as a patient each, for nothing says whose they are; where a patient has several, "
            "the figure is too good: give the table's `patient` column, or a patient_pattern",
        )
