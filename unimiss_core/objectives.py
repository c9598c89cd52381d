"""Which objective a study means."""

from unimiss_core.objective import Objective, UniMiSS
from unimiss_core.radiograph import Radiographer
from unimiss_core.scan import RANKS
from unimiss_core.study import StudyConfig, UniMiSSConfig
from unimiss_core.supervised import Supervised
from unimiss_core.unimiss_plus import UniMiSSPlus


def build_objective(study: StudyConfig) -> Objective:
    """What a learner of this study minimises."""
    if study.finetune is not None:
        return Supervised(study.finetune)
    if isinstance(study.objective, UniMiSSConfig):
        return UniMiSS(study.objective)
    radiographer = Radiographer(
        size=study.views.image_size,
        ct_window_hu=study.plan.ct_window_hu,
        spacing_mm=study.plan.volume_spacing_mm[1:],
        angle_deg=study.objective.radiograph_angle_deg,
    )
    return UniMiSSPlus(study.objective, radiographer)


def has_teacher(study: StudyConfig) -> bool:
    """Whether anything is learned from a teacher; where not, none is kept, sent or moved."""
    objective = build_objective(study)
    return any(objective.representations(rank) for rank in RANKS)
