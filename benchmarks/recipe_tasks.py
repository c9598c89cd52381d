"""Labelled scans that `benchmarks.recipe` probes an encoder on. None was trained on, and no set's test split is read.

Each task has its floor beside it: a few plain numbers of the same scans, probed in the same way. An encoder below
the floor may still have learned, but nothing that the task needed it for.
"""

import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.nifti import read_nifti
from client.reading import read_scans
from client.site_config import DataSource, TableConfig
from unimiss_core.backbone import Backbone
from unimiss_core.embedding import embed
from unimiss_core.plan import prepare
from unimiss_core.probe import Probe, probe
from unimiss_core.scan import Modality
from unimiss_core.study import PlanConfig, StudyConfig
from unimiss_core.views import resize, whole

HELD_OUT = (0.7, 1.0)
"""Patients that no site of configs/simulation/shared_real.yaml holds, as a `patient_range`."""
STS: dict[str, Modality] = {"CT": "CT", "PET": "PT", "MR_T1": "MR"}
"""Labels of the STS table, and what they are to the program."""

SPLITS = 5
"""Ways to part the patients into folds, over which an AUC is the mean: one alone moves that of NIH by 0.08."""

Values = NDArray[np.float32]
Labelled = tuple[Values, str, str, Iterable[float]]
"""Values of a scan (C, *S) in [0, 1], its label, its patient, and the plain numbers of the floor."""


@dataclass(frozen=True)
class Task:
    """Labelled scans as the model takes them: (N, 1, *S), labels and patients (N,), floor (N, F)."""

    scans: Tensor
    labels: NDArray[np.str_]
    patients: NDArray[np.str_]
    plain: Values

    def probed(self, encoder: Backbone) -> list[Probe]:
        """One for each of SPLITS."""
        return self._probes(torch.cat([embed(encoder, part) for part in self.scans.split(32)]).numpy())

    def floor(self) -> list[Probe]:
        return self._probes(self.plain)

    def _probes(self, features: Values) -> list[Probe]:
        return [probe(features, self.labels, self.patients, seed=split) for split in range(SPLITS)]


def task(name: str, data: Path, study: StudyConfig) -> Task:
    """One of TASKS, from the folder `../shared/data`."""
    size, read = (study.views.image_size if name in IMAGES else study.views.volume_size), TASKS[name]
    values, labels, patients, plain = zip(*read(data, study.plan), strict=True)
    # Keys of patients differ from run to run; the order in which they come does not, and the folds follow it.
    numbers = {patient: f"{number:05d}" for number, patient in enumerate(dict.fromkeys(patients))}
    return Task(
        torch.stack([whole(each, size) for each in values]),
        np.array(labels),
        np.array([numbers[patient] for patient in patients]),
        np.array([tuple(each) for each in plain], dtype=np.float32),
    )


def nih(data: Path, plan: PlanConfig) -> Iterator[Labelled]:
    """Pneumonia on held-out patients; mostly an acquisition shortcut, as the floor of 16 x 16 pixels tells."""
    table = TableConfig(path=data / "nih_cxr14" / "labels.csv", file="image", patient="patient_id")
    source = DataSource(folder=data / "nih_cxr14" / "images_224", table=table, patient_range=HELD_OUT)
    labels = {row["image"]: row["label"] for row in _rows(table.path)}
    for origin, scan in read_scans([source], plan):
        values, _ = prepare(scan, plan)
        plain = resize(torch.from_numpy(values), (16, 16)).flatten().tolist()
        yield values, labels[origin.files[0]], origin.patient, plain


def adrenal(data: Path, _: PlanConfig) -> Iterator[Labelled]:
    """AdrenalMNIST3D's training and validation split: shapes, not grey values. Floor: the count of voxels."""
    with np.load(data / "adrenalmnist3d" / "adrenalmnist3d_64.npz") as held:
        masks = np.concatenate([held["train_images"], held["val_images"]])
        labels = np.concatenate([held["train_labels"], held["val_labels"]]).ravel()
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        yield (mask[None] > 0).astype(np.float32), str(label), str(number), [(mask > 0).sum()]


def hippocampus(data: Path, plan: PlanConfig) -> Iterator[Labelled]:
    """T1 MR about the hippocampus: is it larger than the median, by its mask? Floor: the three sides of the crop."""
    folder = data / "msd_hippocampus"
    names = sorted(path.name for path in (folder / "labelsTr").glob("*.nii.gz"))
    volumes = [(read_nifti(folder / "labelsTr" / n, "OT").voxels > 0).sum() for n in names]
    # On the file's own grid: at the study's spacing the structure would be a few voxels.
    for name, voxels in zip(names, volumes, strict=True):
        scan = read_nifti(folder / "imagesTr" / name, "MR")
        own_grid = plan.model_copy(update={"volume_spacing_mm": scan.spacing_mm})
        values, _ = prepare(scan, own_grid)
        yield values, str(voxels > np.median(volumes)), name, values.shape[1:]


def sts_source(data: Path, label: str, patients: tuple[float, float]) -> DataSource:
    """The volumes of one modality, by the table's label."""
    table = TableConfig(path=data / "sts_ct_pet_mr" / "meta.csv", patient="patient_id", where={"modality": (label,)})
    folder = data / "sts_ct_pet_mr" / "volumes"
    return DataSource(folder=folder, table=table, modality=STS[label], patient_range=patients)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


TASKS: dict[str, Callable[[Path, PlanConfig], Iterator[Labelled]]] = {
    "nih-pneumonia": nih,
    "adrenal": adrenal,
    "hippocampus": hippocampus,
}
IMAGES = ("nih-pneumonia",)
