"""`unimiss-server export`: a finished round's model as a folder to hand on, without what is the coordinator's own."""

import hashlib
import os
import shutil
from pathlib import Path

from server.artefacts import read_artefacts
from server.founding import Note, unnoted
from server.home import Home
from server.model_card import model_card, site_epsilon_by
from unimiss_core import checkpoint, durable, keys, trained_by
from unimiss_core.checkpoint import MANIFEST, SIGNATURE, STUDENT, TEACHER
from unimiss_core.config import load
from unimiss_core.errors import CheckpointError, ConfigError
from unimiss_core.study import StudyConfig

STUDY, CARD = "study.yaml", "README.md"


def export(home: Home, study: str, out: Path, *, round: int | None = None, note: Note = unnoted) -> checkpoint.Manifest:
    """Write the student and the teacher of a round, the newest where none is named, with manifest, signature, study,
    model card and the number of sites, as the folder `out`.

    study: its name, as its folder below `runs` is called. Raises ConfigError: no such study or `out` is not empty;
    CheckpointError: no such round, damaged, not readable, or not signed by this
    coordinator; AuditError, as `note`, upon which nothing of `out` is left.
    """
    source = _source(home, study, round)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not empty; give a new folder")
    key = keys.read_signing_public_key(home.signing_public_key)
    run = home.run(study)
    try:
        with durable.new_folder(out.absolute()) as partial:
            for name in (MANIFEST, SIGNATURE, STUDENT, TEACHER):
                _copy(source, partial, name)
            found = checkpoint.load(partial, key=key).manifest  # the copy: what was read is what is handed on
            told = load(StudyConfig, run / STUDY)
            if told.digest() != found.study_digest:
                raise CheckpointError(f"{source}: is of another study than {run / STUDY}; put back the file as it was")
            shutil.copyfile(run / STUDY, partial / STUDY)
            artefacts = read_artefacts(run)
            card = model_card(found, told, artefacts, signed_by=keys.fingerprint(key))
            (partial / CARD).write_text(card, encoding="utf-8")
            if (counted := trained_by.of_run(run, found.round)) is not None:
                paid = site_epsilon_by(told, found.round, artefacts)
                trained_by.write(partial, counted.model_copy(update={"site_epsilon": paid}))
            digest = hashlib.sha256((partial / MANIFEST).read_bytes()).hexdigest()
            note("export", {"study": study, "round": found.round, "manifest": digest})  # first: else nothing is left
    except OSError as error:
        raise _of_what(error, run, out) from None
    return found


def _source(home: Home, study: str, round: int | None) -> Path:
    """The checkpoint's folder."""
    run = home.run(study)
    if run.parent != home.runs or not (run / STUDY).is_file():
        known = sorted(path.parent.name for path in home.runs.glob(f"*/{STUDY}"))
        there = f"there are: {', '.join(known)}" if known else "none was run yet"
        raise ConfigError(f"'{study}': no study of that name was run in {home.path}; {there}")
    newest = checkpoint.latest(run / "checkpoints")
    source = run / "checkpoints" / checkpoint.folder_name(round) if round is not None else newest
    if source is None or not source.is_dir():
        kept = f"the newest is round {checkpoint.round_of(newest)}" if newest else "it holds none"
        raise CheckpointError(f"{run}: holds no checkpoint of that round; {kept}")
    if checkpoint.round_of(source) == 0:
        raise CheckpointError(f"{run}: no round is finished yet, and round 0 is what was begun from")
    return source


def _of_what(error: OSError, run: Path, out: Path) -> ConfigError:
    """Of the run nothing is written and of `out` nothing is read, so the place says which it was."""
    place = Path(os.fsdecode(error.filename or out))
    if place.is_relative_to(run):
        return ConfigError(f"{place}: cannot be read ({error.strerror}); nothing was exported")
    return ConfigError(f"--out {out}: cannot be written ({error.strerror})")


def _copy(source: Path, into: Path, name: str) -> None:
    try:
        shutil.copyfile(source / name, into / name)
    except FileNotFoundError:
        if name != SIGNATURE:  # what is unsigned is told when the copy is loaded
            raise CheckpointError(f"{source}: {name} is missing; take a round that is whole") from None
    except PermissionError as error:
        if error.filename != str(source / name):  # it could not be written
            raise
        raise checkpoint.unreadable(source, name, error) from None
