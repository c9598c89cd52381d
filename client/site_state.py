"""What a site remembers between rounds of a run, on its own disk: optimiser moments, teacher, centre, and under FedEMA
the student that it trained to.

Each run has a folder, `runs/<its id>`, so that two runs, though of one study, never find each other's state. In it one
file per round, `round-0007.safetensors`: the state after that round. The last two are kept, because a round that the
coordinator asks for a second time (it was killed before it had saved the first) must start where the first did. Beside
them `unfinished.safetensors` holds the round at work, as far as it was saved on the way. Each says what its content
comes to, so that a disk that spoils some bytes costs what a lost file costs. Where the site has a key, each is sealed
with it (`unimiss_core.sealing`) and ends in `.sealed`; what lies there in clear counts for nothing then, and
goes with the next round.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unimiss_core import durable
from unimiss_core.checkpoint import folder_name
from unimiss_core.config import RUN
from unimiss_core.errors import ConfigError
from unimiss_core.json_text import object_in
from unimiss_core.sealing import Seal
from unimiss_core.tensor_bytes import load_whole

_SUM = "sha256"
"""In a file's metadata: as `_sum_of` gives it."""
KEPT_ROUNDS = 2
KEPT_RUNS = 8
KEPT_DAYS = 90.0
"""A run is forgotten when it is neither among the newest KEPT_RUNS nor was touched in these days."""


@dataclass(frozen=True)
class Remembered:
    """The state after `round`, or in its middle: tensors by name, and figures that are no tensors."""

    round: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class SiteState:
    """The memory of one site for one run.

    A run is of one study; state of another, from a coordinator that uses a run's id again, counts as none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        study_digest: str,
        seal: Seal | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> None:
        """tell: hears what of its files is damaged."""
        self._folder = run_folder(folder, run)
        self._study_digest = study_digest
        self._seal = seal
        self._tell = tell
        self._ending = ".safetensors" if seal is None else ".sealed"

    def remember(self, state: Remembered) -> None:
        """Write the state after `state.round` whole, and drop what is older than the round before, or unfinished; and
        what is newer, which a coordinator that went back to an old checkpoint has undone.

        Raises ConfigError: the disk is full, or the folder cannot be written to. What was remembered before still is.
        """
        self._write(self._path(state.round), state)
        kept = {self._path(number) for number in range(state.round - KEPT_ROUNDS + 1, state.round + 1)}
        for path in (*self._folder.glob("round-*.s*"), *self._folder.glob("unfinished.s*")):
            if path not in kept:
                path.unlink(missing_ok=True)

    def before(self, round: int) -> Remembered | None:
        """The newest state from before `round`; None for a site that is new to the run."""
        for earlier in sorted((kept for kept in self._rounds() if kept < round), reverse=True):
            state = self._read(self._path(earlier), f"what it remembers of round {earlier}")
            if state is not None and state.round == earlier:
                return state
        return None

    def remember_unfinished(self, state: Remembered) -> None:
        """Write the state in the middle of `state.round` whole, in place of an earlier one. Raises as `remember`."""
        self._write(self._unfinished, state)

    def unfinished(self, round: int) -> Remembered | None:
        """The state in the middle of `round`, or None where there is none or it is damaged."""
        state = self._read(self._unfinished, "what was saved in the middle of a round")
        return state if state is not None and state.round == round else None

    def facts_unfinished(self, round: int) -> Mapping[str, Any] | None:
        """Of `unfinished`, without its tensors, which may be gigabytes; empty where there is none of this round. None
        where it is sealed, and hence to be read as a whole."""
        if self._seal is not None:
            return None
        try:
            with safe_open(self._unfinished, framework="pt") as file:
                state = self._held(file.metadata(), {})
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}
        return state.facts if state is not None and state.round == round else {}

    def _rounds(self) -> list[int]:
        return [int(path.stem.removeprefix("round-")) for path in self._folder.glob(f"round-*{self._ending}")]

    @property
    def _unfinished(self) -> Path:
        return self._folder / f"unfinished{self._ending}"

    def _path(self, round: int) -> Path:
        return self._folder / f"{folder_name(round)}{self._ending}"

    def _write(self, path: Path, state: Remembered) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        metadata = {"study": self._study_digest, "round": str(state.round), "facts": json.dumps(state.facts)}
        metadata[_SUM] = _sum_of(metadata, tensors)
        content = save(tensors, metadata=metadata)
        if self._seal is not None:
            content = self._seal.seal(content, name_in_seal(path))
        try:
            make_run_folder(self._folder)
            durable.write_bytes(path, content)
        except OSError as error:
            raise _unwritable(f"round {state.round}", error) from None

    def _read(self, path: Path, what: str) -> Remembered | None:
        """What the file holds; None where it is not there, damaged, which is told, or of another study: an older one,
        or a fresh start, will do. what: it is, in words. Raises ConfigError: it was sealed with another key."""
        try:
            metadata, tensors = self._content(path)
            _require_sum(metadata, tensors)
            return self._held(metadata, tensors)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            self._tell(f"{what} cannot be read whole, and counts as none")
            return None

    def _content(self, path: Path) -> tuple[Mapping[str, str], Mapping[str, Tensor]]:
        """(metadata, tensors). Raises as `load_whole`, and OSError and ConfigError."""
        if self._seal is not None:
            return load_whole(self._seal.open(path.read_bytes(), name_in_seal(path)))
        with safe_open(path, framework="pt") as file:
            return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def _held(self, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Remembered | None:
        """What they say; None where they are of another study."""
        if metadata["study"] != self._study_digest:
            return None
        return Remembered(int(metadata["round"]), tensors, object_in(metadata["facts"]))


def _sum_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a file holds: its metadata, and each tensor's name, kind, shape and values."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_sum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError: it is of other content. Files of older versions have none, and are believed."""
    rest = dict(metadata)
    if _SUM in rest and rest.pop(_SUM) != _sum_of(rest, tensors):
        raise ValueError("the content is not what was written")


