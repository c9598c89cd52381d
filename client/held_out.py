"""Labelled patients whom a federation's fine-tuning never trains on, and what the shared model says of their scans.

Who they are follows from the patient's key and the study's seed alone: the same in every round, wherever the round is
gone on with, and whoever else comes or goes. What leaves is one figure for each round.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from client import merit
from client.cache import CachedScan, Library
from client.inference import Inference, check_extra
from client.site_config import SiteConfig
from client.site_labels import LabelledScan
from client.telling import tell, tell_once_if_heard
from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import ConfigError, NoUsableScanError
from unimiss_core.figures import VALIDATION_AUC, VALIDATION_DICE
from unimiss_core.study import StudyConfig
from unimiss_core.tasks import TaskModel, load_task_model

_BATCH = 8
"""Scans, or windows of one, at a time."""


def is_held_out(patient: str, study: StudyConfig) -> bool:
    """patient: the key. Of many, the share that the study asks for."""
    if study.finetune is None:
        return False
    digest = hashlib.sha256(f"validation/{study.seed}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < study.finetune.validation * 2**64


def trained_on(site: SiteConfig, study: StudyConfig, library: Library) -> Library:
    """The library without those who are held out, which the site's screen counts. Raises NoUsableScanError: nobody is
    left."""
    kept = tuple(scan for scan in library.scans if not is_held_out(scan.patient, study))
    if study.finetune is None or not study.finetune.validation:
        return library
    if not kept:
        raise NoUsableScanError(
            f"site '{site.name}': finetune.validation={study.finetune.validation:g} holds out every labelled patient"
        )
    patients, left = ({scan.patient for scan in scans} for scans in (library.scans, kept))
    out = f"{len(patients - left)} of {len(patients)} labelled patients"
    told = f"measures the shared model on {out}, and trains on none of them"
    tell_once_if_heard(site.name, told, state=site.state)
    return replace(library, scans=kept)


def measured(
    site: SiteConfig, study: StudyConfig, library: Library, student: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """The figure of the model that a round begins with, on the patients who are held out; none where there is nobody,
    or what is there cannot tell a class from another. library: with all patients."""
    scans = _held_out(study, library.scans)
    if study.finetune is None or not scans:
        return {}
    task = study.finetune.task
    try:
        check_extra(task)
    except ConfigError as error:
        tell(site.name, f"does not measure the shared model: {error}")
        return {}
    dense = task.name == "segmentation"
    model = load_task_model(study.model, task.rank, outputs=task.outputs, dense=dense, tensors=student).to(device)
    size = task.size_for(study.model)
    inference = Inference(task, size, device, site.precision, batch=_BATCH, overlap=0.5, keep_largest=())
    name, measure = (VALIDATION_DICE, _dice) if dense else (VALIDATION_AUC, _auc)
    try:
        value = measure(inference, model, scans)
    except (MemoryError, RuntimeError) as error:  # the round is trained by now, and is not lost for a figure
        if not is_out_of_memory(error):
            raise
        tell(site.name, "does not measure the shared model: a held-out scan does not fit into the device's memory")
        return {}
    return {} if np.isnan(value) else {name: value}


def _held_out(study: StudyConfig, scans: Sequence[CachedScan]) -> list[LabelledScan]:
    return [scan for scan in scans if isinstance(scan, LabelledScan) and is_held_out(scan.patient, study)]


def _auc(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> float:
    """Mean over the classes that some scan is of and some is not; of two classes that of the second. NaN of none."""
    batches = [scans[start : start + _BATCH] for start in range(0, len(scans), _BATCH)]
    chances = np.concatenate([inference.chances(model, [_whole(scan) for scan in batch]) for batch in batches])
    truth = np.array([_answers(scan, chances.shape[1]) for scan in scans])
    once = np.ones((1, len(scans)))
    is_binary = inference.task.name == "classification" and inference.task.kind == "binary"
    told = [1] if is_binary else range(truth.shape[1])
    areas = [float(merit.auc(chances[:, k], truth[:, k] == 1, once)[0]) for k in told]
    known = [area for area in areas if not np.isnan(area)]
    return float(np.mean(known)) if known else float("nan")


def _answers(scan: LabelledScan, outputs: int) -> Sequence[int]:
    """0 or 1 for each answer."""
    return scan.target if len(scan.target) == outputs else [int(number == scan.target[0]) for number in range(outputs)]


def _dice(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> float:
    """Mean over scans and the classes in either mask, on the prepared grid. NaN where all masks are empty."""
    from client import segmenting  # MONAI takes seconds to import, and a classification needs none

    known: list[float] = []
    for scan in scans:
        found = inference.mask(model, _whole(scan), None)
        truth = scan.classes_in(_everywhere(scan)).astype(np.uint8)
        each = [segmenting.dice(found, truth, number) for number in range(1, 1 + len(inference.task.classes))]
        known += [value for value in each if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _whole(scan: LabelledScan) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return scan.crop(_everywhere(scan))


def _everywhere(scan: LabelledScan) -> tuple[slice, ...]:
    return tuple(slice(None) for _ in scan.shape[1:])
