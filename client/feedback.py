"""Error feedback: what the wire loses of an update is kept at the site and sent with the next one."""

from collections.abc import Collection, Mapping

from torch import Tensor

from unimiss_core.codec import carried_over
from unimiss_core.scan import Rank
from unimiss_core.schedule import trained_steps
from unimiss_core.students import update_layout
from unimiss_core.study import StudyConfig


def with_feedback(
    update: Mapping[str, Tensor], lost: Mapping[str, Tensor], *, study: StudyConfig, ranks: Collection[Rank], round: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(what to send for `update`, what will be lost of it), by name; lost: what was before this round.

    A group without a step in this round sends zeros, which do not count: what it lost waits. A round that is asked for
    a second time takes what was lost before it, as the first time, and so sends the same bytes.

    Where a reply gets lost or is refused its update is gone, as in any format: the next round begins from a student
    without it, and what may not count must not come back later. Only what rounding lost of it is still sent, at most
    half a scale per value: that was not in the reply, and is of the training that no reply has told yet.

    Raises WireError `not_finite`: such an update could not be sent, and what it lost would stay NaN for ever.
    """
    steps = trained_steps(ranks, study.schedule, round)
    layout = {group: specs for group, specs in update_layout(study).items() if steps[group] > 0}
    sent, newly_lost = carried_over(update, lost, layout, study.wire.dtype)
    return {**update, **sent}, {**lost, **newly_lost}
