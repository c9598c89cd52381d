"""How a run that fails under `flwr run` is told: in one message, which stands in Flower's log and as the run's details.

Flower marks a run as failed whose ServerApp raises, and logs the exception with its traceback, under which a message
that a person can act on would not be seen.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from unimiss_core.errors import UnimissError


class RunFailed(UnimissError):  # noqa: N818 - Flower shows the name before the message
    """The run ended with an error that a person can act on; the message says how to go on, where that is of use."""


@contextmanager
def told_by_flower(to_resume: Mapping[str, str]) -> Iterator[None]:
    """Errors that a person can act on are told in one message from here to the end of this process.

    to_resume: what the run configuration must say for the run to be found again. Raises RunFailed.
    """
    logging.getLogger("flwr").addFilter(_without_traceback)  # it stays: Flower logs when this is left
    try:
        yield
    except UnimissError as error:
        raise RunFailed(f"{error}{_way_on(to_resume) if error.resumes else ''}") from None


def _way_on(to_resume: Mapping[str, str]) -> str:
    settings = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in to_resume.items())
    return f"\nGo on with: --run-config '{settings} resume=true'"


def _without_traceback(record: logging.LogRecord) -> bool:
    """Lets every record pass; of an error that a person can act on, the message alone."""
    if record.exc_info and isinstance(error := record.exc_info[1], UnimissError):
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {error}", (), None
    return True
