"""What the `unimiss` command does: import released weights, and embed scans."""

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from client.reading import read_scans
from client.site_config import DataSource
from unimiss_core import checkpoint, durable, progress
from unimiss_core.checkpoint import Manifest
from unimiss_core.device import device_of
from unimiss_core.embedding import embed, load_encoder
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.keys import read_signing_public_key
from unimiss_core.model import MiT
from unimiss_core.plan import prepare
from unimiss_core.released import read_released
from unimiss_core.study import PlanConfig
from unimiss_core.views import whole


@dataclass(frozen=True)
class _Prepared:
    """One scan as the model takes it: values (C, *S), and its first file below the input folder ('' in an array)."""

    values: NDArray[np.float32]
    file: str


def import_released(released: Path, out: Path) -> None:
    """Write the released student and teacher as the checkpoint folder `out`.

    The plan is the default one: the released code has none. Raises ConfigError: `out` holds something already, or
    cannot be written. Raises CheckpointError: not a released file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; give a new folder")
    found = read_released(released)
    try:
        checkpoint.save(
            out.resolve(),  # "." has no name to write beside
            origin="released",
            round=0,
            study_digest=None,
            model=found.model,
            plan=PlanConfig(),
            student=found.student,
            teacher=found.teacher,
        )
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"{out}: {found.model.size} model with {found.model.prototypes} prototypes")


def embed_input(
    checkpoint: Path,
    source: Path,
    out: Path,
    *,
    batch: int = 8,
    device: str = "auto",
    show_paths: bool = False,
    key: Path | None = None,
) -> None:
    """Write what the checkpoint's teacher says about every scan of `source` to the .npz file `out`.

    source: an .npy array (N, C, *S), taken as it is; or a folder of scans of any rank, each prepared by the
        checkpoint's plan and seen whole. What cannot be read is left out.
    out: `features` (N, width) float32 and `ranks` (N,); with `show_paths` also `files` (N,), each scan's first file
        below the folder, to join labels by. Rows stand in the array's order; of a folder, pictures and NIfTI volumes
        by path, a folder's files before its subfolders, then DICOM series by the path of their first file.
    key: the public key that must have signed the checkpoint.
    Raises ConfigError, CheckpointError, NoUsableScanError.
    """
    encoder, manifest = load_encoder(checkpoint, key=read_signing_public_key(key) if key else None)
    encoder.to(device_of(device))
    _check_writable(out)
    scans = _array_scans(source) if source.suffix == ".npy" else _folder_scans(source, manifest)
    found = _Embedded()
    for alike in _batches(scans, batch):
        found.add(alike, encoder)
    if not found.features:
        raise NoUsableScanError(f"{source}: holds no scan that can be used")
    result = {"features": np.concatenate(found.features), "ranks": np.array(found.ranks)}
    if show_paths:
        result["files"] = np.array(found.files)
    _write(out, result)
    print(f"{out}: {len(result['features'])} scans, {result['features'].shape[1]} features each")


@dataclass
class _Embedded:
    """What came out so far: batches of features (n, width), and rank and file of each scan."""

    features: list[NDArray[np.float32]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, scans: Sequence[_Prepared], encoder: MiT) -> None:
        values = torch.from_numpy(np.stack([scan.values for scan in scans]))
        try:
            features = embed(encoder, values)
        except ValueError as error:
            raise ConfigError(f"the scans do not fit the checkpoint: {error}") from None
        except RuntimeError as error:
            if "allocate" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"scans of shape {tuple(values.shape)} need more memory than there is; give smaller ones, "
                "or fewer at a time with --batch"
            ) from None
        if not features.isfinite().all():
            first = len(self.ranks)
            raise ConfigError(
                f"the encoder's answer is not finite for scans {first} to {first + len(scans) - 1}; "
                "expected values of about -2 to 2, as the checkpoint's plan prepares them"
            )
        self.features.append(features.numpy())
        self.ranks += [scan.values.ndim - 1 for scan in scans]
        self.files += [scan.file for scan in scans]


def _array_scans(path: Path) -> Iterator[_Prepared]:
    array = _opened(path)
    if array.ndim not in (4, 5) or array.dtype.kind not in "fiu":
        raise ConfigError(
            f"{path}: expected numbers of shape (N, C, H, W) or (N, C, D, H, W), got {array.dtype} {array.shape}"
        )
    for index, scan in enumerate(array):
        with np.errstate(over="ignore"):
            values = np.array(scan, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ConfigError(f"{path}: entry {index} holds NaN, infinity or a value beyond float32")
        yield _Prepared(values, "")


def _opened(path: Path) -> NDArray[Any]:
    try:
        return open_memmap(path, mode="r")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or 'not an .npy file'})") from None
    except Exception:  # what NumPy raises for a strange header is anybody's guess
        raise ConfigError(f"{path}: is not an .npy array of numbers, as numpy.save writes it") from None


def _folder_scans(folder: Path, manifest: Manifest) -> Iterator[_Prepared]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is neither an .npy file nor a folder of scans")
    for origin, scan in read_scans([DataSource(folder=folder)], manifest.plan):
        try:
            values, _ = prepare(scan, manifest.plan)
        except ScanError as error:
            progress.report(progress.Note(f"left out: {error.reason}"))
        else:
            size = manifest.model.image_size if scan.rank == 2 else manifest.model.volume_size
            yield _Prepared(whole(values, size).numpy(), origin.files[0])


def _batches(scans: Iterator[_Prepared], size: int) -> Iterator[list[_Prepared]]:
    """Runs of scans of one shape, each at most `size` long."""
    batch: list[_Prepared] = []
    for scan in scans:
        if batch and (len(batch) == size or scan.values.shape != batch[0].values.shape):
            yield batch
            batch = []
        batch.append(scan)
    if batch:
        yield batch


def _check_writable(out: Path) -> None:
    """Before hours of work; makes no folder yet. Raises ConfigError."""
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: the result is an .npz file; give it that ending")
    try:
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder; give the name of a file")
        nearest = next(folder for folder in out.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None


def _write(path: Path, arrays: dict[str, Any]) -> None:
    payload = io.BytesIO()
    np.savez(payload, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, payload.getvalue())
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from None
