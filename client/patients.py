"""Whose scan a file is, without keeping who that is.

A patient is known to the program by an HMAC-SHA-256 under a secret that stays in the site's state folder: equal
patients have equal keys at one site, and nobody without the secret can test a name or number against a key.
What the key is made of comes, in this order, from the source's table, from its pattern, or from the file itself
(DICOM PatientID and its issuer).
"""

import difflib
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from client.csv_tables import SURPLUS, rows_of
from client.site_config import DataSource, SiteConfig, TableConfig
from unimiss_core.errors import ConfigError, ScanError, UnknownPatientError
from unimiss_core.scan import Modality

_ISSUER = "\x1f"

MODALITY_NAMES: Mapping[str, Modality] = {
    **dict.fromkeys(("CT",), "CT"),
    **dict.fromkeys(("MR", "MRI"), "MR"),
    **dict.fromkeys(("PT", "PET"), "PT"),
    **dict.fromkeys(("XR", "CR", "DX", "RG", "RF", "MG", "CXR", "XRAY"), "XR"),
    **dict.fromkeys(("OT",), "OT"),
}


@dataclass(frozen=True)
class Patient:
    """key: HMAC-SHA-256 of the identifying text, 32 hex digits. place: where its hash falls in [0, 1)."""

    key: str
    place: float


@dataclass(frozen=True)
class Listed:
    """What a table says of one file."""

    patient: str | None
    modality: Modality | None


def load_secret(state: Path) -> bytes:
    """The site's secret for patient keys, made on first use and readable by its owner alone (0600)."""
    keep_secret(state, secrets.token_bytes(32))
    path = _secret_in(state)
    secret = path.read_bytes()
    if len(secret) != 32:
        raise ConfigError(f"{path}: expected 32 bytes, got {len(secret)}; restore it from a backup")
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: others can read it; expected mode 0600 (chmod 600)")
    return secret


def keep_secret(state: Path, secret: bytes) -> None:
    """Write the site's secret of 32 bytes, where it has none yet."""
    if (path := _secret_in(state)).exists():
        return
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = state / f".patient_secret.{secrets.token_hex(4)}"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)  # fails where another process was first: its secret is the one
    except FileExistsError:
        pass
    finally:
        partial.unlink()


def _secret_in(state: Path) -> Path:
    return state / "patient_secret"


def patient_of(text: str, secret: bytes) -> Patient:
    """The patient behind an identifying `text`; the text itself is not kept."""
    told = text.encode(errors="surrogatepass")  # a file's name need not be UTF-8
    key = hmac.new(secret, told, hashlib.sha256).hexdigest()[:32]
    # 52 bits, so that the quotient is below 1 and exact in a float64.
    place = int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 12
    return Patient(key=key, place=place / 2**52)


def dicom_patient_text(patient_id: str, issuer: str) -> str:
    """PatientID means something only with its issuer: two hospitals both have a number 1."""
    patient_id, issuer = patient_id.strip(), issuer.strip()
    return f"{patient_id}{_ISSUER}{issuer}" if issuer else patient_id


def ruled_patient(source: DataSource, below: PurePosixPath, listed: Listed | None) -> str | None:
    """The identifying text that the site file gives the file `below` the folder; None where it is silent.

    Raises ScanError(no_patient_match): the source has a pattern or a column, and it says nothing for this file.
    """
    if source.table is not None and source.table.patient is not None:
        if listed is None or not listed.patient:
            raise ScanError("no_patient_match", "the table's patient column is empty for a file")
        return listed.patient
    if source.patient_pattern is None:
        return None
    found = re.search(source.patient_pattern, below.as_posix())
    if found is None or not found["patient"]:
        raise ScanError("no_patient_match", "patient_pattern does not match the path of a file")
    return found["patient"]


def check_known(site: SiteConfig, assumed: Mapping[int, int]) -> None:
    """assumed: number of a data source -> its files of which nothing says whose they are. Raises UnknownPatientError:
    there are any, so that what a patient costs would be what one of its files does."""
    if assumed:
        told = ", ".join(f"{count} of 'data.{number}'" for number, count in sorted(assumed.items()))
        raise UnknownPatientError(
            f"site '{site.name}': a patient-level study counts patients, and nothing says whose these files are: "
            f"{told} (data sources from 0, in the order of the site file); give the source a patient_pattern, or a "
            "table with a patient column, or file_is_patient: true where every file is of another patient"
        )


def read_table(table: TableConfig) -> dict[PurePosixPath, Listed]:
    """The files that a table lists, after `where`, with what it says of each. Raises ConfigError."""
    listed: dict[PurePosixPath, Listed] = {}
    for number, name, row in _rows(table):
        patient = row[table.patient] if table.patient else None
        entry = Listed(patient=patient, modality=_table_modality(table, row, number))
        if listed.setdefault(name, entry) != entry:
            raise ConfigError(f"table {table.path}, line {number}: lists a file again with another patient or modality")
    return listed


def read_column(table: TableConfig, column: str) -> dict[PurePosixPath, str]:
    """What a column says of each file that `read_table` finds, empty where it says nothing. Raises ConfigError."""
    told: dict[PurePosixPath, str] = {}
    for number, name, row in _rows(table, column):
        if told.setdefault(name, row[column]) != row[column]:
            raise ConfigError(f"table {table.path}, line {number}: lists a file again with another '{column}'")
    return told


def _rows(table: TableConfig, *more: str) -> Iterator[tuple[int, PurePosixPath, Mapping[str, str]]]:
    """Line, file and row, after `where`; a file may come again. more: columns that must be there, besides the table's
    own. Raises ConfigError."""
    columns, rows = rows_of(table.path, named=str(table.path))
    if not rows:
        raise ConfigError(f"table {table.path}: holds no rows")
    _check_columns(table, columns, *more)
    for row in rows:
        where = f"table {table.path}, line {row.number}"
        if row.has_surplus:
            raise ConfigError(f"{where}: {SURPLUS}")
        if not row.is_among(table.where):
            continue
        name = PurePosixPath(row.cells[table.file])
        if not name.parts:  # it would name the whole folder
            raise ConfigError(f"{where}: column '{table.file}' is empty")
        if name.is_absolute() or ".." in name.parts:
            raise ConfigError(f"{where}: column '{table.file}' must stay below the folder")
        if "\0" in row.cells[table.file]:
            raise ConfigError(f"{where}: column '{table.file}' holds a NUL character")
        yield row.number, name, row.cells


def _check_columns(table: TableConfig, known: Sequence[str], *more: str) -> None:
    wanted = [table.file, *filter(None, (table.patient, table.modality)), *table.where, *more]
    problems = []
    for column in wanted:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            problems.append(f"no column '{column}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        elif known.count(column) > 1:
            problems.append(f"{known.count(column)} columns '{column}'")
    if problems:
        raise ConfigError(f"table {table.path}: " + "; ".join(problems))


def _table_modality(table: TableConfig, row: Mapping[str, str], number: int) -> Modality | None:
    if table.modality is None:
        return None
    # The first word decides: 'MR_T1' is MR.
    word = re.split(r"[^A-Z]", row[table.modality].upper(), maxsplit=1)[0]
    if word not in MODALITY_NAMES:
        raise ConfigError(
            f"table {table.path}, line {number}: column '{table.modality}' must hold one of "
            f"{', '.join(sorted(MODALITY_NAMES))}"
        )
    return MODALITY_NAMES[word]
