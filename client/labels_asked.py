"""What a study of fine-tuning asks of a site's labels, laid beside the site file; no scan and no table is read here."""

from collections.abc import Sequence

from client.label_config import LabelsConfig, MsdData
from client.label_values import wrong_settings
from client.msd_folders import numbers_of, told_in
from client.site_config import SiteConfig
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError
from unimiss_core.task_config import SegmentationConfig, SupervisionConfig, TaskConfig, folded


def lacking_labels(config: SiteConfig, asked: SupervisionConfig) -> str | None:
    """What a study asks of labels and the site file does not have; None where it has all."""
    labels, task = config.labels, asked.task
    named = ", ".join(map(on_one_line, task.classes))
    if labels is None:
        return f"it asks for a {task.name} into {named}, and the site file has no `labels`"
    if labels.data.name == "msd" and not isinstance(task, SegmentationConfig):
        return "it asks for classes, and labels.data is a folder of masks"
    same = labels.classes == task.classes if task.name == "segmentation" else {*labels.classes} == {*task.classes}
    if not same:
        return (
            f"it asks for the classes {named}, and labels.classes of the site file is "
            f"{', '.join(labels.classes)}; where they mean the same, name them as the study does"
            + (", in its order" if task.name == "segmentation" else "")
        )
    return _lacking_channels(labels, task) or wrong_settings(labels.data, task)


def _lacking_channels(labels: LabelsConfig, task: TaskConfig) -> str | None:
    """Names decide, never an order by itself: who wrote the study and who wrote the site file are two people."""
    data, asked = labels.data, "it asks for scans of one image or volume each"
    if task.channels is not None:
        asked = f"it asks for scans of the channels {', '.join(map(on_one_line, task.channels))}"
    names_them = isinstance(data, MsdData) and data.channels is None and task.channels is not None  # dataset.json
    if not names_them and _folded(labels.channels) != _folded(task.channels):
        if labels.channels is None:
            if isinstance(data, MsdData):
                return f"{asked}; name what labels.data.channels of the site file are in labels.channels"
            return (
                f"{asked}; make labels.data.scan of the site file a list of as many, and name them in labels.channels"
            )
        told = f"{asked}, and labels.channels of the site file is {', '.join(labels.channels)}"
        return told + ("; where they mean the same, name them as the study does, in its order" if task.channels else "")
    if isinstance(data, MsdData) and isinstance(task, SegmentationConfig) and task.channels and data.folder.is_dir():
        try:
            numbers_of(task, data, told_in(data.folder / "dataset.json").channels)
        except ConfigError as error:
            return f"{asked}; {on_one_line(str(error))}"
    return None


def _folded(names: Sequence[str] | None) -> list[str]:
    return [folded(name) for name in names or ()]
