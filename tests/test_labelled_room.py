"""What a site keeps of fine-tuning is bounded: prepared scans by bytes, its own models as the memory of runs."""

import os
from pathlib import Path

import pytest

from client.site_labels import open_labelled
from client.site_state import KEPT_RUNS
from client.trainer import run_round
from tests.labelled_hospitals import hospital, opened, task_study
from tests.test_federated_finetuning import request_of
from tests.test_site_state import DAY, runs_touched
from unimiss_core.errors import ConfigError
from unimiss_core.study import StudyConfig

IN_FLIGHT = 2  # scans that a site's one worker may have been given beside the one that did not fit
BYTES = 64 * 64 * 2 + 128  # of a picture: 16 bits a pixel, behind the header of an .npy


def of_plan(longest_side: int) -> StudyConfig:
    """Other pixels of the same size, for pictures are smaller than that: another plan, and so other names."""
    return task_study(plan={"image_longest_side": longest_side})


def kept(site: Path, study: StudyConfig, *, pictures: float, evicts: bool = True) -> set[str]:
    """Open what `study` needs where there is room for so many pictures; the names of those on disk afterwards."""
    config = opened(site, study).config.model_copy(update={"cache_limit_gb": pictures * BYTES / 1e9})
    assert len(open_labelled(config, study, evicts=evicts).scans) == 4
    return names_in(config.cache_folder / "labelled")


def names_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.npy")}


def test_scans_of_other_plans_go_the_oldest_first_where_there_is_no_room(tmp_path: Path) -> None:
    site = hospital(tmp_path / "north", "north")
    labelled = tmp_path / "north" / "state" / "cache" / "labelled"
    first = kept(site, of_plan(100), pictures=8)
    for age, name in enumerate(sorted(first)):
        os.utime(labelled / f"{name}.npy", (age * DAY, age * DAY))
    both = kept(site, of_plan(101), pictures=8)
    assert both > first
    assert len(both) == 8
    third = kept(site, of_plan(102), pictures=9)
    oldest = set(sorted(first)[:3])
    assert len(third) == 9
    assert third & first == first - oldest
    assert not [path for name in oldest for path in labelled.glob(f"{name}*")]  # their records went, too
    assert kept(site, of_plan(102), pictures=1) == third  # nothing new is read, so nothing goes


def test_scans_that_the_limit_does_not_hold_are_refused_and_cost_no_others_where_none_may_go(tmp_path: Path) -> None:
    site = hospital(tmp_path / "north", "north")
    labelled = tmp_path / "north" / "state" / "cache" / "labelled"
    first = kept(site, of_plan(100), pictures=4)
    with pytest.raises(ConfigError, match=r"labelled scans take more than cache_limit_gb=.* raise it"):
        kept(site, of_plan(101), pictures=5.5, evicts=False)
    assert names_in(labelled) > first
    with pytest.raises(ConfigError, match="labelled scans take more than"):
        kept(site, of_plan(102), pictures=3.5)


def test_a_site_whose_limit_does_not_hold_its_scans_is_refused_each_time_and_fills_no_disk(tmp_path: Path) -> None:
    """The coordinator asks again in each round."""
    site, labelled = hospital(tmp_path / "north", "north"), tmp_path / "north" / "state" / "cache" / "labelled"
    for _ in range(6):
        with pytest.raises(ConfigError, match="labelled scans take more than"):
            kept(site, of_plan(100), pictures=2.5)
        assert sum(path.stat().st_size for path in labelled.glob("*.npy")) <= (2 + IN_FLIGHT) * BYTES
    for record in labelled.glob("*.json"):  # as where a crash came between a scan and its record
        record.unlink()
    assert len(kept(site, of_plan(100), pictures=4)) == 4


def test_what_a_person_put_beside_prepared_scans_is_not_deleted(tmp_path: Path) -> None:
    site, labelled = hospital(tmp_path / "north", "north"), tmp_path / "north" / "state" / "cache" / "labelled"
    first = kept(site, of_plan(100), pictures=4)
    own = [labelled / name for name in ("mine.npy", "*.npy", "notes.json", f"{'0' * 31}-features.npy")]
    for path in own:
        path.write_bytes(bytes(BYTES))
        os.utime(path, (0, 0))
    assert not first & kept(site, of_plan(101), pictures=4)
    assert all(path.exists() for path in own)


def test_models_of_runs_that_ended_long_ago_go_when_another_is_made(tmp_path: Path) -> None:
    study = task_study(finetune={"head": "local"})
    site = opened(hospital(tmp_path / "north", "north"), study)
    models = tmp_path / "north" / "state" / "models"
    old = runs_touched(models, [0.0] * KEPT_RUNS)
    for age, path in enumerate(old, start=1):
        os.utime(path, (age * DAY, age * DAY))  # in 1970
    run_round(site, request_of(study))
    assert [path.exists() for path in old] == [False] + [True] * (KEPT_RUNS - 1)
    assert (models / site.run / "model.json").exists()
