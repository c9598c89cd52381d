"""Room for a site's labelled scans: those of the study at hand stay, and others go for them, the oldest first.

`cache_limit_gb` holds for them by themselves, as it does for the cache of pretraining. How much a scan takes is known
once it is prepared, so the folder may be larger by the few that are prepared at the same time.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from client.site_config import SiteConfig
from unimiss_core.errors import ConfigError

STAMP = 32
"""Letters that all files of a scan begin with."""
_KEPT = re.compile(rf"([0-9a-f]{{{STAMP}}})(-mask)?\.(npy|sealed)")
"""What is kept of a scan; what a person put beside it is neither counted nor deleted."""


class LabelledRoom:
    """Counts the bytes of the site's `folder`.

    wanted: stamps of the scans that stay. evicts: whether any may go.
    """

    def __init__(self, site: SiteConfig, folder: Path, wanted: Collection[str], *, evicts: bool) -> None:
        self._site, self._folder = site, folder
        written: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        for path in folder.iterdir():
            if match := _KEPT.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process made room, too
                    status, stamp = path.stat(), match[1]
                    self._sizes[stamp] = self._sizes.get(stamp, 0) + status.st_size
                    written[stamp] = max(written.get(stamp, 0.0), status.st_mtime)
        self._used = sum(self._sizes.values())
        old = self._sizes.keys() - set(wanted) if evicts else set[str]()
        self._old = sorted(old, key=written.__getitem__, reverse=True)

    def take(self, stamp: str, size: int) -> None:
        """Another scan of so many bytes was kept, or once more one whose record was lost. Raises ConfigError: the
        site's limit does not hold them all; then that scan is not kept, or each try would fill the disk further."""
        self._used += size - self._sizes.get(stamp, 0)
        self._sizes[stamp] = size
        limit = int(self._site.cache_limit_gb * 1e9)
        while self._used > limit and self._old:
            self._drop(self._old.pop())
        if self._used > limit:
            self._drop(stamp)
            raise ConfigError(
                f"site '{self._site.name}': its labelled scans take more than cache_limit_gb="
                f"{self._site.cache_limit_gb:g} once they are prepared; raise it, or label fewer"
            )

    def _drop(self, stamp: str) -> None:
        for path in self._folder.glob(f"{stamp}*"):
            path.unlink(missing_ok=True)
        self._used -= self._sizes.pop(stamp)
