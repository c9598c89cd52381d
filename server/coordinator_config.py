"""The coordinator file: which study, where results go, how long to wait for whom."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from unimiss_core.config import Config, load
from unimiss_core.errors import ConfigError


class CoordinatorConfig(Config):
    study: Path
    """The study file; relative paths count from the coordinator file's folder."""
    out: Path
    """Folder for checkpoints, metrics and the report."""
    min_sites: Annotated[int, Field(gt=0)] = 1
    """Sites that must have joined before the first round begins."""
    min_replies: Annotated[int, Field(gt=0)] = 1
    """Updates that must count for a round to be completed."""
    wait_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a round waits for `min_sites` to connect."""
    introduction_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a site that is new may take to say what it holds: it reads its archive before it answers."""
    deadline_s: Annotated[float, Field(gt=0)] = 3600.0
    """How long a round waits for updates."""
    keep_checkpoints: Annotated[int, Field(gt=0)] = 10
    """Newest rounds whose checkpoints stay; the initial weights, round 0, always do."""
    probe: tuple[Path, ...] = ()
    """Labelled, already preprocessed public sets (.npz, see `server.probing`), measured before and after the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replies > self.min_sites:
            raise ValueError(f"min_replies={self.min_replies} must not be above min_sites={self.min_sites}")
        return self


def load_coordinator(path: Path) -> CoordinatorConfig:
    """Read a coordinator file, relative paths taken from its folder. Raises ConfigError."""
    config = load(CoordinatorConfig, path)
    base = path.resolve().parent
    anchored = config.model_copy(
        update={
            "study": base / config.study,
            "out": base / config.out,
            "probe": tuple(base / probe for probe in config.probe),
        }
    )
    for index, probe in enumerate(anchored.probe):
        if not probe.is_file():
            raise ConfigError(f"{path}: 'probe.{index}': {probe} is not a file")
    return anchored
