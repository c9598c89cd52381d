"""`unimiss import`: released weights as a checkpoint of ours."""

from pathlib import Path

from unimiss_core import checkpoint
from unimiss_core.errors import ConfigError
from unimiss_core.released import read_released
from unimiss_core.study import PlanConfig


def import_released(released: Path, out: Path) -> None:
    """Write the released student and teacher as the checkpoint folder `out`.

    The plan is the default one: the released code has none. Raises ConfigError: `out` holds something already, or
    cannot be written. Raises CheckpointError: not a released file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; give a new folder")
    found = read_released(released)
    try:
        checkpoint.save(
            out.resolve(),  # "." has no name to write beside
            origin="released",
            round=0,
            study_digest=None,
            model=found.model,
            plan=PlanConfig(),
            student=found.student,
            teacher=found.teacher,
        )
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"{out}: {found.model.size} model with {found.model.prototypes} prototypes")
