"""A run's state after a round, as a folder that appears whole or not at all and describes itself.

    round-0007/
        manifest.json          what this is: see `Manifest`
        manifest.sig           of who made it, where they sign: covers the manifest, and by its digests every file
        student.safetensors    the global student, float32, named as in the model
        teacher.safetensors    the global teacher (what embedding and fine-tuning use)
        server.json            the coordinator's bookkeeping, which resuming needs
        server.safetensors     tensors that only resuming needs; where there are any

Embedding and fine-tuning never open the server's two files, so that a checkpoint may be handed on without them.

Nothing is ever unpickled. No time and no host stands in a checkpoint, so that equal runs give equal bytes.
"""

import base64
import binascii
import hashlib
import re
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError

from unimiss_core import durable
from unimiss_core.config import Config
from unimiss_core.errors import CheckpointError
from unimiss_core.json_text import object_in
from unimiss_core.keys import SigningKey, SigningPublicKey, fingerprint, is_signed, sign
from unimiss_core.study import ModelConfig, PlanConfig

if TYPE_CHECKING:  # it takes seconds to import, and who runs the coordinator's processes reads manifests alone
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"
_SERVER_JSON, _SERVER_TENSORS = "server.json", "server.safetensors"
SERVERS_OWN = frozenset((_SERVER_JSON, _SERVER_TENSORS))
"""Files that resuming needs, and nothing else."""
PURPOSE = "unimiss checkpoint manifest 1"
"""What a signature of a manifest is bound to, so that it is one of nothing else."""
_FOLDER_NAME = re.compile(r"round-([0-9]{4,})")


class Manifest(Config):
    format_version: int = FORMAT_VERSION
    origin: Literal["federation", "released"]
    """Made by a run of ours, or imported from the authors' released weights."""
    round: int = Field(ge=0)
    """Rounds finished; 0 is the initial or imported state."""
    study_digest: str | None
    """sha256 of the study; None for imported weights."""
    model: ModelConfig
    plan: PlanConfig
    """The preprocessing that the weights were trained with."""
    tensors: Mapping[str, tuple[int, ...]]
    """Name -> shape, the same for student and teacher."""
    sha256: Mapping[str, str]
    """File name -> sha256 of its bytes."""


@dataclass(frozen=True)
class Checkpoint:
    manifest: Manifest
    student: "Mapping[str, Tensor]"
    teacher: "Mapping[str, Tensor]"
    server_json: str
    """The coordinator's bookkeeping as it wrote it; `{}` for imported weights, or where it was not asked for."""
    server_tensors: "Mapping[str, Tensor]"
    """`prefix.name` -> what is kept of the parameter `name`; empty where there is nothing or it was not asked for."""


def folder_name(round: int) -> str:
    return f"round-{round:04d}"


def round_of(folder: Path) -> int:
    """The number in the name that `folder_name` gave."""
    return int(folder.name.removeprefix("round-"))


