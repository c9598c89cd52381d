"""What the person at a site should know: in the site's log, and on the screen of whoever watches."""

import logging

from unimiss_core import progress

log = logging.getLogger(__name__)


def tell(site: str, words: str) -> None:
    """Say `words` under the site's name, each of their lines by itself: a screen takes one line at a time."""
    for line in filter(None, (line.strip() for line in words.splitlines())):
        log.warning("%s: %s", site, line)
        progress.report(progress.Note(f"{site}: {line}"))
