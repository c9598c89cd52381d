"""What a cell of a label's column says: that something is there, that it is not, neither for sure, or nothing at all.

Tables of chest X-rays (CheXpert, MIMIC-CXR) write 1.0, 0.0, -1.0 where the report is not sure, and leave blank what it
does not mention. What the last two count as is for whoever trains to say: nobody knows it here.
"""

from collections.abc import Mapping

from client.channel_reading import contradicted
from client.label_config import CsvData, MsdData
from unimiss_core.task_config import UNKNOWN, ClassificationConfig, TaskConfig

_CERTAIN: Mapping[str, int] = {"1": 1, "1.0": 1, "0": 0, "0.0": 0}
_UNCERTAIN = ("-1", "-1.0")
_COUNTS_AS = {"ones": 1, "zeros": 0, "ignore": UNKNOWN}


class LabelError(Exception):
    """A cell is no label; the text says why, without any of the cell's."""


def wrong_settings(data: CsvData | MsdData, task: TaskConfig) -> str | None:
    """Where `data` has not the task's channels, denies their names, or says what cells count as that such a task's
    cannot be."""
    if (apart := contradicted(task, data.modality)) is not None:
        return f"data.modality: {apart}; leave data.modality out, or call the channel otherwise"
    if isinstance(data, MsdData):
        return _wrong_numbers(data, task)
    if len(data.scan_columns) != (task.channel_count or 1) or len(set(data.scan_columns)) < len(data.scan_columns):
        if task.channels is None:
            return "data.scan: a list of columns is of a task with channels; name these in task.channels"
        return f"data.scan: expected a list of {task.channel_count} columns, of {_named(task)}, in this order"
    if _is_of_numbers(task):
        return None
    if data.uncertain is not None or data.missing == "zeros":
        return (
            "data.uncertain, data.missing: zeros: of labels that are 1 or 0 alone: kind multi_label, or binary with "
            'the classes "0" and "1"'
        )
    if data.missing is not None and not isinstance(task, ClassificationConfig):
        return "data.missing: of classes; take lines without a mask out of the table"
    return None


def _wrong_numbers(data: MsdData, task: TaskConfig) -> str | None:
    if task.channels is None:
        return None if data.channels is None else "data.channels: the task has none; name them in task.channels"
    if data.channel:
        return "data.channel: is of a task without channels; data.channels says which file each of them is"
    if data.channels is not None and len(set(data.channels)) != task.channel_count:
        return f"data.channels: expected {task.channel_count} different numbers, of {_named(task)}, in this order"
    return None


def _named(task: TaskConfig) -> str:
    return ", ".join(task.channels or ())


def target_of(cell: str, data: CsvData, task: ClassificationConfig) -> int:
    """Of a multi_label's column 1 or 0, otherwise the number of the class; or UNKNOWN. Raises LabelError."""
    if task.kind == "multi_label":
        return _number_in(cell, data)
    if cell in task.classes:
        return task.classes.index(cell)
    if _is_of_numbers(task):
        value = _number_in(cell, data)
        return value if value == UNKNOWN else [_CERTAIN[name] for name in task.classes].index(value)
    if cell:
        raise LabelError(f"holds another class than {', '.join(task.classes)}")
    if data.missing == "ignore":
        return UNKNOWN
    raise LabelError(
        f"is empty; expected one of {', '.join(task.classes)}, or data.missing: ignore to leave such lines out"
    )


def _is_of_numbers(task: TaskConfig) -> bool:
    """Whether a label is 1 or 0."""
    if not isinstance(task, ClassificationConfig):
        return False
    return task.kind == "multi_label" or {_CERTAIN.get(name) for name in task.classes} == {0, 1}


def _number_in(cell: str, data: CsvData) -> int:
    if cell in _CERTAIN:
        return _CERTAIN[cell]
    if cell in _UNCERTAIN:
        if data.uncertain is None:
            raise LabelError("is uncertain (-1); data.uncertain says what that counts as: ones, zeros or ignore")
        return _COUNTS_AS[data.uncertain]
    if not cell:
        if data.missing is None:
            raise LabelError("is blank; data.missing says what that counts as: zeros or ignore")
        return _COUNTS_AS[data.missing]
    raise LabelError("must be 0 or 1")
