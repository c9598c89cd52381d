"""Paths of configuration files that no system takes are mistakes of the file, told like all others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from client import finetune_config, label_config, site_command, site_config
from client.site_config import load_site
from server import coordinator_config, simulate, simulate_command
from unimiss_core.config import Config, parse
from unimiss_core.errors import ConfigError

ZERO = "a\0b"
SITE: dict[str, Any] = {"name": "alpha", "data": [{"folder": "."}], "state": "state"}


def _path_fields() -> Iterator[tuple[type[Config], str, Any]]:
    """(class, key, such a path as its value)."""
    for module in (finetune_config, label_config, site_config, coordinator_config, simulate):
        for kind in (one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Config)):
            for key, field in kind.model_fields.items():
                if "Path" in str(field.annotation):
                    yield kind, key, [ZERO] if "tuple" in str(field.annotation) else ZERO


PATH_FIELDS = list(_path_fields())


@pytest.mark.parametrize(("kind", "key", "value"), PATH_FIELDS, ids=lambda one: getattr(one, "__name__", None))
def test_a_path_with_a_zero_byte_is_told_by_its_key(kind: type[Config], key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"'{key}(\.0)?': no path holds a zero byte"):
        parse(kind, {key: value}, where="x")


def test_every_path_of_a_file_was_looked_for() -> None:
    found = {(kind.__name__, key) for kind, key, _ in PATH_FIELDS}
    assert found >= {("SiteConfig", "state"), ("TableConfig", "path"), ("CoordinatorConfig", "probe")}


@pytest.mark.parametrize("command", ["check", "ledger", "audit", "clear"])
@pytest.mark.parametrize("key", ["state", "state_key"])
def test_no_command_of_a_site_ends_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, key: str
) -> None:
    (path := tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | {key: ZERO}))
    code, said = site_command.main([command, str(path)]), capsys.readouterr().err
    if key == "state" or command in ("check", "ledger"):
        assert (code, f"'{key}': no path holds a zero byte" in said) == (2, True), said


def test_a_simulation_does_not_begin_from_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path := tmp_path / "simulation.yaml").write_text(yaml.safe_dump({"study": "study.yaml", "start": ZERO}))
    assert simulate_command.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "'start': no path holds a zero byte" in capsys.readouterr().err


def test_names_too_long_for_the_system_lead_nowhere(tmp_path: Path) -> None:
    long = 300 * "a"
    labels = {"data": {"table": long}, "classes": ["no", "yes"]}
    sources = [{"folder": long}, {"folder": ".", "table": {"path": long}}]
    (path := tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | {"data": sources, "labels": labels}))
    with pytest.raises(ConfigError) as told:
        load_site(path)
    assert [line.split(": ")[0] for line in str(told.value).splitlines()[1:]] == [
        "  - 'data.0.folder'",
        "  - 'data.1.table.path'",
        "  - 'labels.data.table'",
    ]


def test_a_state_folder_that_is_a_loop_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").symlink_to("state")
    (tmp_path / "scans").mkdir()
    (path := tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | {"data": [{"folder": "scans"}]}))
    assert site_command.main(["check", str(path)]) in (1, 2)
    assert "Too many levels of symbolic links" in capsys.readouterr().err
