"""What figures of a site's training may be called. Nothing else is taken from a reply: a name that its sender were free
to choose could be a patient's, and would stand in metrics and report.
"""

from collections.abc import Callable

from unimiss_core.loss_terms import CROSS_ENTROPY, DICE, cross_entropy_name, reconstruction_name

REPRESENTATIONS = ("image", "volume", "slices", "radiograph")
"""The ways in which any objective looks at a scan."""

OF_TARGETS = ("target_entropy", "mean_target_entropy", "feature_std", "effective_rank")
"""By representation; see `unimiss_core.collapse`."""
COLLAPSE_WAY_OUT = "docs/objectives.md says under Collapse what to try"
STEPS_THAT_TEACH = 800
"""Of a site in self-distillation, before differences mean anything: a younger run that tells no scan from another has
not collapsed, it has hardly begun."""

OF_STEPS = ("grad_norm", "skipped_batches", "global_distance", "own_share")

VALIDATION_AUC, VALIDATION_DICE = OF_VALIDATION = ("validation_auc", "validation_dice")
"""Of a fine-tuning with `finetune.validation`: of the model that the round began with."""

_LOSSES = frozenset(
    [cross_entropy_name(student, teacher) for student in REPRESENTATIONS for teacher in REPRESENTATIONS]
    + [reconstruction_name(representation) for representation in REPRESENTATIONS]
    + [CROSS_ENTROPY, DICE]
)
_DIAGNOSTICS = frozenset(
    [
        *OF_STEPS,
        *OF_VALIDATION,
        *(f"{figure}_{representation}" for figure in OF_TARGETS for representation in REPRESENTATIONS),
    ]
)

is_loss: Callable[[str], bool] = _LOSSES.__contains__
is_diagnostic: Callable[[str], bool] = _DIAGNOSTICS.__contains__