def save(
    folder: Path,
    *,
    origin: Literal["federation", "released"],
    round: int,
    study_digest: str | None,
    model: ModelConfig,
    plan: PlanConfig,
    student: "Mapping[str, Tensor]",
    teacher: "Mapping[str, Tensor]",
    server_json: str = "{}",
    server_tensors: "Mapping[str, Tensor] | None" = None,
    signing_key: SigningKey | None = None,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint as `folder`, in one rename.

    server_tensors: named `prefix.name` after the parameter they belong to, and of its shape. signing_key: of who makes
    it; None leaves it unsigned. before: as of `durable.new_folder`.
    """
    files = {STUDENT: student, TEACHER: teacher}
    if server_tensors:
        files[_SERVER_TENSORS] = server_tensors
    with durable.new_folder(folder, before=before) as partial:
        (partial / _SERVER_JSON).write_bytes(server_json.encode())
        mode = stat.S_IMODE((partial / _SERVER_JSON).stat().st_mode)  # what a new file gets here
        paths = [partial / name for name in files]
        with ThreadPoolExecutor(2 * len(files)) as together:  # writing, hashing and the disk leave Python to others
            list(together.map(lambda path, held: _write(path, held, mode=mode), paths, files.values()))
            synced = together.map(durable.sync, paths)
            digests = dict(zip(files, together.map(_sha256_of, paths), strict=True))
            list(synced)
        manifest = Manifest(
            origin=origin,
            round=round,
            study_digest=study_digest,
            model=model,
            plan=plan,
            tensors={name: tuple(tensor.shape) for name, tensor in sorted(student.items())},
            sha256={**digests, _SERVER_JSON: hashlib.sha256(server_json.encode()).hexdigest()},
        )
        written = (manifest.model_dump_json(indent=2) + "\n").encode()
        (partial / MANIFEST).write_bytes(written)
        if signing_key is not None:
            (partial / SIGNATURE).write_bytes(base64.b64encode(sign(signing_key, PURPOSE, written)) + b"\n")


def load(folder: Path, *, to_resume: bool = False, key: SigningPublicKey | None = None) -> Checkpoint:
    """Read a checkpoint and check every file that is read against the manifest.

    to_resume: read the server's files too. key: of who must have signed the manifest; None asks for no signature.
    Raises CheckpointError: no checkpoint there, another format version, a file or tensor changed or missing, not signed
    by that key.
    """
    from safetensors.torch import load as load_tensors

    manifest = read_manifest(folder, key=key)
    wanted = {name: digest for name, digest in manifest.sha256.items() if to_resume or name not in SERVERS_OWN}
    payloads = {name: _read_checked(folder, name, digest) for name, digest in wanted.items()}
    try:
        student = load_tensors(payloads[STUDENT])
        teacher = load_tensors(payloads[TEACHER])
        server_json = payloads[_SERVER_JSON].decode() if to_resume else "{}"
        server_tensors = load_tensors(payloads[_SERVER_TENSORS]) if _SERVER_TENSORS in payloads else {}
    except (KeyError, SafetensorError, UnicodeDecodeError):
        raise CheckpointError(f"{folder}: the files do not hold what the manifest says; take another copy") from None
    for part, tensors in {"student": student, "teacher": teacher}.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != manifest.tensors:
            odd = sorted(shapes.items() ^ manifest.tensors.items())[:3]
            raise CheckpointError(f"{folder}: {part} does not hold the tensors that the manifest names: {odd}")
    for name, tensor in server_tensors.items():
        if manifest.tensors.get(name.partition(".")[2]) != tuple(tensor.shape):
            raise CheckpointError(f"{folder}: server holds {name}, which is the state of no tensor of the manifest")
    return Checkpoint(manifest, student, teacher, server_json, server_tensors)


def verify(folder: Path, *, key: SigningPublicKey | None = None) -> tuple[Checkpoint, frozenset[str]]:
    """Check every file that is there, and that its tensors are those of the manifest; what was read, and which files
    that only the server needs are not there. Raises as `load`."""
    found = load(folder, key=key)
    servers_own = found.manifest.sha256.keys() & SERVERS_OWN
    absent = frozenset(name for name in servers_own if not (folder / name).exists())
    for name in servers_own - absent:
        _read_checked(folder, name, found.manifest.sha256[name])
    return found, absent


def is_signature_there(folder: Path) -> bool:
    return (folder / SIGNATURE).exists()


def read_manifest(folder: Path, *, key: SigningPublicKey | None = None) -> Manifest:
    """The manifest alone, not yet checked against the files. key: as for `load`. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        written = path.read_bytes()
        if key is not None:
            _require_signature(folder, written, key)
        require_version(written, path, FORMAT_VERSION)
        manifest = Manifest.model_validate_json(written)
    except (FileNotFoundError, NotADirectoryError):
        require_there(folder)
        raise CheckpointError(
            f"{folder}: no manifest.json there; give a checkpoint folder such as OUT/checkpoints/{folder_name(7)}"
        ) from None
    except OSError as error:
        raise unreadable(folder, MANIFEST, error) from None
    except ValidationError:
        raise CheckpointError(f"{path}: is not a manifest of this program; take another copy") from None
    return manifest


def require_there(folder: Path) -> None:
    """Raises CheckpointError: there is nothing at all, which is another mistake than a folder that holds something
    else; or nobody may look into it."""
    try:
        is_there, _ = folder.exists(), (folder / MANIFEST).exists()
    except PermissionError as error:
        raise CheckpointError(f"{folder}: cannot be looked into ({error.strerror})") from None
    if not is_there:
        raise CheckpointError(f"{folder}: does not exist; check the path")


def unreadable(folder: Path, name: str, error: OSError) -> CheckpointError:
    """Of a file that is there, so that nobody looks for another copy of it."""
    way_out = "have its owner let you read it, or type this as its owner" if isinstance(error, PermissionError) else ""
    told = f"{folder}: {name} cannot be read ({error.strerror})"
    return CheckpointError(f"{told}; {way_out}" if way_out else told)


def require_version(written: bytes, path: Path, version: int) -> None:
    """Before the rest of a description is looked at, which another version may spell otherwise.

    written: its JSON; what is none, or says no version, is left to who reads the rest. Raises CheckpointError.
    """
    try:
        told = object_in(written)["format_version"]
    except (ValueError, KeyError):
        return
    if told != version:
        raise CheckpointError(
            f"{path}: has format version {told}, this program reads {version}; "
            "use the version of the program that wrote it"
        )


def numbered(checkpoints: Path) -> dict[int, Path]:
    """Number -> folder of each finished round below `checkpoints`."""
    return {
        int(match[1]): folder
        for folder in checkpoints.glob("round-*")
        if (match := _FOLDER_NAME.fullmatch(folder.name))
    }


def latest(checkpoints: Path) -> Path | None:
    """The folder of the highest finished round below `checkpoints`, by the number in its name; None where none is."""
    if not (found := numbered(checkpoints)):
        return None
    number, folder = max(found.items())
    if (manifest := read_manifest(folder)).round != number:
        raise CheckpointError(f"{folder}: the name says round {number}, the manifest {manifest.round}; rename it back")
    return folder


def _require_signature(folder: Path, manifest: bytes, key: SigningPublicKey) -> None:
    try:
        signature = base64.b64decode((folder / SIGNATURE).read_bytes().strip(), validate=True)
    except PermissionError as error:
        raise unreadable(folder, SIGNATURE, error) from None
    except OSError:
        raise CheckpointError(
            f"{folder}: holds no {SIGNATURE}, and should be signed by {fingerprint(key)}; take a signed copy from who "
            "made it, or give no key to trust it as it is"
        ) from None
    except binascii.Error:
        signature = b""
    if not is_signed(key, PURPOSE, manifest, signature):
        raise CheckpointError(
            f"{folder}: {SIGNATURE} is not of the key {fingerprint(key)}, or {MANIFEST} was changed after it was "
            "signed; take another copy, or the key of who made it"
        )


def _plain(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}


def _write(path: Path, tensors: "Mapping[str, Tensor]", *, mode: int) -> None:
    from safetensors.torch import save_file

    save_file(_plain(tensors), path)  # straight to disk: as bytes they take as much memory again
    path.chmod(mode)  # safetensors makes it readable by its owner alone, whatever the umask, as if it were a secret


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_checked(folder: Path, name: str, digest: str) -> bytes:
    if Path(name).name != name:
        raise CheckpointError(f"{folder}: the manifest names '{name}', which is not a file of this folder")
    try:
        payload = (folder / name).read_bytes()
    except PermissionError as error:
        raise unreadable(folder, name, error) from None
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise CheckpointError(f"{folder}: {name} is missing; take another copy of the checkpoint") from None
    if hashlib.sha256(payload).hexdigest() != digest:
        raise CheckpointError(f"{folder}: {name} was changed after it was written; take another copy")
    return payload
