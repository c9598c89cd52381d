"""docs/settings.md says what the configuration classes do."""

import re
from pathlib import Path

import pytest
import yaml

from tests.settings_page import FILES, PAGE, page
from unimiss_core.file_kinds import KEYS


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


ROWS = [cells(line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def test_the_page_is_made_of_the_classes() -> None:
    """Where it is not: `python -m tests.settings_page`."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_key_of_every_kind_of_file_stands_there() -> None:
    """By the list that tells kinds of files apart, which tests hold to the classes, too."""
    assert {frozenset(kind.model_fields) for kind in FILES.values()} == set(KEYS.values())
    told = " ".join(" ".join(row) for row in ROWS)
    assert [key for keys in KEYS.values() for key in keys if f"`{key}`" not in told] == []


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_every_row_says_what_the_setting_is_and_its_default_reads_back(row: list[str]) -> None:
    assert len(row) == 4
    key, kind, default, meaning = row
    assert "None" not in kind
    assert "object" not in kind
    assert kind or meaning
    if default.startswith("`"):
        yaml.safe_load(default.strip("`"))
    assert key.strip("`")


@pytest.mark.parametrize(
    "line",
    [
        "| `schedule.local_steps` | integer above 0 up to 1000000 | `50` | Optimiser steps of each site in each round",
        "| `data[].include` | list: text | `[]` | Only files whose path below the folder is of one of these patterns,",
        "| `aggregation.max_size_ratio` | number above 1 or null | `10.0` |",
        '| `devices` | non-empty list: text | `["auto"]` |',
        "| `sites[].data` | list: mapping | `[]` |",
        "| `finetune.task.input_size` | list of 2 or more: integer above 0 up to 4096 or null | `null` |",
        "| `objective` | mapping, by `name`: `unimiss`, `unimiss_plus` | `unimiss` |",
        "| `aggregation.server_optimiser.momentum` | number from 0 below 1 | `0.9` | (`fedavgm`) |",
        "| `objective.slice_stride` | integer above 0 | `2` | (`unimiss_plus`) ",
        "| `patience.tries` | integer above 0 | `6` |",
        "| `views.volume_size` | list of 3: integer above 0 up to 4096 | `[16, 64, 64]` |",
    ],
)
def test_what_a_reader_looks_for(line: str) -> None:
    assert line in PAGE.read_text(encoding="utf-8")


def test_readme_and_examples_name_the_page() -> None:
    root = PAGE.parents[1]
    examples = ["site/example.yaml", "coordinator/example.yaml", "study/nano.yaml", "simulation/shared_real.yaml"]
    examples += ["finetune/hippocampus.yaml"]
    for name in ("README.md", *(f"configs/{example}" for example in examples)):
        assert "docs/settings.md" in Path(root / name).read_text(encoding="utf-8"), name
