"""Every error a user can meet, and the exit code that its command ends with.

UnimissError            1  anything below that has no code of its own
├── ConfigError         2  a configuration file or command line is wrong
│   ├── RunFolderError  2  a run's folder holds a run already, is in use, or cannot be written to
│   └── UnknownPatientError 2  a private study would have to guess whose a site's files are
├── NoUsableScanError   3  a data folder holds nothing that can be trained on
├── CheckpointError     4  a checkpoint is missing, not readable, damaged, of another version or not signed as asked
├── RoundError          5  a round could not be completed (too few sites replied)
├── LedgerError         6  the record of what patients have cost is damaged, or was put back to an older one
├── PrivacyClaimError   7  an audit measured what contradicts a study's promise of privacy
├── AuditError          8  what was done cannot be written down, or the log of it is damaged
│   └── AuditDiskError  8  the former, for want of room or of rights; a run goes on once that is mended
├── PolicyError         1  a study asks for more than the site's policy allows; nothing was read for it
├── PrivacyBudgetError  1  a round would cost patients, or sites, more than is allowed; nothing was read for it
├── NonFiniteLossError  1  a training step met NaN or infinity and was not taken, or a model answers them
├── DeviceError         1  a device or the process that trains on it was lost or hangs; it costs the site its round
├── MemoryTooSmallError 1  a device cannot hold a training step on a single scan
├── ExportError         1  an exported model does not answer as the one that it was made of; nothing of it was left
├── WireError           1  a message of the peer breaks the contract; it costs that peer its round
└── ScanError           1  one scan cannot be used; it is left out with a reason code, never fatal

130 is Ctrl-C (128 + SIGINT). A message never holds a patient identifier, a pixel, or a path below a
data root: name the configuration key, the site and the reason code instead.
"""

import traceback
from pathlib import Path


class UnimissError(Exception):
    """A mistake or a state of the world that a person can act on; shown as one message, no stack trace."""

    exit_code = 1
    resumes = False
    """Whether a run that is resumed may go on, once what the message says is done."""


class ConfigError(UnimissError):
    exit_code = 2


class RunFolderError(ConfigError):
    """The folder is another run's, or is in use or full; what was finished in it is saved."""

    resumes = True


class UnknownPatientError(ConfigError):
    """Files of a site do not say whose they are: a private study would charge a guess, and is refused."""


class NoUsableScanError(UnimissError):
    exit_code = 3


class CheckpointError(UnimissError):
    exit_code = 4


class RoundError(UnimissError):
    exit_code = 5
    resumes = True


class LedgerError(UnimissError):
    """A site's ledger cannot be relied upon; no private round begins before a person has looked at it."""

    exit_code = 6


class PrivacyClaimError(UnimissError):
    """What the private engine releases is not what a study claims; nothing private should be trained with it."""

    exit_code = 7


class AuditError(UnimissError):
    """An audit log cannot be relied upon, or not be written to; nothing that belongs into it is done."""

    exit_code = 8


class AuditDiskError(AuditError):
    """The disk is full at a line of an audit log, or its folder cannot be written to; the log itself is sound."""


class PolicyError(UnimissError):
    """A study or request is beyond what the site's own file allows; it was refused before anything was read for it."""


class PrivacyBudgetError(UnimissError):
    """A round would cost patients, or whole sites, more than they may cost; it was neither charged nor begun."""


class NonFiniteLossError(UnimissError):
    """A training step met NaN or infinity; nothing was changed by it, and the next batch may be tried. Or a model that
    is asked answers with them; nothing is made of its answers."""


class DeviceError(UnimissError):
    """One of the site's devices, or a process that trained on it, was lost or hangs. No process of the round is left,
    but one that a device's driver does not let go of."""


class MemoryTooSmallError(UnimissError):
    """A device cannot hold a training step on a single scan, or what goes with it; nothing was changed by it."""


class ExportError(UnimissError):
    """An exported model does not answer as the one that it was made of; nothing of it was left on the disk."""


class WireError(UnimissError):
    """What the peer sent cannot count. `reason` is a fixed code that may cross the wire and be logged."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["WireError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class ScanError(UnimissError):
    """One scan is left out. `reason` is a machine-readable code (`missing_slices`, `not_an_image`, ...).

    `detail` explains it in words and numbers of geometry; never a name, an identifier or a path.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def where(error: BaseException) -> str:
    """Kind and place of an error without its text, which could hold a path or an identifier."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def first_line(error: BaseException) -> str:
    """A library's own words, of devices and sums, without any that may be a path; its kind where it has none. Lines
    after the first are advice, and places in its source."""
    line = str(error).strip().partition("\n")[0]
    return " ".join(word for word in line.split() if "/" not in word and "\\" not in word)[:300] or type(error).__name__
