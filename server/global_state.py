"""What the coordinator holds between rounds, and how it is saved and found again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from server import optimisers
from server.attendance import Attendance
from server.release import Release
from server.run_folder import RunFolder
from unimiss_core import checkpoint
from unimiss_core.checkpoint import Checkpoint
from unimiss_core.codec import Layout
from unimiss_core.errors import CheckpointError
from unimiss_core.groups import GROUPS, Group
from unimiss_core.json_text import object_in
from unimiss_core.network import below
from unimiss_core.study import StudyConfig

_RELEASED = "released."
"""Prefix of the release before, among the tensors that a checkpoint holds besides."""


@dataclass
class GlobalState:
    """What the coordinator holds after `round` rounds.

    release: float32 masters of the student, and what sites hold of them. teacher: the EMA of the released students,
    per group. retention: what was left of the teacher in the last round. taught: site -> the last round whose release
    and teacher it holds on its disk. attendance: what is remembered of sites; unlike the rest it also moves when a
    round fails. optimiser: of the server, see `server.optimisers`.
    """

    round: int
    release: Release
    teacher: dict[str, Tensor]
    retention: dict[Group, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))
    taught: dict[str, int] = field(default_factory=dict)
    attendance: Attendance = field(default_factory=Attendance)
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def student(self) -> Mapping[str, Tensor]:
        """The float32 masters."""
        return self.release.student

    @classmethod
    def initial(cls, student: Mapping[str, Tensor], study: StudyConfig, layout: Layout) -> "GlobalState":
        """Before the first round."""
        release = Release.first(student, layout=layout, dtype=study.wire.dtype)
        return cls(0, release, release.held())

    @classmethod
    def restored(cls, found: Checkpoint, study: StudyConfig, layout: Layout) -> "GlobalState":
        """As `save` left it. Raises CheckpointError: server.json says something else."""
        try:
            book = object_in(found.server_json)
            retention, taught, attendance = book["retention"], book["taught"], Attendance.of(book["attendance"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"round {found.manifest.round}: its server.json is not what a coordinator goes on from; take another "
                "copy of the checkpoint"
            ) from None
        held = below(_RELEASED, found.server_tensors)
        return cls(
            round=found.manifest.round,
            release=Release(found.student, held or None, layout, study.wire.dtype),
            teacher=dict(found.teacher),
            retention=retention,
            taught=taught,
            attendance=attendance,
            optimiser={name: t for name, t in found.server_tensors.items() if name.startswith(optimisers.PREFIXES)},
        )

    def save(self, folder: RunFolder, study: StudyConfig, before: Callable[[], object] = lambda: None) -> None:
        """Write it as its round's checkpoint, in one rename. before: as of `durable.new_folder`."""
        book = {"retention": self.retention, "taught": self.taught, "attendance": self.attendance.facts()}
        held = {_RELEASED + name: tensor for name, tensor in (self.release.before or {}).items()}
        checkpoint.save(
            folder.checkpoint_of(self.round),
            origin="federation",
            round=self.round,
            study_digest=study.digest(),
            model=study.model,
            plan=study.plan,
            student=self.student,
            teacher=self.teacher,
            server_json=json.dumps(book, sort_keys=True),
            server_tensors={**self.optimiser, **held},
            signing_key=folder.signing_key,
            before=before,
        )
