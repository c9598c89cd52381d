"""The folder that a fine-tuning works in: of its own files alone, and of one fine-tuning at a time.

OUT/finetune.lock     says that the folder is a fine-tuning's, and is held by the one at work; goes when it is finished
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from client.task_training import STATE
from unimiss_core.errors import ConfigError
from unimiss_core.locks import locked

METRICS = "metrics.json"
"""Where it stands, the work is done."""
_MARK = "finetune.lock"


def check_folder(out: Path, *, resume: bool) -> None:
    """Before hours of work; makes nothing. Raises ConfigError: it holds what this fine-tuning would overwrite, or
    another is at work there."""
    mark = out / _MARK
    if mark.is_file():
        with _held(mark):
            pass
    _check_content(out, resume=resume)


def is_finished(out: Path) -> bool:
    """Whether work is done there, whichever (`client.made_of`)."""
    return (out / METRICS).exists()


@contextmanager
def alone_in(out: Path, *, resume: bool) -> Iterator[None]:
    """Make the folder, and hold it against other fine-tunings. Raises ConfigError, as `check_folder`; or it cannot be
    made."""
    _check_content(out, resume=resume)  # before the mark makes it a fine-tuning's
    mark = out / _MARK
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise ConfigError(f"out: the folder {out} cannot be made ({error.strerror}); give another with --out") from None
    with _held(mark):
        _check_content(out, resume=resume)  # another may have worked here meanwhile
        yield
    if is_finished(out):
        mark.unlink(missing_ok=True)


def _check_content(out: Path, *, resume: bool) -> None:
    if is_finished(out):
        raise ConfigError(
            "out: holds a finished fine-tuning, which --resume leaves as it is; give another folder with --out"
        )
    if (out / STATE).exists():
        if not resume:
            raise ConfigError(
                "out: holds a fine-tuning that was interrupted; go on with --resume, or give another --out"
            )
    elif out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise ConfigError(f"out: the folder {out} holds what no fine-tuning wrote; give a new or empty one with --out")


@contextmanager
def _held(mark: Path) -> Iterator[None]:
    """Raises ConfigError: another process holds it."""
    with ExitStack() as holding:
        try:
            holding.enter_context(locked(holding.enter_context(mark.open("r+b")), wait=False))
        except BlockingIOError:
            raise ConfigError(
                "out: another fine-tuning is at work in this folder; wait for its end, or give another with --out"
            ) from None
        except OSError:  # a disk without locks: then nothing is held
            pass
        yield
