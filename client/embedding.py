"""`unimiss embed`: what an encoder says about scans, one feature vector for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from client.beginning import Beginning, begin
from client.feature_files import Labels, check_ending, feature_file
from client.finetune_config import FromCheckpoint
from client.outputs import check_file
from client.reading import Reading
from client.unnamed_scans import tell_of_unnamed
from unimiss_core import progress
from unimiss_core.backbone import Backbone
from unimiss_core.device import device_of, is_out_of_memory
from unimiss_core.embedding import embed
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError
from unimiss_core.scan import Modality


@dataclass(frozen=True)
class _Prepared:
    """One scan as the model takes it: values (C, *S), and what it is called in the result."""

    values: NDArray[np.float32]
    names: tuple[tuple[str, str], ...]
    """`key`, and perhaps `file`; none in an array."""


def embed_input(
    checkpoint: Path,
    source: Path,
    out: Path,
    *,
    batch: int = 8,
    device: str = "auto",
    show_paths: bool = False,
    key: Path | None = None,
    modality: Modality | None = None,
) -> None:
    """Write what the checkpoint's teacher, or a fine-tuned model's encoder, says about every scan of `source` to `out`.

    source: an .npy array (N, C, *S), taken as it is; or a folder of scans of any rank, or one file, each prepared by
        the checkpoint's plan and seen whole. What cannot be read is left out.
    out: a new .npz or .parquet (`client.feature_files`): features, the rank of each scan and, but of an array, its key
        (`client.reading`); with `show_paths` also its first file below the folder, to join labels by. Rows stand in the
        array's order, or in that of `client.reading`.
        A fine-tuned model takes scans of its task's rank, and leaves the others out.
    key: the public key that must have signed the checkpoint. modality: of files that do not say it; None takes what a
        fine-tuned model was trained with.
    Raises ConfigError, CheckpointError, NoUsableScanError.
    """
    beginning = begin(FromCheckpoint(folder=checkpoint, key=key))
    encoder = beginning.encoder()
    encoder.to(device_of(device))
    check_ending(out)
    check_file("--out", out, must_be_new=True)
    is_array = source.suffix == ".npy"
    scans = _array_scans(source) if is_array else _read_scans(source, beginning, modality, show_paths=show_paths)
    try:
        count, width = _write(out, encoder, _batches(scans, batch))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from None
    if not count:
        raise NoUsableScanError(f"{source}: holds no scan that can be used")
    print(f"{out}: {count} scans, {width} features each")


def _write(out: Path, encoder: Backbone, batches: Iterator[list[_Prepared]]) -> tuple[int, int]:
    """Each batch as it comes; (N, width) of what was written. Raises OSError."""
    done = width = 0
    with feature_file(out) as file:
        for scans in batches:
            features = _features(encoder, scans, done)
            file.add(features, _labels(scans))
            done, width = done + len(scans), features.shape[1]
        if done:
            file.finish()
    return done, width


def _features(encoder: Backbone, scans: Sequence[_Prepared], first: int) -> NDArray[np.float32]:
    """(n, width). first: number of the first of these scans, from 0."""
    values = torch.from_numpy(np.stack([scan.values for scan in scans]))
    try:
        features = embed(encoder, values)
    except ValueError as error:
        raise ConfigError(f"the scans do not fit the checkpoint: {error}") from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"scans of shape {tuple(values.shape)} need more memory than there is; give smaller ones, "
            "or fewer at a time with --batch"
        ) from None
    if not features.isfinite().all():
        raise ConfigError(
            f"the encoder's answer is not finite for scans {first} to {first + len(scans) - 1}; "
            "expected values of about -2 to 2, as the checkpoint's plan prepares them"
        )
    return features.numpy()


def _labels(scans: Sequence[_Prepared]) -> Labels:
    labels: dict[str, list[Any]] = {"rank": [scan.values.ndim - 1 for scan in scans]}
    for scan in scans:
        for name, value in scan.names:
            labels.setdefault(name, []).append(value)
    return labels


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
        yield _Prepared(values, ())


def _opened(path: Path) -> NDArray[Any]:
    try:
        return open_memmap(path, mode="r")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or 'not an .npy file'})") from None
    except Exception:  # what NumPy raises for a strange header is anybody's guess
        raise ConfigError(f"{path}: is not an .npy array of numbers, as numpy.save writes it") from None


def _read_scans(
    path: Path, beginning: Beginning, modality: Modality | None, *, show_paths: bool
) -> Iterator[_Prepared]:
    if not path.exists():
        raise ConfigError(f"{path}: does not exist; give a folder of scans, one file or an .npy array")
    modality = modality or beginning.modality
    reading = Reading.of_path(path, beginning.plan, modality)
    for origin, scan in reading:
        try:
            values = beginning.seen_whole(scan)
        except ScanError as error:
            reading.leave_out(origin, error.reason)
        else:
            names = (("key", origin.key), *((("file", origin.files[0]),) if show_paths else ()))
            yield _Prepared(values.numpy(), names)
        progress.report(progress.StepDone("scans", origin.number, len(reading), None))
    reading.explain()
    if modality is None:
        tell_of_unnamed(candidate.modality for candidate in reading.found.candidates)


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
