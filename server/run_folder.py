"""The folder of a run: what it is called, where each artefact lies, and that a crash leaves it readable.

docs/artefacts.md describes every file. A round's metrics are written before its checkpoint gets its name, so that every
checkpoint has its line; lines beyond the last checkpoint belong to a round that was cut off, and resuming removes them.
"""

import json
import re
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from server.coordinator_config import CoordinatorConfig
from server.released_rounds import record_of
from unimiss_core import checkpoint, durable, metric_lines
from unimiss_core.config import RUN, dump_yaml, load
from unimiss_core.errors import CheckpointError, ConfigError, RunFolderError, UnimissError
from unimiss_core.json_text import read_object
from unimiss_core.keys import SigningKey, read_signing_key
from unimiss_core.study import StudyConfig

if sys.platform != "win32":
    import fcntl


_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())
"""Folders that the code which calls this holds already."""


class RunFolder:
    """One run's folder, made ready, read and written.

    signing_key: signs its checkpoints; where there is one, none is read that it did not sign.
    """

    def __init__(self, path: Path, signing_key: SigningKey | None = None) -> None:
        self.path = path
        self.signing_key = signing_key
        self._deletion: threading.Thread | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / metric_lines.NAME

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def report(self) -> Path:
        """Folder with what the report is made of, besides the metrics."""
        return self.path / "report"

    @property
    def run(self) -> str:
        """What the sites know this run by: drawn when it was begun, the same ever after, so that they find what they
        remember of it. Raises ConfigError where the run was not begun, or run.json is damaged."""
        try:
            run = read_object(self._identity)["run"]
            if not re.fullmatch(RUN, run):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                f"{self._identity}: does not name the run; delete it to go on under a new name, with sites that "
                "remember nothing of the run so far"
            ) from None
        return str(run)

    @property
    def _identity(self) -> Path:
        return self.path / "run.json"

    @property
    def _stopped(self) -> Path:
        return self.path / "stopped.json"

    @property
    def _ended(self) -> Path:
        return self.path / "ended.json"

    @property
    def _finished(self) -> Path:
        return self.path / "finished.json"

    @property
    def _begun(self) -> Path:
        return self.path / "start.json"

    @property
    def scratch(self) -> Path:
        """Folder for what a round keeps on disk until it ends."""
        return self.path / f"updates{durable.PARTIAL}"

    @property
    def _pruned(self) -> Path:
        """Folder of checkpoints that are being deleted."""
        return self.path / f"pruned{durable.PARTIAL}"

    def checkpoint_of(self, round: int) -> Path:
        return self.checkpoints / checkpoint.folder_name(round)

    def load(self, round: int, *, to_resume: bool = False) -> checkpoint.Checkpoint:
        """A round's checkpoint. Raises CheckpointError."""
        key = self.signing_key.public_key() if self.signing_key else None
        return checkpoint.load(self.checkpoint_of(round), to_resume=to_resume, key=key)

    def manifest_of(self, round: int) -> Path:
        return self.checkpoint_of(round) / "manifest.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other coordinators; the system lets go of it when this process ends, however it ends.

        A run that was submitted twice would otherwise be written by two. Within a block that holds the folder, as a
        simulation that prepares a run does, it may be held again. Raises RunFolderError: another is at work in it.
        Windows has no such lock; there nothing is held.
        """
        if self.path in (held := _held.get()):
            yield
            self._finish_pruning()
            return
        self._require_no_file_in_its_way()
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "run.lock").open("ab") as file:
            if sys.platform != "win32":
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunFolderError(
                        f"{self.path}: another coordinator is at work in it; wait for it or end it, then resume"
                    ) from None
            token = _held.set(held | {self.path})
            try:
                yield
            finally:
                self._finish_pruning()
                _held.reset(token)

    def check(self, study: StudyConfig, *, resume: bool, else_way: str = "or give a new folder") -> Path | None:
        """The checkpoint folder to go on from, or None for a fresh run; nothing is written.

        else_way: what a person who wants this study can do where the folder holds another one's run.
        Raises ConfigError: the folder cannot be one, holds a run and `resume` is False, or a run of another study.
        """
        self._require_no_file_in_its_way()
        latest = checkpoint.latest(self.checkpoints)
        if latest is None:
            return None
        if not resume:
            raise RunFolderError(f"{self.path}: holds a run already; resume it, or give a new folder")
        if (held := load(StudyConfig, self.path / "study.yaml")).digest() != study.digest():
            changed = ", ".join(sorted(_differences(held.model_dump(), study.model_dump())))
            raise ConfigError(
                f"{self.path}: holds a run of another study (different: {changed}); "
                f"resume with the study it was started with, {else_way}"
            )
        return latest

    def begin(self, study: StudyConfig, *, resume: bool) -> checkpoint.Checkpoint | None:
        """Make the folder ready; the checkpoint to go on from, or None for a fresh run. Raises as `check` does, and as
        `ReleasedRounds.begin` where the study promises site-level privacy."""
        latest, record = self.check(study, resume=resume), record_of(self.path, study)
        unfinished = self.checkpoints.glob(f"*{durable.PARTIAL}")
        for left in (self.scratch, self._pruned, *unfinished):  # gigabytes, where a coordinator was killed
            shutil.rmtree(left, ignore_errors=True)
        for kept in (self._stopped, self._finished):
            kept.unlink(missing_ok=True)
        if latest is None:
            if record is not None:
                record.begin(0, anew=not self._identity.exists())
            self._start(study)
            return None
        try:
            found = self.load(checkpoint.round_of(latest), to_resume=True)
        except CheckpointError as error:
            told = f"{error}, or delete {latest} to go on from the round before it"
            if record is not None and (lost := checkpoint.round_of(latest)) > 0:
                told += f"; {record.cost_of_going_back(lost - 1)}"
            raise CheckpointError(told) from None
        if found.manifest.study_digest != study.digest():
            raise CheckpointError(f"{latest}: is of another study than study.yaml beside it; put back this run's own")
        if record is not None:
            record.begin(found.manifest.round, anew=False)
        if not self._identity.exists():  # deleted, or begun before runs had names
            self._draw_run()
        metric_lines.forget_rounds_after(self.metrics, found.manifest.round)
        return found

    def _require_no_file_in_its_way(self) -> None:
        if (above := next(p for p in (self.path, *self.path.parents) if p.exists())) and not above.is_dir():
            raise ConfigError(f"{self.path}: {above} is a file; give another folder")

    def rounds(self) -> int | None:
        """How many the run's study has; None where no study stands here yet, or one that cannot be read."""
        for name in ("study.yaml", "study-requested.yaml"):
            with suppress(ConfigError):
                return load(StudyConfig, self.path / name).schedule.rounds
        return None

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        metric_lines.append(self.metrics, row)

    def add_to_metrics(self, round: int, figures: Mapping[str, Any]) -> None:
        """Put figures of the model into the line of a round that is finished already. Raises ValueError: one of them is
        not finite."""
        metric_lines.change(self.metrics, round, lambda row: row | {"global": row.get("global", {}) | dict(figures)})

    def note_start(self, *, taught_by_labels: bool | None) -> None:
        """Keep whether labels had taught what the run begins from; None where it begins from no checkpoint."""
        if taught_by_labels is None:
            self._begun.unlink(missing_ok=True)  # of a run that got no further
        else:
            durable.write_text(self._begun, json.dumps({"taught_by_labels": taught_by_labels}) + "\n")

    def was_taught(self) -> bool | None:
        """What `note_start` kept; None where it kept nothing."""
        try:
            told = read_object(self._begun)["taught_by_labels"]
        except (OSError, ValueError, KeyError):
            return None
        return told if isinstance(told, bool) else None

    def note_stop(self, facts: Mapping[str, Any]) -> None:
        """Keep why the run ended before its last round, until it is gone on with."""
        durable.write_text(self._stopped, json.dumps(facts, sort_keys=True) + "\n")

    def why_it_stopped(self) -> str:
        """What `note_stop` kept; empty where the run was not stopped, or was gone on with since."""
        try:
            return str(read_object(self._stopped)["error"])
        except (OSError, ValueError, KeyError):
            return ""

    def note_finished(self, round: int) -> None:
        """Keep that all was done that comes after this round, the study's last, too: until the run is begun again."""
        durable.write_text(self._finished, json.dumps({"round": round}) + "\n")

    @property
    def is_finished(self) -> bool:
        """Whether `note_finished` was the last that a coordinator did here."""
        return self._finished.exists()

    def note_end(self, run: int, error: UnimissError) -> None:
        """Keep what the ServerApp of a Flower run ended with, for `unimiss-server run`, which is another process."""
        facts = {"run": run, "error": str(error), "exit_code": error.exit_code, "resumes": error.resumes}
        facts["round"] = self._rounds_done()
        durable.write_text(self._ended, json.dumps(facts, sort_keys=True) + "\n")

    def how_it_ended(self, run: int) -> dict[str, Any]:
        """What `note_end` kept of that run; empty where its ServerApp was killed, or ended well."""
        try:
            facts = read_object(self._ended)
        except (OSError, ValueError):
            return {}
        return facts if facts.get("run") == run else {}

    def why_its_last_try_ended(self) -> str:
        """Of whichever Flower run; empty where a round was finished since, or the run, or no ServerApp said so."""
        try:
            facts = read_object(self._ended)
            return "" if self.is_finished or self._rounds_done() > facts["round"] else str(facts["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _rounds_done(self) -> int:
        """A line of metrics beyond it is of a round that was cut off."""
        return max(checkpoint.numbered(self.checkpoints), default=0)

    def metric_rows(self) -> list[metric_lines.Row]:
        """As `metric_lines.rows`: damaged lines are passed over."""
        return metric_lines.rows(self.metrics)

    def prune_checkpoints(self, newest: int, keep: int, *, best: int | None = None) -> None:
        """Remove all but the `keep` newest, the best, where one is known, and round 0, which the report compares with.

        They are out of the way when this returns. Their files go while sites train: for a disk to let go of half a
        gigabyte takes a tenth of a second, in which the next request would wait.
        """
        if not (
            old := [
                number
                for number in checkpoint.numbered(self.checkpoints)
                if 0 < number <= newest - keep and number != best
            ]
        ):
            return
        self._finish_pruning()
        self._pruned.mkdir(exist_ok=True)
        for folder in map(self.checkpoint_of, old):
            with suppress(OSError):  # somebody reads it: the next round tries again
                folder.rename(self._pruned / folder.name)
        self._deletion = threading.Thread(target=shutil.rmtree, args=[self._pruned], kwargs={"ignore_errors": True})
        self._deletion.start()

    def _finish_pruning(self) -> None:
        """Wait for what is being deleted."""
        if self._deletion is not None:
            self._deletion.join()

    def _start(self, study: StudyConfig) -> None:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.report.mkdir(exist_ok=True)
        text = f"# sha256 of this study: {study.digest()}\n{dump_yaml(study)}"
        durable.write_text(self.path / "study.yaml", text)
        self._draw_run()
        durable.write_text(self.metrics, "")

    def _draw_run(self) -> None:
        durable.write_text(self._identity, json.dumps({"run": secrets.token_hex(8)}) + "\n")


def folder_of(config: CoordinatorConfig) -> RunFolder:
    """Raises ConfigError: the signing key cannot be read."""
    return RunFolder(config.out, read_signing_key(config.signing_key) if config.signing_key else None)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key in ours.keys() | theirs.keys():
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{at}{key}.")
        elif a != b:
            yield f"{at}{key}"
