"""How a prepared scan becomes what a network takes: which way its axes point, and what it is resized to."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from unimiss_core.config import Config
from unimiss_core.model_config import ModelConfig
from unimiss_core.scan import RANKS, Modality, Rank
from unimiss_core.task_config import OtherGrids, TaskConfig


class ChannelConfig(Config):
    """One of the images or volumes that a scan is made of. Each is prepared by itself: CT by the plan's window, all
    others by percentiles of their own."""

    name: str
    modality: Modality | None = None
    """What it was taken for where its file does not say it; None: for nothing that the file does not say."""


class InputConfig(Config):
    """How a scan of one rank that `plan` prepared becomes what the network takes."""

    axes: tuple[str, ...]
    """Where each axis of S points to, of the patient; an image whose file does not say how it lies is as it is
    shown."""
    size: tuple[int, ...]
    """S that the network takes: that of the position tables, or the task's."""
    fit: Literal["whole", "windows"]
    """whole: all of the scan is resized to `size`, whatever its sides' ratio. windows: of a segmentation, such are cut
    from it; the encoder alone, as `unimiss embed` asks it, sees a scan whole."""
    resize: Literal["linear, antialiased"] = "linear, antialiased"
    """Along each axis by itself, between the centres of the cells; where it shrinks, a triangle as wide as the new
    grid's step averages what lies between. Of images torch's `interpolate(mode="bilinear", antialias=True)`."""
    channels: Annotated[tuple[ChannelConfig, ...], Field(exclude_if=lambda named: not named)] = ()
    """Of a task that has some, in the order of the input, on one grid; empty where a scan is one image or volume."""
    other_grids: Annotated[OtherGrids, Field(exclude_if=lambda rule: rule == "refuse")] = "refuse"
    """resample: channels that lie otherwise are laid on the grid of the first."""


_AXES: Mapping[Rank, tuple[str, ...]] = {
    2: ("posterior of an axial slice, inferior of others", "left, of a sagittal slice posterior"),
    3: ("superior", "posterior", "left"),
}
"""As `unimiss_core.scan.Scan` has them."""


def inputs_of(
    model: ModelConfig, task: TaskConfig | None, modalities: Sequence[Modality | None] | None = None
) -> tuple[InputConfig, ...]:
    """What an encoder takes of each rank, or a model for a task of its own.

    modalities: what each of the task's channels was taken for whose file does not say it; None where nobody told.
    """
    if task is None:
        return tuple(InputConfig(axes=_AXES[rank], size=model.size_of(rank), fit="whole") for rank in RANKS)
    fit: Literal["whole", "windows"] = "windows" if task.name == "segmentation" else "whole"
    names = task.channels or ()
    kinds = modalities if modalities is not None else [None] * len(names)
    channels = tuple(ChannelConfig(name=name, modality=kind) for name, kind in zip(names, kinds, strict=True))
    return (
        InputConfig(
            axes=_AXES[task.rank], size=task.size_for(model), fit=fit, channels=channels, other_grids=task.other_grids
        ),
    )
