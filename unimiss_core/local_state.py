"""What a learner keeps between rounds on its site's own disk, besides the students that rounds bring."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unimiss_core.errors import CheckpointError

STATE_FORMAT = 1

OPTIMISER_KEYS = {"step": "adam_step", "exp_avg": "adam_moment1", "exp_avg_sq": "adam_moment2"}
"""By their names in memory, those of moments and counts on disk."""


@dataclass(frozen=True)
class LearnerState:
    """What a site keeps on its own disk: tensors for a safetensors file, facts for JSON beside it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def check_state(
    centre: Mapping[str, Tensor],
    own_centre: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    parameters: Mapping[str, Tensor],
) -> None:
    """moments: key -> name of a parameter -> tensor. Raises CheckpointError: they, or the centre, do not fit."""
    fits = centre.keys() == own_centre.keys() and all(
        centre[name].shape == own.shape for name, own in own_centre.items()
    )
    names = moments["step"].keys()
    fits = fits and names <= parameters.keys() and all(tensors.keys() == names for tensors in moments.values())
    fits = fits and all(
        tensors[name].shape == parameters[name].shape
        for key, tensors in moments.items()
        if key != "step"
        for name in names
    )
    if not fits:
        raise CheckpointError(
            "local state is damaged: its tensors do not fit the model. Move the state folder away to start afresh."
        )
