"""What a site remembers between rounds of a study, on its own disk: optimiser moments, teacher, centre,
and under FedEMA the student that it trained to.

One file per round, `round-0007.safetensors`: the state after that round. The last two are kept, because a round that
the coordinator asks for a second time (it was killed before it had saved the first) must start where the first did.
Beside them `unfinished.safetensors` holds the round at work, as far as it was saved on the way.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unimiss_core import durable
from unimiss_core.checkpoint import folder_name

KEPT_ROUNDS = 2


@dataclass(frozen=True)
class Remembered:
    """The state after `round`, or in its middle: tensors by name, and figures that are no tensors."""

    round: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class SiteState:
    """The memory of one site for one study."""

    def __init__(self, folder: Path, study_digest: str) -> None:
        self._folder = folder / "studies" / study_digest[:16]

    def remember(self, state: Remembered) -> None:
        """Write the state after `state.round` whole, and drop what is older than the round before, or unfinished."""
        _write(self._path(state.round), state)
        for old in range(max(0, state.round - 50), state.round - KEPT_ROUNDS + 1):
            self._path(old).unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)

    def before(self, round: int) -> Remembered | None:
        """The newest state from before `round`; None for a site that is new to the study."""
        rounds = [int(path.stem.removeprefix("round-")) for path in self._folder.glob("round-*.safetensors")]
        for earlier in sorted((found for found in rounds if found < round), reverse=True):
            if (state := _read(self._path(earlier))) is not None and state.round == earlier:
                return state
        return None

    def remember_unfinished(self, state: Remembered) -> None:
        """Write the state in the middle of `state.round` whole, in place of an earlier one."""
        _write(self._unfinished, state)

    def unfinished(self, round: int) -> Remembered | None:
        """The state in the middle of `round`, or None where there is none or it is damaged."""
        state = _read(self._unfinished)
        return state if state is not None and state.round == round else None

    @property
    def _unfinished(self) -> Path:
        return self._folder / "unfinished.safetensors"

    def _path(self, round: int) -> Path:
        return self._folder / f"{folder_name(round)}.safetensors"


def _write(path: Path, state: Remembered) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    durable.write_bytes(path, save(tensors, metadata={"round": str(state.round), "facts": json.dumps(state.facts)}))


def _read(path: Path) -> Remembered | None:
    """What the file holds, or None where it is not there or damaged: an older one, or a fresh start, will do."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            metadata = file.metadata()
            return Remembered(int(metadata["round"]), tensors, json.loads(metadata["facts"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
