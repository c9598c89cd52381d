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

from client.cache import CachedScan, Library
from client.inference import Inference, check_extra
from client.site_config import SiteConfig
from client.site_labels import LabelledScan
from client.telling import tell, tell_once_if_heard
from unimiss_core.device import is_out_of_memory
from unimiss_core.errors import ConfigError, NonFiniteLossError, NoUsableScanError
from unimiss_core.figures import VALIDATION_AUC, VALIDATION_DICE
from unimiss_core.study import StudyConfig
from unimiss_core.tasks import TaskModel, load_task_model

_BATCH = 8
"""Scans, or windows of one, at a time."""
LEAST_PATIENTS = 5
"""A figure of fewer would be about persons, and is told to nobody."""
_DIGITS = 3
"""Of a figure: more would say how many of which class are held out, for an area is a share of so many pairs."""


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
    """The figure of the model that a round begins with, on the patients who are held out; none where they are too few,
    or what is there cannot tell a class from another. library: with all patients."""
    scans = _held_out(study, library.scans)
    if study.finetune is None or len({scan.patient for scan in scans}) < LEAST_PATIENTS:
        return {}
    try:
        check_extra(study.finetune.task)
        value = _figure(site, study, scans, student, device)
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
        name = VALIDATION_DICE if study.finetune.task.name == "segmentation" else VALIDATION_AUC
        return {} if np.isnan(value) else {name: round(value, _DIGITS)}
    tell(site.name, f"does not measure the shared model: {why}")  # the round is trained by now, and is not lost for it
    return {}


def _figure(
    site: SiteConfig,
    study: StudyConfig,
    scans: Sequence[LabelledScan],
    student: Mapping[str, Tensor],
    device: torch.device,
) -> float:
    """Raises ConfigError, OSError: a scan was changed, or is gone; NonFiniteLossError: the model answers no numbers."""
    assert study.finetune is not None
    task = study.finetune.task
    dense = task.name == "segmentation"
    model = load_task_model(study.model, task.rank, outputs=task.outputs, dense=dense, tensors=student).to(device)
    size = task.size_for(study.model)
    inference = Inference(task, size, device, site.precision, batch=_BATCH, overlap=0.5, keep_largest=())
    return (_dice if dense else _auc)(inference, model, scans)


def _held_out(study: StudyConfig, scans: Sequence[CachedScan]) -> list[LabelledScan]:
    return [scan for scan in scans if isinstance(scan, LabelledScan) and is_held_out(scan.patient, study)]


def _auc(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> float:
    """Mean over the classes that some scan is of and some is not; of two classes that of the second. NaN of
    none."""
    chances = inference.chances_of_all(model, scans)
    areas = inference.areas(chances, inference.truth([scan.target for scan in scans]))
    known = areas[np.isfinite(areas)]
    return float(known.mean()) if len(known) else float("nan")


def _dice(inference: Inference, model: TaskModel, scans: Sequence[LabelledScan]) -> float:
    """Mean over scans and the classes in either mask, on the prepared grid. NaN where all masks are empty."""
    from client import segmenting  # MONAI takes seconds to import, and a classification needs none

    known: list[float] = []
    for scan in scans:
        found = inference.mask(model, scan.whole(), None)
        truth = scan.classes().astype(np.uint8)
        each = [segmenting.dice(found, truth, number) for number in range(1, 1 + len(inference.task.classes))]
        known += [value for value in each if value is not None]
    return float(np.mean(known)) if known else float("nan")
