"""After a private round that failed, nothing private begins at a site before a person has looked.

That a round failed may hang on all scans together, for instance on whether they fit the cache at the spacing that its
study asks for, and the coordinator is told of it exactly: no noise covers it. Were it told again and again, a
coordinator would choose settings, pay next to no epsilon for each try, and read off the answers what no patient agreed
to. So a failure is told once for each time that a person lets the site go on. Until then `held.json` in the state
folder names the request that failed: that one alone is answered, whatever becomes of it, and any other with `held`.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from client.ledger_entries import Request
from client.site_config import SiteConfig
from client.telling import tell_if_heard
from unimiss_core import durable
from unimiss_core.errors import ConfigError, WireError


class Hold:
    """Of one site, over all runs and studies."""

    def __init__(self, site: SiteConfig) -> None:
        """Nothing is read or written yet."""
        self._site, self._path = site.name, site.state / "held.json"

    def in_words(self) -> str | None:
        """What stands in the way of private rounds, and the way out; None where nothing does."""
        if not self._path.exists():
            return None
        failed = self._failed()
        which = "a private round" if failed is None else f"round {failed.round} of run '{failed.run}'"
        return (
            f"{which} failed, which the coordinator was told, and it shall not be told so again unseen: no other "
            "private round begins before somebody has looked into it (the site's log says why it failed) and typed "
            "`unimiss-site clear SITE.yaml`"
        )

    def check(self, request: Request) -> None:
        """Raises WireError `held`: another request has failed since a person looked."""
        if (held := self.in_words()) is not None and self._failed() != request:
            tell_if_heard(self._site, held)
            raise WireError("held", "another private round failed, and its operator has not let the site go on")

    @contextmanager
    def where_it_fails(self, request: Request) -> Iterator[None]:
        """Around work whose failure is told to the coordinator, as a WireError: of several that fail at once, the first
        is told as that, the others as `held`."""
        try:
            yield
        except WireError:
            self._begin(request)
            self.check(request)
            tell_if_heard(self._site, self.in_words() or "")
            raise
        self.check(request)  # another may have failed meanwhile: then it is not told either that this one did not

    def clear(self) -> None:
        """Let private rounds begin again. Raises ConfigError: there is nothing to clear, or the file cannot go."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            raise ConfigError(
                f"site '{self._site}': nothing is held: no private round failed since last time"
            ) from None
        except OSError as error:
            told = error.strerror or "unknown error"
            raise ConfigError(f"site '{self._site}': its state folder cannot be written to: {told}") from None

    def _begin(self, request: Request) -> None:
        with suppress(OSError), self._path.open("x", encoding="utf-8") as file:  # on a full disk empty: it holds, too
            file.write(json.dumps(request._asdict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
            durable.sync(self._path.parent)

    def _failed(self) -> Request | None:
        """None where the file is damaged: it holds every request."""
        try:
            return Request(**json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
