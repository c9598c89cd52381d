"""What a researcher sees of a command at work, on standard error: on a terminal one line that counts, in a log a plain
line now and then.
"""

import sys
import time
from collections.abc import Callable

from unimiss_core.progress import Event, Note, Preparing, StepDone

SILENT_S = 30.0
"""A log that got no line for so long gets one from whatever is done next."""
_CLEAR = "\r\x1b[K"


class Screen:
    """Shows events of `unimiss_core.progress`. clock: seconds that never run backwards; a test gives its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_terminal = sys.stderr.isatty()
        self._last_line = clock()

    def show(self, event: Event) -> None:
        if isinstance(event, Note):
            self._line(f"{_CLEAR if self._is_terminal else ''}{event.text}")
        elif (words := _count_in_words(event)) and self._is_terminal:
            print(f"{_CLEAR}{words}", end="", flush=True, file=sys.stderr)
        elif words and self._clock() - self._last_line >= SILENT_S:
            self._line(words)

    def _line(self, words: str) -> None:
        self._last_line = self._clock()
        print(words, flush=True, file=sys.stderr)


def _count_in_words(event: Event) -> str:
    """How far the work is; empty of an event that does not say it."""
    match event:
        case Preparing(total=0):
            return f"looking through files: {event.done}"
        case Preparing():
            return f"reading scans: {event.done} of {event.total}"
        case StepDone():
            return f"{event.site}: {event.step} of {event.steps}"
        case _:
            return ""
