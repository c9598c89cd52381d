"""By whom a checkpoint was trained, in numbers alone: what a model card may tell of the sites.

A run's `metrics.jsonl` names its sites, and stays with the coordinator; beside a checkpoint that is handed on stands
`trained_by.json`, which counts them.
"""

from pathlib import Path

from pydantic import Field, ValidationError

from unimiss_core import durable, metric_lines
from unimiss_core.config import Config

NAME = "trained_by.json"
_COUNTED = ("ok", "late")


class TrainedBy(Config):
    sites: int = Field(ge=0)
    """Whose updates counted in any round up to the checkpoint's."""
    with_images: int = Field(ge=0)
    with_volumes: int = Field(ge=0)
    """Of those sites; one with both counts twice."""
    site_epsilon: float | None = Field(None, ge=0)
    """Under site-level privacy: what a site has paid by then that took part in every release."""


def read(folder: Path) -> TrainedBy | None:
    """What stands beside a checkpoint that was handed on; None where nothing that can be read does."""
    try:
        return TrainedBy.model_validate_json((folder / NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def write(folder: Path, told: TrainedBy) -> None:
    durable.write_text(folder / NAME, told.model_dump_json(indent=2) + "\n")


def of_run(out: Path, round: int) -> TrainedBy | None:
    """Up to this round, from the metrics in a run's folder (docs/artefacts.md); None where there are none.

    A damaged line is left out; of a round that was written twice, the later line counts.
    """
    try:
        rows = metric_lines.rows(out / metric_lines.NAME)
    except OSError:
        return None
    rounds = {row["round"]: row for row in rows if row["round"] <= round}
    if not rounds:
        return None
    ranks: dict[str, set[str]] = {}
    for record in rounds.values():
        for name, site in record["sites"].items():
            if site["status"] in _COUNTED:
                ranks.setdefault(name, set()).update(rank for rank, count in (site.get("scans") or {}).items() if count)
    paid = [record["global"].get("site_epsilon") for record in rounds.values()]
    return TrainedBy(
        sites=len(ranks),
        with_images=sum("2d" in there for there in ranks.values()),
        with_volumes=sum("3d" in there for there in ranks.values()),
        site_epsilon=max((one for one in paid if one is not None), default=None),
    )
