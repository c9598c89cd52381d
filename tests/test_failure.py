"""What is told of a run that fails under `flwr run`, where the exception is all that Flower gets."""

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flwr.app import Context, RecordDict, UserConfig

from server.app import app
from server.failure import RunFailed, _without_traceback
from server.local_grid import LocalGrid
from tests.federation import StubSite, small_study, stub_app
from unimiss_core.config import dump_yaml


@pytest.fixture(autouse=True)
def flower_log() -> Iterator[None]:
    """As each process of Flower finds it."""
    yield
    logging.getLogger("flwr").removeFilter(_without_traceback)


def failed(run_config: UserConfig, *sites: StubSite) -> RunFailed:
    nodes: dict[str, UserConfig] = {site.name: {"name": site.name} for site in sites}
    with LocalGrid(stub_app({site.name: site for site in sites}), nodes, run_config={}) as grid:
        with pytest.raises(RunFailed) as failure:
            app(grid, Context(1, 1, {}, RecordDict(), run_config))
        return failure.value


def coordinator(tmp_path: Path, **settings: object) -> UserConfig:
    (tmp_path / "study.yaml").write_text(dump_yaml(small_study()))
    raw = {"study": "study.yaml", "out": "out", "wait_s": 0.1, "retry_s": 0.0, **settings}
    (tmp_path / "coordinator.yaml").write_text(yaml.safe_dump(raw))
    return {"coordinator": str(tmp_path / "coordinator.yaml"), "simulation": "demo.yaml"}


def test_a_mistake_stands_in_flowers_log_as_one_message_and_not_as_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    error = failed(coordinator(tmp_path, min_site=2))
    logging.getLogger("flwr").error("%s raised an exception", "ServerApp", exc_info=error)  # as Flower does
    assert "unknown key 'min_site' (did you mean 'min_sites'?)" in caplog.text
    assert "Traceback" not in caplog.text
    assert "resume" not in caplog.text


def test_an_error_of_the_program_keeps_its_traceback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed(coordinator(tmp_path, min_site=2))
    logging.getLogger("flwr").error("%s raised an exception", "ServerApp", exc_info=ZeroDivisionError("by zero"))
    assert "ZeroDivisionError: by zero" in caplog.text
    assert caplog.records[-1].exc_info


def test_the_way_to_resume_is_that_of_the_run_configuration(tmp_path: Path) -> None:
    config = coordinator(tmp_path, min_sites=2, min_replies=2)
    told = str(failed(config, StubSite("a", {2: 3})))
    assert "1 of at least 2 sites are there" in told
    assert told.endswith(f"\nGo on with: --run-config 'coordinator=\"{config['coordinator']}\" resume=true'")
    assert "--resume" not in told


def test_a_folder_in_use_under_the_engine_is_resumed_with_its_simulation_and_folder(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(dump_yaml(small_study()))
    raw = {"study": "study.yaml", "sites": [{"name": "a", "data": [{"folder": "."}]}]}
    (tmp_path / "simulation.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "out").mkdir()
    config: UserConfig = {"simulation": str(tmp_path / "simulation.yaml"), "out": str(tmp_path / "out")}
    with (tmp_path / "out" / "run.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = str(failed(config, StubSite("a", {2: 3})))
    assert "another coordinator is at work in it" in told
    assert f'simulation="{tmp_path / "simulation.yaml"}" out="{tmp_path / "out"}" resume=true\'' in told