def name_in_seal(path: Path) -> str:
    """Of a file in a run's folder: no round takes the place of another, nor of another run's."""
    return f"run/{path.parent.name}/{path.name}"


def _unwritable(what: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{what} cannot be written to the state folder: {error.strerror or 'unknown error'}; make room, or point "
        "'state' to another disk"
    )


def run_folder(state: Path, run: str) -> Path:
    """Where a site keeps what is of one run, below its state folder."""
    return state / "runs" / run


def models_folder(state: Path) -> Path:
    """Where a site that keeps its own heads keeps the models with them, a folder for each run."""
    return state / "models"


def make_run_folder(folder: Path) -> None:
    """Make it where it is not there, and forget the runs that ended long ago. Raises OSError."""
    if not folder.exists():
        durable.make_folder(folder)
        forget_old_runs(folder.parent, now=time.time())


def forget_old_runs(runs: Path, *, now: float) -> None:
    """Delete what is kept of runs that have long ended, when a new one begins. runs: a folder with one for each, of
    their memory or of a site's own models. now: seconds since 1970.

    Kept are the KEPT_RUNS that were touched last, and every run that was touched in the last KEPT_DAYS: a disk does not
    fill up, and neither many new runs nor a clock that is wrong takes the memory of a run at work. A run that went on
    after more than that would find the site as a new one: it is sent the teacher and starts with a fresh optimiser.
    """
    folders = [path for path in runs.iterdir() if re.fullmatch(RUN, path.name) and path.is_dir()]
    touched = {path: path.stat().st_mtime for path in folders}  # every file that is written there renews it
    for path in sorted(folders, key=touched.__getitem__, reverse=True)[KEPT_RUNS:]:
        if now - touched[path] > KEPT_DAYS * 86_400:
            shutil.rmtree(path, ignore_errors=True)
