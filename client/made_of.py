"""What a finished fine-tuning was made of, kept beside its model for its owner alone.

OUT/made-of.json     not to be handed on: what a digest is of can be guessed, a patient's number too
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.beginning import Beginning
from client.finetune_config import FinetuneConfig, MedMnistData
from client.label_tables import LabelTable
from client.tuning_settings import CASES, WEIGHTS, Settings, differences
from unimiss_core import durable
from unimiss_core.errors import ConfigError
from unimiss_core.json_text import read_object

MADE_OF = "made-of.json"


def digests_of(config: FinetuneConfig, beginning: Beginning, table: LabelTable) -> Settings:
    """Beside `settings_of`, of each fold the same. Of the scans who and what they are called, and no voxel."""
    weights = [beginning.digest, beginning.plan.canonical(), beginning.model.canonical()]
    cases = [
        [one.number, one.file, one.patient, one.target, one.mask, one.part, one.place, *one.others]
        for one in table.cases
    ]
    file = config.data.file.name if isinstance(config.data, MedMnistData) else None  # one of each size has equal labels
    return {WEIGHTS: _digest(weights), CASES: _digest([file, table.modality, table.channel, cases, *table.channels])}


def keep_made_of(out: Path, made: Settings) -> None:
    text = json.dumps(made, indent=2, sort_keys=True) + "\n"
    durable.write_bytes(out / MADE_OF, text.encode(), private=True)


def check_made_of(out: Path, now: Settings) -> None:
    """now: what this fine-tuning would be made of, or its settings alone. Raises ConfigError: the finished one there is
    of something else, or nothing says of what."""
    then = _kept(out)
    later = {key: then[key] for key in (WEIGHTS, CASES)}
    if changed := differences(then, {**later, **now}):
        raise ConfigError(
            f"out: the folder {out} holds another fine-tuning, which is finished ({changed}); put that back, or give "
            "another --out"
        )


def _kept(out: Path) -> Mapping[str, Any]:
    """Raises ConfigError: none, or no whole one."""
    try:
        then = read_object(out / MADE_OF)
        if not {WEIGHTS, CASES} <= then.keys():
            raise ValueError("not all of it")
    except (OSError, ValueError):
        raise ConfigError(
            f"out: the folder {out} holds a finished fine-tuning without a whole {MADE_OF}, as older versions of this "
            "program wrote it: it cannot be compared with what is asked for; give another --out"
        ) from None
    return then


def _digest(of: object) -> str:
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
