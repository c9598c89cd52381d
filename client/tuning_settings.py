"""What a fine-tuning was asked to do, kept beside its work, so that who goes on with it is told what differs.

Settings stand by their keys, without a path. What `data` and `init` say stands as a digest alone: columns, patterns and
lines that are chosen may name a patient.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.finetune_config import FinetuneConfig
from unimiss_core.json_text import value_in

Settings = Mapping[str, Any]
"""Key, as `training.epochs` -> value."""
_PLACES = {"out", "device", "data_root"}
"""What a fine-tuning may be gone on with at another."""
_DIGESTED = ("data", "init")
WEIGHTS, CASES = "weights", "cases"
"""Keys of digests of what these two name, where that was read: `client.made_of`."""
_IN_WORDS = {
    "data": "data: otherwise then",
    "init": "init: otherwise then",
    WEIGHTS: "init: other weights, sizes or plan then",
    CASES: "data: other scans, labels, patients or parts then",
}
_SHOWN = 5


def settings_of(config: FinetuneConfig) -> Settings:
    flat = dict(_flat(config.model_dump(exclude=_PLACES)))
    told = {key: value for key, value in flat.items() if key.split(".")[0] not in _DIGESTED}
    for section in _DIGESTED:
        own = [[key, value] for key, value in flat.items() if key.split(".")[0] == section]
        told[section] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return told


def differences(then: Settings, now: Settings) -> str:
    """In words; empty where there is none."""
    differing = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    told = [
        _IN_WORDS.get(key) or f"{key}: {_said(then, key)} then, {_said(now, key)} now" for key in differing[:_SHOWN]
    ]
    return "; ".join(told) + (f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else "")


def _said(settings: Settings, key: str) -> str:
    value = settings.get(key)
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Each value by its key, as JSON has it, without paths."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        elif value is not None and not isinstance(value, Path):
            yield f"{above}{name}", value_in(json.dumps(value))
