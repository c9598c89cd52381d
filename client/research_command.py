"""`unimiss`: what a researcher does with a pretrained encoder.

unimiss import RELEASED.pth OUT_DIR               the authors' released weights as a checkpoint of ours
unimiss embed CHECKPOINT_DIR INPUT --out FILE.npz features of scans, or of an array that is already preprocessed
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unimiss_core import durable, progress
from unimiss_core.errors import ConfigError, NoUsableScanError, ScanError, UnimissError

if TYPE_CHECKING:  # torch takes seconds to import, and a wrong command line should not
    from unimiss_core.checkpoint import Manifest
    from unimiss_core.model import MiT

INTERRUPTED = 130


@dataclass(frozen=True)
class _Prepared:
    """One scan as the model takes it: values (C, *S), and its first file below the input folder ('' in an array)."""

    values: NDArray[np.float32]
    file: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `unimiss_core.errors`)."""
    options = _parser().parse_args(arguments)
    try:
        with progress.listen(_show_note):
            if options.command == "import":
                import_released(options.released, options.out)
            else:
                embed_input(
                    options.checkpoint,
                    options.input,
                    options.out,
                    batch=options.batch,
                    device=options.device,
                    show_paths=options.show_paths,
                )
    except UnimissError as error:
        print(f"unimiss {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0


def import_released(released: Path, out: Path) -> None:
    """Write the released student and teacher as the checkpoint folder `out`.

    The plan is the default one: the released code has none. Raises ConfigError: `out` holds something already.
    Raises CheckpointError: not a released file.
    """
    from unimiss_core import checkpoint
    from unimiss_core.released import read_released
    from unimiss_core.study import PlanConfig

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; give a new folder")
    found = read_released(released)
    checkpoint.save(
        out,
        origin="released",
        round=0,
        study_digest=None,
        model=found.model,
        plan=PlanConfig(),
        student=found.student,
        teacher=found.teacher,
    )
    print(f"{out}: {found.model.size} model with {found.model.prototypes} prototypes")


def embed_input(
    checkpoint: Path, source: Path, out: Path, *, batch: int = 8, device: str = "auto", show_paths: bool = False
) -> None:
    """Write what the checkpoint's teacher says about every scan of `source` to the .npz file `out`, in a fixed order.

    source: an .npy array (N, C, *S), taken as it is; or a folder of scans, each prepared by the checkpoint's plan
        and seen whole. What cannot be read is left out.
    out: `features` (N, width) float32 and `ranks` (N,); with `show_paths` also `files` (N,), each scan's first file
        below the folder, to join labels by.
    Raises ConfigError, CheckpointError, NoUsableScanError.
    """
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: the result is an .npz file; give it that ending")
    from unimiss_core.device import device_of
    from unimiss_core.embedding import load_encoder

    encoder, manifest = load_encoder(checkpoint)
    encoder.to(device_of(device))
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

    def add(self, scans: Sequence[_Prepared], encoder: "MiT") -> None:
        import torch

        from unimiss_core.embedding import embed

        values = np.stack([scan.values for scan in scans])
        try:
            self.features.append(embed(encoder, torch.from_numpy(values)).numpy())
        except ValueError as error:
            raise ConfigError(f"the scans do not fit the checkpoint: {error}") from None
        self.ranks += [scan.values.ndim - 1 for scan in scans]
        self.files += [scan.file for scan in scans]


def _array_scans(path: Path) -> Iterator[_Prepared]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or 'not an .npy file'})") from None
    except ValueError:
        raise ConfigError(f"{path}: is not an .npy array of numbers") from None
    if array.ndim not in (4, 5) or array.dtype.kind not in "fiu":
        raise ConfigError(
            f"{path}: expected numbers of shape (N, C, H, W) or (N, C, D, H, W), got {array.dtype} {array.shape}"
        )
    for index, scan in enumerate(array):
        values = np.array(scan, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ConfigError(f"{path}: entry {index} holds NaN or infinity")
        yield _Prepared(values, "")


def _folder_scans(folder: Path, manifest: "Manifest") -> Iterator[_Prepared]:
    from client.cache import read_scans
    from client.site_config import DataSource
    from unimiss_core.plan import prepare
    from unimiss_core.views import whole

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


def _write(path: Path, arrays: dict[str, Any]) -> None:
    payload = io.BytesIO()
    np.savez(payload, **arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, payload.getvalue())
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror})") from None


def _show_note(event: progress.Event) -> None:
    if isinstance(event, progress.Note):
        print(event.text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unimiss",
        description="What a researcher does with a pretrained encoder.",
        epilog="Exit codes: 0 done, 2 wrong input, 3 no usable scan, 4 bad checkpoint, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    released = commands.add_parser("import", help="turn the authors' released weights into a checkpoint")
    released.add_argument("released", type=Path, metavar="RELEASED.pth")
    released.add_argument("out", type=Path, metavar="OUT_DIR", help="folder of the checkpoint; must be new or empty")

    embed = commands.add_parser("embed", help="write one feature vector for each scan")
    embed.add_argument("checkpoint", type=Path, metavar="CHECKPOINT_DIR", help="such as OUT/checkpoints/round-0007")
    embed.add_argument(
        "input", type=Path, metavar="INPUT", help="folder of scans, or .npy array (N, C, *S) already preprocessed"
    )
    embed.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    embed.add_argument("--batch", type=_positive, default=8, metavar="N", help="scans at a time (default: 8)")
    embed.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    embed.add_argument("--show-paths", action="store_true", help="also write each scan's file below the folder")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
