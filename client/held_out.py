"""Labelled patients whom a federation's fine-tuning never trains on, and what the shared model says of their scans.

Who they are follows from the patient's key and the study's seed alone: the same in every round, wherever the round is
gone on with, and whoever else comes or goes. What leaves is one figure for each round.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.cache import CachedScan, Library
from client.inference import Inference, check_extra
from client.site_config import SiteConfig
from client.site_labels import LabelledScan
from client.telling import tell, tell_once_if_heard
from unimiss_core import progress
from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import ConfigError, NonFiniteLossError, NoUsableScanError
from unimiss_core.figures import VALIDATION_AUC, VALIDATION_DICE
from unimiss_core.study import StudyConfig
from unimiss_core.task_config import UNKNOWN, ClassificationConfig
from unimiss_core.tasks import TaskModel, load_task_model

_BATCH = 8
"""Scans, or windows of one, at a time."""
LEAST_PATIENTS = 5
"""A figure that is made of fewer would be about persons, and is told to nobody: an area needs as many on either side of
a class, Dice as many whose mask has it."""
_STEPS = 100
_FEW_PATIENTS, _STEPS_OF_FEW = 25, 20
"""What figures are rounded to, in 1. An area is a share of so many pairs, and its digits could tell of how many: of 25
patients there are 100 pairs or more, of 10 there are 25, so that each step stands for some share of whatever number.
Losses and updates tell of classes all the same (docs/what-leaves-the-site.md)."""
_TOO_FEW = {
    "classification": f"tells no figure: of no class are {LEAST_PATIENTS} held-out patients, and {LEAST_PATIENTS} not",
    "segmentation": f"tells no figure: no class is in the masks of {LEAST_PATIENTS} held-out patients",
}


def is_held_out(patient: str, study: StudyConfig) -> bool:
    """patient: the key. Of many, the share that the study asks for."""
    if study.finetune is None:
        return False
    digest = hashlib.sha256(f"validation/{study.seed}/{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < study.finetune.validation * 2**64


def trained_on(site: SiteConfig, study: StudyConfig, library: Library) -> Library:
    """The library without those who are held out, which the site's screen counts; and without scans of others that are
    the same to the last bit, for one person may stand there under two names. Raises NoUsableScanError: nobody is left.
    """
    if study.finetune is None or not study.finetune.validation:
        return library
    out = [scan for scan in library.scans if is_held_out(scan.patient, study)]
    judged_on = {scan.key for scan in out}
    kept = tuple(one for one in library.scans if not is_held_out(one.patient, study) and one.key not in judged_on)
    if not kept:
        raise NoUsableScanError(
            f"site '{site.name}': finetune.validation={study.finetune.validation:g} holds out every labelled patient"
        )
    patients, unseen = ({scan.patient for scan in scans} for scans in (library.scans, out))
    tell_once_if_heard(site.name, _in_words(site, len(unseen), len(patients)), state=site.state)
    return replace(library, scans=kept)


def _in_words(site: SiteConfig, out: int, patients: int) -> str:
    whom = f"{out} of {patients} labelled patients"
    told = f"measures the shared model on {whom}, and trains on none of them"
    if out < LEAST_PATIENTS:
        told = f"holds out {whom}, and tells no figure of fewer than {LEAST_PATIENTS}"
    if site.labels is not None and not site.labels.knows_patients:
        told += (
            "; each file counts as a patient, so that one of several files may be on both sides: give labels.data a "
            "patient_pattern"
        )
    return told


def measured(
    site: SiteConfig, study: StudyConfig, library: Library, student: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """The figure of the model that a round begins with, on the patients who are held out; none where too few of them
    are of each class. library: with all patients."""
    scans = _held_out(study, library.scans)
    if study.finetune is None or len({scan.patient for scan in scans}) < LEAST_PATIENTS:
        return {}
    try:
        check_extra(study.finetune.task)
        found = _figure(site, study, scans, student, device)
    except ConfigError as error:
        why = str(error)
    except NonFiniteLossError:
        why = "its answers are not all numbers"
    except OSError:
        why = "a held-out scan cannot be read"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = "a held-out scan does not fit into the device's memory"
    else:
        if found is not None:
            is_area = study.finetune.task.name == "classification"
            steps = _STEPS_OF_FEW if is_area and found.patients < _FEW_PATIENTS else _STEPS
            return {VALIDATION_AUC if is_area else VALIDATION_DICE: round(found.value * steps) / steps}
        tell_once_if_heard(site.name, _TOO_FEW[study.finetune.task.name], state=site.state)
        return {}
    tell(site.name, f"does not measure the shared model: {why}")  # the round is trained by now, and is not lost for it
    return {}


class _Figure(NamedTuple):
    """patients: over how many it is, at least, for each class that it counts: an area's digits count their pairs."""

    value: float
    patients: int


def _figure(
    site: SiteConfig,
    study: StudyConfig,
    scans: Sequence[LabelledScan],
    student: Mapping[str, Tensor],
    device: torch.device,
) -> _Figure | None:
    """None where no class has enough patients. Raises ConfigError, OSError: a scan was changed, or is gone;
    NonFiniteLossError: the model answers no numbers."""
    assert study.finetune is not None
    task = study.finetune.task
    model = load_task_model(study.model, task, tensors=student).to(device)
    size = task.size_for(study.model)
    inference = Inference(task, size, device, site.precision, batch=_BATCH, overlap=0.5, keep_largest=())
    return (_dice if task.name == "segmentation" else _auc)(inference, model, scans)


def _held_out(study: StudyConfig, scans: Sequence[CachedScan]) -> list[LabelledScan]:
    return [scan for scan in scans if isinstance(scan, LabelledScan) and is_held_out(scan.patient, study)]


def _auc(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> _Figure | None:
    """Mean over the classes that enough patients have a scan of, and enough one that is not; of two classes that of the
    second. None of none."""
    assert isinstance(inference.task, ClassificationConfig)
    truth, patients = inference.truth([scan.target for scan in scans]), np.array([scan.patient for scan in scans])
    classes = range(1, 2) if inference.task.kind == "binary" else range(truth.shape[1])

    def count(scans: NDArray[np.bool_]) -> int:
        return len(set(patients[scans]))

    told = [all(count(truth[:, number] == side) >= LEAST_PATIENTS for side in (0, 1)) for number in classes]
    if not any(told):
        return None
    fewest = min(count(truth[:, number] != UNKNOWN) for number, is_told in zip(classes, told, strict=True) if is_told)
    value = float(inference.areas(inference.chances_of_all(model, scans), truth)[told].mean())
    return _Figure(value, fewest)


def _dice(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> _Figure | None:
    """Mean over scans and the classes in either mask, on the prepared grid; of classes that the true masks of enough
    patients have, whatever the model draws. None of none."""
    from client import segmenting  # MONAI takes seconds to import, and a classification needs none

    known, whose = defaultdict[int, list[float]](list), defaultdict[int, set[str]](set)
    for scan in scans:
        found = inference.mask(model, scan.whole(), None)
        progress.report(progress.Working())
        truth = scan.classes().astype(np.uint8)
        for number in range(1, 1 + len(inference.task.classes)):
            if (value := segmenting.dice(found, truth, number)) is not None:
                known[number].append(value)
            if (truth == number).any():
                whose[number].add(scan.patient)
    kept = [number for number in known if len(whose[number]) >= LEAST_PATIENTS]
    if not kept:
        return None
    told = [value for number in kept for value in known[number]]
    return _Figure(float(np.mean(told)), min(len(whose[number]) for number in kept))
