"""Room for preprocessed scans: how much they need, and which old ones go for it."""

import math
import shutil
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from client.candidates import Candidate
from client.site_config import SiteConfig
from unimiss_core.errors import ConfigError, ScanError
from unimiss_core.plan import target_grid
from unimiss_core.study import PlanConfig

_SPARE_BYTES = 2**30
"""What is left free on the cache's disk."""
_STALE_S = 86_400.0
"""Age at which a file that is still being written was left behind by a crash."""


def prepared_bytes(candidate: Candidate, plan: PlanConfig) -> int:
    """How much room a prepared scan takes, at most; but for a tilted gantry, which is not straightened yet."""
    shape, spacing_mm = candidate.shape, candidate.spacing_mm
    known = "spacing_unknown" not in candidate.flags
    most = 0
    # Which of a volume's axes is which is not known before it is read.
    for order in permutations(range(len(shape))) if candidate.kind == "3d" else ((0, 1),):
        turned, steps = [shape[axis] for axis in order], [spacing_mm[axis] for axis in order]
        most = max(most, math.prod(target_grid(turned, steps, plan, spacing_known=known)[0]))
    return 2 * most


def make_room(
    site: SiteConfig, wanted: Sequence[Candidate], plan: PlanConfig, kept: set[str], *, evicts: bool = True
) -> None:
    """Drop scans that are no longer wanted where the new ones need their room; without `evicts`, none.

    Raises ConfigError: it is not enough. Nothing was dropped then.
    """
    folder = site.cache_folder
    need = sum(prepared_bytes(candidate, plan) for candidate in wanted)
    if not need:
        return
    sizes = {path: path.stat().st_size for ending in ("npy", "sealed") for path in folder.glob(f"*.{ending}")}
    limit = int(site.cache_limit_gb * 1e9)
    used, free = sum(sizes.values()), shutil.disk_usage(folder).free - _SPARE_BYTES
    old = {path: size for path, size in sizes.items() if path.name not in kept} if evicts else {}
    least, most_free = used - sum(old.values()), free + sum(old.values())
    if least + need > limit:
        raise ConfigError(
            f"site '{site.name}': the cache needs about {(least + need) / 1e9:.1f} GB; expected at most "
            f"cache_limit_gb={site.cache_limit_gb:g}; raise it, or give the site fewer scans"
        )
    if need > most_free:
        raise ConfigError(
            f"site '{site.name}': the cache needs about {need / 1e9:.1f} GB more, and its disk has "
            f"{max(0, most_free) / 1e9:.1f} GB to spare beyond the 1 GB that stays free; point 'cache' to a larger disk"
        )
    for path, size in old.items():
        if used + need <= limit and need <= free:
            return
        path.unlink(missing_ok=True)
        used, free = used - size, free + size


def forget_unfinished(folder: Path) -> None:
    """Delete files whose writing a crash cut off."""
    for partial in folder.glob(".*.partial"):
        if time.time() - partial.stat().st_mtime > _STALE_S:
            partial.unlink(missing_ok=True)


def check_spare(folder: Path, size: int) -> None:
    """Raises ScanError(cannot_write): with `size` bytes more the disk would be as good as full. The ledger may lie on
    it, and must never fail for what scans take."""
    if shutil.disk_usage(folder).free - size < _SPARE_BYTES // 2:
        raise ScanError("cannot_write", "its disk is full")
