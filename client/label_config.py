"""Where labelled scans stand: in a CSV, or a folder of masks. In a fine-tuning's file, and in a site's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, Tag, model_validator

from unimiss_core.config import Config, chosen_by_name
from unimiss_core.given_path import GivenPath
from unimiss_core.scan import Modality
from unimiss_core.task_config import MOST_CHANNELS, MOST_CLASSES, ChannelName, ClassName


def check_patient_pattern(pattern: str | None) -> None:
    """Raises ValueError: it is no regular expression, or has no group that names the patient."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise ValueError(f"patient_pattern: is no regular expression ({error})") from None
    if "patient" not in groups:
        raise ValueError("patient_pattern: needs a group named patient, as in '(?P<patient>[0-9]+)_'")


class CsvData(Config):
    """A table with a line for each labelled scan; other columns than those named here are not looked at."""

    name: Literal["csv"] = "csv"
    table: GivenPath
    folder: GivenPath = Path()
    """What the table's paths begin from."""
    scan: str | tuple[str, ...] = "scan"
    """Column with the path of a file, or of the folder of a DICOM series; of a task with channels a list, a column for
    each."""
    label: str = "label"
    """Column with the class, or with the path of the mask. Not read for multi_label: there each class has a column of
    its name that holds 1 or 0."""
    uncertain: Literal["ones", "zeros", "ignore"] | None = None
    """What -1 counts as where labels are 1 or 0; ignore: that class of that scan counts nowhere. None refuses it."""
    missing: Literal["zeros", "ignore"] | None = None
    """The same of a blank cell. A line of which no label is known is left out."""
    patient: str = "patient"
    patient_pattern: str | None = None
    """A regular expression with a group `patient`, searched in the scan's path as the table has it: whose it is where
    no column says it. With it `patient` is not read."""
    split: str = "split"
    """Column with train, validation or test; read only where the split is `given`."""
    where: Mapping[str, tuple[str, ...]] = {}
    """Only lines whose column holds one of these texts are used, for each column named."""
    modality: Modality | None = None
    """For formats that do not say it; CT is what makes values HU. None goes by the names of a task's channels, where
    these begin with CT, MR or PET."""

    @property
    def scan_columns(self) -> tuple[str, ...]:
        """`scan`, for each channel of a scan."""
        return (self.scan,) if isinstance(self.scan, str) else self.scan


class MsdData(Config):
    """A folder of the Medical Segmentation Decathlon or of nnU-Net: imagesTr, labelsTr, perhaps dataset.json."""

    name: Literal["msd"] = "msd"
    folder: GivenPath
    patient_pattern: str | None = None
    """A regular expression with a group `patient`, searched in the file's name; without it a file is a patient."""
    channel: Annotated[int, Field(ge=0, le=9999)] = 0
    """Which of nnU-Net's CASE_0000, CASE_0001, ... is read; of names without such an end, the one file."""
    channels: Annotated[tuple[Annotated[int, Field(ge=0, le=9999)], ...] | None, Field(min_length=2)] = None
    """Of a task with channels: which of them each is, or, where a case is one file, of its volumes. None finds them by
    their names in dataset.json."""
    modality: Modality | None = None
    """None takes what dataset.json says, if it says anything; of a task with channels, the names of these."""


LabelData = Annotated[
    Annotated[CsvData, Tag("csv")] | Annotated[MsdData, Tag("msd")],
    chosen_by_name(default="csv"),
]


class LabelsConfig(Config):
    """A site's labelled scans, for studies of `task: finetune`; nothing of it leaves the site (docs/finetuning.md)."""

    data: LabelData
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=MOST_CLASSES)]
    """What the labels mean, in the words of the study. Of masks, value i is the i-th. A study of other classes is not
    for these labels, and is refused."""
    channels: Annotated[tuple[ChannelName, ...], Field(min_length=2, max_length=MOST_CHANNELS)] | None = None
    """Where a scan is several images or volumes: what the columns of `data.scan`, or the numbers of `data.channels`,
    are, in their order and in the words of the study. A study of other channels is not for these labels, and is
    refused. Not of a folder whose dataset.json names them."""
    allow_empty_masks: bool = False
    """Whether a mask may hold no class at all: a patient in whom there is nothing to find."""
    file_is_patient: bool = False
    """Of `msd` without `patient_pattern`: each file is of another patient. This site vouches for it, as in `data`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_patient_pattern(self.data.patient_pattern)
        setting, places = "data.channels", 0
        if isinstance(self.data, CsvData):
            setting, places = "data.scan", 0 if isinstance(self.data.scan, str) else len(self.data.scan)
        elif self.data.channels is not None:
            places = len(self.data.channels)
        if len(self.channels or ()) != places:
            if places:
                raise ValueError(f"channels: name what the {places} of {setting} are, in their order, as studies do")
            raise ValueError(f"channels: say where each of them is, by a list of as many in {setting}")
        return self

    @property
    def knows_patients(self) -> bool:
        """Whether each scan says whose it is, and nobody has to guess."""
        return isinstance(self.data, CsvData) or self.data.patient_pattern is not None or self.file_is_patient
