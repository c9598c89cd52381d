"""What may be asked of this site, by its own file (`policy`), looked at before a scan is read.

Nothing in a request can change it. What patients may cost is `client.terms` and the ledger; here it is which studies
may come, what may leave, and how much memory, disk and time a study may take. A study that asks for too much is refused
as a whole, in words on the site's own screen and with the reason `policy` to its coordinator: nothing is thinned in
silence.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from client.site_config import SiteConfig, SitePolicy
from client.site_state import models_folder, run_folder
from unimiss_core.errors import PolicyError
from unimiss_core.students import empty_student, shape_of_views
from unimiss_core.study import StudyConfig

REMEMBERED_BYTES = 40
"""Of a run, for each parameter: student, teacher and two moments in float32, after each of two rounds, and a part for
what is unfinished."""


def check_policy(config: SiteConfig, study: StudyConfig, run: str) -> None:
    """Raises PolicyError, which names all that the site's policy does not allow. Nothing is read but sizes of files."""
    if found := list(refusals(config, study, run)):
        raise PolicyError(
            f"study '{study.name}' ({study.digest()}) is refused by this site's own policy (`policy` in site.yaml):\n"
            + "\n".join(found)
        )


def refusals(config: SiteConfig, study: StudyConfig, run: str | None = None) -> Iterator[str]:
    """What the site's policy does not allow of a run, a line for each; without `run`, of a new one."""
    yield from beyond(config.policy, study)
    yield from _no_room(config, study, run)


def check_groups(config: SiteConfig, groups: Collection[str]) -> None:
    """Raises PolicyError: of these parameter groups, which would leave, some may not."""
    if forbidden := sorted(set(groups) - set(config.policy.groups_may_leave)):
        raise PolicyError(
            f"updates of the parameter group {', '.join(forbidden)} would leave, and policy.groups_may_leave lacks it; "
            "list folders of images alone (in patient-level studies, privacy.holds: [images]), or add the group"
        )


def beyond(policy: SitePolicy, study: StudyConfig) -> Iterator[str]:
    """What of a study the policy does not allow, a line for each, with the setting of the site file."""
    if (unknown := _unknown(policy, study)) is not None:
        yield unknown
    if study.wire.losses and study.privacy.mode != "patient" and not policy.losses_may_leave:
        yield "it asks for losses, and policy.losses_may_leave is false; the study would have to say wire.losses: false"
    parameters = _parameters(study)
    bounds: Sequence[tuple[str, float, str, float]] = (
        ("rounds", study.schedule.rounds, "most_rounds", policy.most_rounds),
        ("steps in a round", study.schedule.local_steps, "most_steps", policy.most_steps),
        ("parameters", parameters, "most_parameters", policy.most_parameters),
        ("voxels in a step", _voxels(study), "most_voxels", policy.most_voxels),
    )
    for what, asked, setting, most in bounds:
        if asked > most:
            yield f"it asks for {asked:,} {what}, above policy.{setting}: {most:,}"
    if (spacing := _finest(study)) < policy.finest_spacing_mm:
        yield f"it resamples to {spacing:g} mm, below policy.finest_spacing_mm: {policy.finest_spacing_mm:g}"


def in_words(policy: SitePolicy) -> Iterator[str]:
    """What it comes to, for whoever answers for the site."""
    if policy.studies is None:
        yield "Studies that may come: any (policy.studies lists none)."
    else:
        yield f"Studies that may come: {', '.join(policy.studies) or 'none yet'} (policy.studies)."
    yield f"What may leave: updates of {', '.join(policy.groups_may_leave)}; losses: " + (
        "yes." if policy.losses_may_leave else "no."
    )
    if policy.bundles:
        yield f"Code that may run here: this installation's, and {len(policy.bundles)} more (policy.bundles)."
    else:
        yield "Code that may run here: this installation's alone."


def _unknown(policy: SitePolicy, study: StudyConfig) -> str | None:
    """Why the study may not come. A study that is called like another one's sha256 is not that one."""
    digest = study.digest()
    if policy.studies is None or digest in policy.studies:
        return None
    if study.name in policy.studies and not re.fullmatch("[0-9a-f]{64}", study.name):
        return None
    return (
        f"it is not in policy.studies; add '{digest}' to allow it exactly as it stands, or '{study.name}' to allow "
        "whatever its coordinator makes of it within this policy"
    )


def _parameters(study: StudyConfig) -> int:
    """Of the whole network, told without memory for it."""
    return sum(parameter.numel() for parameter in empty_student(study).parameters())


def _voxels(study: StudyConfig) -> int:
    """Of the views that one step holds at once, of whichever rank has more."""

    def scans(rank_batch: int) -> int:
        return study.privacy.scans_per_patient if study.privacy.mode == "patient" else rank_batch

    return max(scans(study.batch.of(rank)) * math.prod(shape_of_views(study, rank)) for rank in study.ranks)


def _finest(study: StudyConfig) -> float:
    return min(study.plan.volume_spacing_mm + (study.plan.image_spacing_mm or ()))


def _no_room(config: SiteConfig, study: StudyConfig, run: str | None) -> Iterator[str]:
    """A coordinator may begin as many runs as it likes, and each is remembered for months."""
    places = [path for path in (config.state / "runs", models_folder(config.state)) if path.is_dir()]
    if not places or (run is not None and run_folder(config.state, run).exists()):
        return
    used, need = sum(map(_size, places)), REMEMBERED_BYTES * _parameters(study)
    if used + need > (most := config.policy.runs_limit_gb * 1e9):
        yield (
            f"another run would need {need / 1e9:.1f} GB beside the {used / 1e9:.1f} GB of older ones, above "
            f"policy.runs_limit_gb: {most / 1e9:g}; delete what is not needed below 'runs' or 'models' in the state "
            "folder"
        )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another process may have deleted it
            total += path.lstat().st_size
    return total
