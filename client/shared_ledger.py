"""Whose a charge is in a ledger of several sites, and that a site counts in the same ledger as before.

A run's id is known to all parties of its federation, and two sites may even take part in one; so each site marks what
it is charged for, and goes on under no other's charge. At its first charge it notes, in its state folder, what it calls
itself and which folder it counts in: a site file that lost the setting, or names another folder, would begin to count
from zero, or in a copy from which the others' charges stay away.
"""

import secrets
from os.path import realpath
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from unimiss_core import durable
from unimiss_core.config import Config
from unimiss_core.errors import LedgerError

NOTE = "shared_ledger.json"
"""In the state folder."""
OWNER = "[0-9a-f]{16}"


class Note(Config):
    owner: Annotated[str, Field(pattern=f"^{OWNER}$")]
    """At random, for the other sites and whoever reads the ledger know nothing by it."""
    folder: str
    """Where the ledger lay at the first charge."""


def note_in(state: Path) -> Note | None:
    """None: this site was never charged in a ledger elsewhere. Raises LedgerError: the note is damaged; OSError."""
    try:
        text = (state / NOTE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = ""
    try:
        return Note.model_validate_json(text)
    except ValidationError:
        raise LedgerError(
            f"'{NOTE}' of the state folder is damaged, which says in which ledger this site counts; see that 'ledger' "
            "of the site file names it, then delete the note: the site is charged under another mark from then on"
        ) from None


def noted_in(state: Path, folder: Path) -> Note:
    """The note, which is written where there is none: from here on this site counts in `folder`. Raises OSError."""
    if (note := note_in(state)) is None:
        note = Note(owner=secrets.token_hex(8), folder=realpath(folder))
        durable.make_folder(state)
        durable.write_text(state / NOTE, note.canonical() + "\n")
    return note
