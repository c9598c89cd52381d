"""What an update must fulfil before it counts. A bad one costs its site this round, nothing else."""

import math

from server.aggregation import norm
from unimiss_core.errors import WireError
from unimiss_core.scan import RANKS
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Introduction, TrainReply


def admit(
    reply: TrainReply,
    *,
    asked: Introduction,
    run: str,
    round: int,
    study: StudyConfig,
    study_digest: str,
    num_values: int,
    usual_size: float | None = None,
) -> float:
    """The update's size: the root mean square of its values, which sites of different ranks have in common. What the
    study leaves alone counts as zeros, though it does not come back: in runs of older versions it did, and they go on.

    Raises WireError with the reason when `reply` must not count.
    num_values: that the site was sent.
    usual_size: of updates that counted before (`server.attendance.Attendance.usual_size`).
    Names, shapes and dtypes were checked when it was unpacked; here: who, in which run and round, of which study,
    finite, and how large.
    """
    if reply.site != asked.site:
        raise WireError("wrong_site", "the reply names another site than the one that was asked")
    if reply.run != run:
        raise WireError("wrong_run", "the reply was trained in another run of the study")
    if reply.round != round:
        raise WireError("stale_round", f"the reply is for round {reply.round}, asked was round {round}")
    if reply.study_digest != study_digest:
        raise WireError("wrong_study", "the reply was trained for another study")
    claimed = frozenset(rank for rank in RANKS if reply.scans[rank] > 0)
    if claimed != asked.ranks:
        raise WireError("counts", "the reply claims scans of other ranks than the site introduced itself with")
    if sum(reply.scans.values()) > study.aggregation.max_scans:
        raise WireError("counts", f"the reply claims more than {study.aggregation.max_scans} scans")
    if reply.steps != study.schedule.local_steps:
        raise WireError("steps", f"the reply claims {reply.steps} steps, the study asks {study.schedule.local_steps}")
    length = norm(reply.update)
    if not math.isfinite(length):
        raise WireError("not_finite", "the update holds a value that is not a finite number")
    if length > (most := study.aggregation.max_update_norm):
        raise WireError("too_large", f"the update's norm {length:.3g} is above the study's max_update_norm {most:g}")
    size = length / math.sqrt(num_values)
    ratio = study.aggregation.max_size_ratio
    if usual_size is not None and ratio is not None and size > ratio * usual_size:
        raise WireError("too_large", f"the update is {size / usual_size:.3g} times as large as usual, above {ratio:g}")
    return size
