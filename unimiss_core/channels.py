"""Scans of several channels: images or volumes of one patient on one grid, as MR sequences, or CT and PET.

Pretraining knows scans of one channel. A model for a task of several begins as if all were that one: the kernel that
meets the scan is parted among them evenly, so that a scan whose channels are all alike gives the features that one of
them gave, and every other tensor stays as it is.

Legend of shapes: O, C channels of a kernel out and in, k its size.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from unimiss_core.backbone import scan_kernel
from unimiss_core.card_wording import on_one_line
from unimiss_core.errors import ConfigError
from unimiss_core.layers import CHANNELS
from unimiss_core.model_config import ModelConfig
from unimiss_core.task_config import TaskConfig, Trains, folded
from unimiss_core.tasks import HEAD_KERNEL

SEES_THEIR_MEAN = (
    "WARNING: the encoder begins with weights of other channels and stays so: it sees the mean of the task's, and "
    "cannot tell one from another; trains: full lets it learn them"
)


def sees_their_mean(task: TaskConfig, trains: Trains, known: tuple[str, ...] | None) -> bool:
    """Whether a model that begins with weights of scans of these channels never tells its task's apart."""
    return trains != "full" and task.channels is not None and not are_same(task.channels, known)


def for_channels_of(
    task: TaskConfig, model: ModelConfig, tensors: Mapping[str, Tensor], known: tuple[str, ...] | None
) -> Mapping[str, Tensor]:
    """The tensors of a network, or of a model for a task, as a model of the task's channels begins with them.

    known: channels of the scans that they are of; None of pretraining, and of tasks whose scans are one. Where they are
    the task's, each keeps its part of the kernel, whatever place it has.
    """
    name = f"backbone.{scan_kernel(model, task.rank)}"
    if known == task.channels or name not in tensors:
        return tensors
    if task.channels is not None and known is not None and are_same(task.channels, known):
        places = [[*map(folded, known)].index(folded(one)) for one in task.channels]
        return {**tensors, **{of: tensors[of][:, places].contiguous() for of in (name, HEAD_KERNEL) if of in tensors}}
    return {**tensors, name: _parted(tensors[name], task.channel_count or CHANNELS[task.rank])}


def are_same(channels: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """Whether scans of these are made of the same images or volumes, in any order; None: of one that has no name."""
    if channels is None or others is None:
        return channels is others
    return sorted(map(folded, channels)) == sorted(map(folded, others))


def require_one(channels: Sequence[str] | None) -> None:
    """Of what takes each file for a scan. Raises ConfigError: the model was fine-tuned on scans of these channels."""
    if channels is not None:
        raise ConfigError(
            f"the model was fine-tuned on scans of {len(channels)} channels ({', '.join(map(on_one_line, channels))}), "
            "and here each file is a scan of one; ask it by `unimiss predict`, or give an encoder of pretraining"
        )


def _parted(kernel: Tensor, count: int) -> Tensor:
    """(O, C, *k) -> (O, count, *k): what all C together say of a scan whose channels are alike, a share for each."""
    one = kernel.sum(1, keepdim=True) / count
    return one.expand(-1, count, *kernel.shape[2:]).contiguous()
