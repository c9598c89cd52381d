"""A scan's file as the tensor that an encoder takes, for programs of your own: what `unimiss embed` gives it."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from client.catalogue import read_one_apart
from unimiss_core.channels import require_one
from unimiss_core.embedding import seen_whole
from unimiss_core.errors import ConfigError
from unimiss_core.scan import Modality, Rank
from unimiss_core.study import PlanConfig


class Prepares(Protocol):
    """What knows how scans are prepared: an export's `ExportedConfig`, or the `Beginning` of a checkpoint."""

    @property
    def plan(self) -> PlanConfig: ...

    @property
    def modality(self) -> Modality | None:
        """What scans are taken for whose files do not say it."""
        ...

    @property
    def channels(self) -> tuple[str, ...] | None:
        """Of scans that are several images or volumes; None: each is one."""
        ...

    def size_of(self, rank: Rank) -> tuple[int, ...]:
        """S that a scan of this rank is brought to. Raises ScanError: `other_rank`."""
        ...


def prepare_file(path: Path, config: Prepares, modality: Modality | None = None) -> Tensor:
    """(C, *S) of the one scan in a NIfTI file, picture or DICOM file, or in the folder of a DICOM series: read, turned,
    prepared by the plan and resized as a whole. C is 1; an encoder takes a batch of such, (B, C, *S).

    modality: of files that do not say it, as of `unimiss embed`; None takes the model's own.
    Raises ConfigError: there is nothing, or the model takes scans of several channels. Raises ScanError, whose `reason`
    docs/reading.md explains: it cannot be used.
    """
    require_one(config.channels)
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; give a file, or the folder of a series")
    interpolate = config.plan.interpolates
    scan = read_one_apart(path, modality or config.modality, interpolate=interpolate)
    return seen_whole(scan, config.plan, config.size_of(scan.rank))
