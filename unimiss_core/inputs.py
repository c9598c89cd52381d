"""How a prepared scan becomes what a network takes: which way its axes point, and what it is resized to."""

from collections.abc import Mapping
from typing import Literal

from unimiss_core.config import Config
from unimiss_core.model_config import ModelConfig
from unimiss_core.scan import RANKS, Rank
from unimiss_core.task_config import TaskConfig


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


_AXES: Mapping[Rank, tuple[str, ...]] = {
    2: ("posterior of an axial slice, inferior of others", "left, of a sagittal slice posterior"),
    3: ("superior", "posterior", "left"),
}
"""As `unimiss_core.scan.Scan` has them."""


def inputs_of(model: ModelConfig, task: TaskConfig | None) -> tuple[InputConfig, ...]:
    """What an encoder takes of each rank, or a model for a task of its own."""
    if task is None:
        return tuple(InputConfig(axes=_AXES[rank], size=model.size_of(rank), fit="whole") for rank in RANKS)
    fit: Literal["whole", "windows"] = "windows" if task.name == "segmentation" else "whole"
    return (InputConfig(axes=_AXES[task.rank], size=task.size_for(model), fit=fit),)
