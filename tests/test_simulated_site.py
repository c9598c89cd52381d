"""From a simulation's file to what its sites and its study become, without a run."""

import fcntl
from pathlib import Path

import numpy as np
import pytest
import yaml

from client import accounting
from client.cache import open_private_library
from client.patients import load_secret
from client.phantoms import PhantomConfig, write_hospital
from client.pictures import write_png
from client.site_config import SiteTraining, load_site
from server.coordinator_config import load_coordinator
from server.simulate import Simulation, _write_site, prepare, read_simulation, simulate
from server.simulated_probe import SimulatedProbe, probe_file
from unimiss_core import progress
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.scan import Rank
from unimiss_core.study import PlanConfig, UniMiSSConfig, UniMiSSPlusConfig

TRAINING = {
    "devices": ["cpu", "cpu"],
    "precision": "bf16",
    "micro_batch": {"images": 3, "volumes": None},
    "patients_at_once": 4,
    "views_in_turn": True,
    "activation_checkpointing": True,
    "compile": True,
    "cuda_graphs": False,
    "threads": 3,
    "checkpoint_minutes": 0.5,
    "workers": 2,
    "privacy": {"holds": ["images"], "max_epsilon": 3.0},
    "policy": {"studies": ["toy"], "most_rounds": 7},
}


def simulated(tmp_path: Path, *, overrides: object = None, **site: object) -> Simulation:
    study = {"name": "toy", "objective": {"slices_per_volume": 4, "teacher_temperature": 0.02}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "scans").mkdir(exist_ok=True)
    raw = {"study": "study.yaml", "sites": [{"name": "north", "data": [{"folder": "scans"}], **site}]}
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump({**raw, "overrides": overrides or {}}))
    return read_simulation(path)


def test_a_simulated_site_trains_as_the_simulation_says(tmp_path: Path) -> None:
    assert TRAINING.keys() == SiteTraining.model_fields.keys() - {"name"}  # each of them differs from its default
    (site,) = simulated(tmp_path, **TRAINING).config.sites
    _write_site(site, tmp_path, tmp_path / "out")
    written = load_site(tmp_path / "out" / "sites" / "north" / "site.yaml")
    default = parse(SiteTraining, {"name": "north"}, where="")
    for key in TRAINING:
        assert getattr(written, key) == getattr(site, key)
        assert getattr(written, key) != getattr(default, key)


def test_a_site_knows_its_patients_by_the_same_keys_in_every_folder(tmp_path: Path) -> None:
    """So that a run that holds some out gives the same bits again; a secret that is there stays, as of older runs."""
    (site,) = simulated(tmp_path).config.sites
    secrets = {}
    for out, name in (("one", "north"), ("two", "north"), ("two", "south")):
        _write_site(site.model_copy(update={"name": name}), tmp_path, tmp_path / out)
        secrets[out, name] = load_secret(tmp_path / out / "sites" / name / "state")
    assert secrets["one", "north"] == secrets["two", "north"] != secrets["two", "south"]
    kept = tmp_path / "old" / "sites" / "north" / "state"
    older = load_secret(kept)
    _write_site(site, tmp_path, tmp_path / "old")
    assert load_secret(kept) == older != secrets["one", "north"]


@pytest.mark.parametrize(
    ("kind", "ranks"), [("cr", frozenset({2})), ("ct", frozenset({3})), ("mixed", frozenset({2, 3}))]
)
def test_a_phantom_hospital_declares_what_it_holds_and_whose_each_scan_is(
    tmp_path: Path, kind: str, ranks: frozenset[Rank]
) -> None:
    (site,) = simulated(tmp_path, data=[], phantom={"kind": kind, "patients": 2, "seed": 1}).config.sites
    _write_site(site, tmp_path, tmp_path / "out")
    written = load_site(tmp_path / "out" / "sites" / "north" / "site.yaml")
    assert written.privacy.ranks == ranks
    assert open_private_library(written, PlanConfig()).ranks == ranks


def test_a_generated_site_file_says_that_it_is_not_the_one_to_change(tmp_path: Path) -> None:
    (site,) = simulated(tmp_path).config.sites
    _write_site(site, tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "sites" / "north" / "site.yaml").read_text()
    assert "change the simulation's file instead" in text.splitlines()[0]


def test_a_state_folder_among_the_scans_is_refused(tmp_path: Path) -> None:
    (site,) = simulated(tmp_path, data=[{"folder": "."}]).config.sites
    _write_site(site, tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"'state': .* lies in a folder of scans, .*; point it elsewhere"):
        load_site(tmp_path / "out" / "sites" / "north" / "site.yaml")


def test_a_ledger_that_was_begun_anew_is_forgotten_by_the_simulations_own_file(tmp_path: Path) -> None:
    """The coordinator file is written anew at each start, so that it is no place to write to."""
    (tmp_path / "hospital").mkdir()
    north = {"name": "north", "data": [{"folder": "hospital"}]}
    simulated(tmp_path)
    path = tmp_path / "simulation.yaml"
    path.write_text(
        yaml.safe_dump({"study": "study.yaml", "sites": [north], "quorum": {}, "forget_ledgers": ["north"]})
    )
    made = prepare(read_simulation(path), tmp_path / "out", resume=False)
    assert load_coordinator(made).forget_ledgers == ("north",)
    assert load_coordinator(made).file_in_words == "simulation file"
    path.write_text(yaml.safe_dump({"study": "study.yaml", "sites": [north], "forget_ledgers": ["nort"]}))
    with pytest.raises(ConfigError, match="forget_ledgers: there is no site nort"):
        read_simulation(path)


def test_overrides_that_choose_another_objective_begin_from_its_defaults(tmp_path: Path) -> None:
    plus = {"objective": {"name": "unimiss_plus"}, "model": {"reconstruction": True}}
    study = simulated(tmp_path, overrides=plus).study
    assert study.objective == UniMiSSPlusConfig()
    assert study.name == "toy"


@pytest.mark.parametrize("change", [{"centre_momentum": 0.8}, {"centre_momentum": 0.8, "name": "unimiss"}])
def test_overrides_of_the_same_objective_change_it_in_part(tmp_path: Path, change: dict[str, object]) -> None:
    study = simulated(tmp_path, overrides={"objective": change, "name": "other"}).study
    assert study.objective == UniMiSSConfig(slices_per_volume=4, teacher_temperature=0.02, centre_momentum=0.8)
    assert study.name == "other"


def test_a_private_study_that_breaks_its_promise_is_told_before_hospitals_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for the noise that would do takes seconds, and has tests of its own."""
    monkeypatch.setattr(accounting, "noise_for", lambda *_: 2.0)

    def private(noise: float) -> dict[str, object]:
        return {
            "privacy": {"mode": "patient", "max_epsilon": 2.0, "noise_multiplier": noise, "centre_noise": 5.0},
            "schedule": {"rounds": 2, "local_steps": 2},
            "optimiser": {"warmup_steps": 1},
            "objective": {"centre_momentum": 0.999999},
        }

    with pytest.raises(ConfigError, match=r"above privacy\.max_epsilon=2\. privacy\.noise_multiplier: 2 would do"):
        simulated(tmp_path, overrides=private(0.6))
    assert simulated(tmp_path, overrides=private(2.0)).study.privacy.mode == "patient"


def test_an_objective_that_there_is_not_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of unimiss, unimiss_plus"):
        simulated(tmp_path, overrides={"objective": {"name": "unimis"}})


@pytest.mark.parametrize("site", [{"workrs": 2}, {}])
def test_mistakes_of_the_simulation_and_of_its_study_are_told_at_once(tmp_path: Path, site: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as failure:
        simulated(tmp_path, overrides={"late_weight": 0.5}, **site)
    of_file, of_study = "'sites.0.workrs' (did you mean 'workers'?)", "(did you mean 'aggregation.late_weight'?)"
    assert of_study in str(failure.value)
    assert (of_file in str(failure.value)) == bool(site)


def test_a_second_run_in_the_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The first has begun a moment ago, and still prepares its sites."""
    simulated(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with (out / "run.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another coordinator is at work in it"):
            simulate(tmp_path / "simulation.yaml", out)
    assert [path.name for path in out.iterdir()] == ["run.lock"]


# ------------------------------------------------------------------------------------------------------------ probes


def probed(
    tmp_path: Path, *, rank: Rank = 2, changes: object = None, **table: object
) -> tuple[dict[str, str], list[str]]:
    """Patient -> label of a probe of tmp_path's scans and t.csv, and what was said."""
    source = {"folder": "scans", "table": {"path": "t.csv", "patient": "who", **table}}
    probe = {"name": "p", "data": [source], "rank": rank, "label": "ill", **(changes or {})}  # type: ignore[dict-item]
    simulation = simulated(tmp_path)
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "probe": [probe]}))
    simulation, heard = read_simulation(path), list[str]()
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        file = probe_file(simulation.config.probe[0], simulation.study, tmp_path, tmp_path / "out")
    with np.load(file) as held:
        return dict(zip(held["patients"].tolist(), held["labels"].tolist(), strict=True)), heard


def write_pictures(folder: Path, count: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (count, 40, 44), dtype=np.uint8)
    (folder / "scans" / "a").mkdir(parents=True)
    for number in range(count):
        write_png(folder / "scans" / "a" / f"{number}.png", noise[number])


@pytest.mark.parametrize(
    ("start", "file", "label"),
    [
        ("", "a/{}.png", "{}"),
        ("\ufeff", "a/{}.png", "{}"),
        ("", "./a/{}.png", "{}"),
        ("", "a/{}.png ", " {} "),
        ("", "a//{}.png", "{}"),
    ],
    ids=["plain", "with a byte order mark", "from here", "with blanks", "with a slash twice"],
)
def test_a_probe_finds_the_labels_of_all_scans_that_a_site_finds(
    tmp_path: Path, start: str, file: str, label: str
) -> None:
    write_pictures(tmp_path, 4)
    lines = [f"{file.format(number)},{label.format('yn'[number % 2])},p{number}" for number in range(4)]
    (tmp_path / "t.csv").write_text("\n".join([f"{start}file,ill,who", *lines]), encoding="utf-8")
    found, heard = probed(tmp_path)
    assert sorted(found.values()) == ["n", "n", "y", "y"]
    assert heard == ["reading the labelled scans of p"]


def test_a_probe_says_how_many_scans_have_no_label(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "t.csv").write_text("file,ill,who\na/0.png,y,p0\na/1.png,,p1\na/2.png, ,p2\na/3.png,n,p3\n")
    found, heard = probed(tmp_path)
    assert sorted(found.values()) == ["n", "y"]
    assert "p: left out 2 of 4 scans of rank 2, which have no label in column 'ill'" in heard


def test_a_series_may_be_listed_by_its_folder(tmp_path: Path) -> None:
    raw = {"kind": "ct", "patients": 2, "volume_shape": [16, 32, 36], "volume_spacing_mm": [16.0, 10.0, 10.0]}
    write_hospital(parse(PhantomConfig, raw, where=""), tmp_path / "scans")
    folders = sorted(path.relative_to(tmp_path / "scans") for path in (tmp_path / "scans" / "scans").iterdir())
    lines = [f"{folder.as_posix()}/,{label},{folder.name}" for folder, label in zip(folders, "yn", strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["file,ill,who", *lines]))
    found, _ = probed(tmp_path, rank=3)
    assert sorted(found.values()) == ["n", "y"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,il,who\na/0.png,y,p\n", r"no column 'ill' \(did you mean 'il'\?\)"),
        ("file,ill,who\n", "holds no rows"),
        ("file,ill,who\na/0.png,y,p\n./a/0.png,n,p\n", "line 3: lists a file again with another 'ill'"),
    ],
)
def test_a_probes_table_is_read_as_a_sites(tmp_path: Path, text: str, told: str) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ConfigError, match=told):
        probed(tmp_path)


def test_rows_that_the_filter_leaves_out_give_a_probe_no_label(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text("file,ill,who,reader\na/0.png,y,p,A\na/0.png,n,p,B\n")
    found, _ = probed(tmp_path, where={"reader": ["A"]})
    assert list(found.values()) == ["y"]


GRADES = "file,ill,who\na/0.png,1.0,p0\na/1.png,0.0,p1\na/2.png,-1.0,p2\na/3.png,1.0,p3\na/4.png,0.0,p3\n"


def test_what_counts_as_positive_and_negative_and_what_as_neither_is_told_with_its_labels(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    (tmp_path / "t.csv").write_text(GRADES)
    found, heard = probed(tmp_path, changes={"positive": ["1.0"], "negative": ["0.0"]}, patient=None)
    assert sorted(found.values()) == ["0", "0", "1", "1"]
    assert heard[-3:] == [
        "p: positive: 1.0 2",
        "p: negative: 0.0 2",
        "p: left out, as neither positive nor negative: -1.0 1",
    ]
    other, heard = probed(tmp_path, changes={"positive": ["1.0"]}, patient=None)
    assert sorted(other.values()) == ["0", "0", "0", "1", "1"]
    assert heard[-2:] == ["p: positive: 1.0 2", "p: negative: -1.0 1, 0.0 2"]


def test_labels_that_may_be_patients_are_counted_and_not_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "t.csv").write_text("file,ill,who\n" + "".join(f"a/{n}.png,JANE {n},p{n}\n" for n in range(4)))
    _, heard = probed(tmp_path, changes={"positive": ["JANE 1"]})
    assert heard[-2:] == ["p: positive: 1 scans", "p: negative: 3 scans"]


def test_a_label_that_no_scan_has_is_told(tmp_path: Path) -> None:
    write_pictures(tmp_path, 5)
    (tmp_path / "t.csv").write_text(GRADES)
    _, heard = probed(tmp_path, changes={"positive": ["1"], "negative": ["0.0"]}, patient=None)
    assert "p: positive: 0 scans" in heard
    with pytest.raises(
        ConfigError, match="no scan of rank 2 with a label in column 'ill' that is positive or negative"
    ):
        probed(tmp_path, changes={"positive": ["1"], "negative": ["0"]}, patient=None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"negative": ["0"]}, "negative has no meaning without positive"),
        ({"positive": ["1", "2"], "negative": ["0", "2"]}, "positive and negative both hold '2'"),
    ],
)
def test_negative_goes_with_positive_alone(tmp_path: Path, changes: object, told: str) -> None:
    write_pictures(tmp_path, 1)
    with pytest.raises(ConfigError, match=told):
        probed(tmp_path, changes=changes)


def test_a_probe_without_negative_is_kept_where_it_always_was() -> None:
    probe = parse(SimulatedProbe, {"name": "p", "data": [{"folder": "d"}], "rank": 2, "label": "ill"}, where="")
    assert '"negative"' not in probe.canonical()


def test_files_of_a_probe_of_which_nothing_says_whose_they_are_are_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text("file,ill,who\na/0.png,y,p\na/1.png,n,p\n")
    _, heard = probed(tmp_path, patient=None)
    assert [told for told in heard if told.startswith("p: 2 files count as a patient each")] != []
    _, heard = probed(tmp_path)
    assert not [told for told in heard if "a patient each" in told]


@pytest.mark.parametrize(("part", "shared"), [([0.0, 1.0], 3), (None, 0)])
def test_patients_of_a_probe_whom_a_site_trains_on_are_counted(
    tmp_path: Path, part: list[float] | None, shared: int
) -> None:
    """Of those with a label of the rank alone; a patient whom nobody names is none."""
    write_pictures(tmp_path, 5)
    (tmp_path / "t.csv").write_text(GRADES.replace("a/2.png,-1.0", "a/2.png,"))
    (tmp_path / "site.csv").write_text(GRADES if part else GRADES.replace("p", "q").replace("qng", "png"))
    site = {"data": [{"folder": "scans", "table": {"path": "site.csv", "patient": "who"}}]}
    source = {"folder": "scans", "table": {"path": "t.csv", "patient": "who"}}
    simulated(tmp_path, **site)
    path, heard = tmp_path / "simulation.yaml", list[str]()
    probe = {"name": "p", "data": [source], "rank": 2, "label": "ill"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "probe": [probe]}))
    with progress.listen(lambda event: heard.append(event.text) if isinstance(event, progress.Note) else None):
        prepare(read_simulation(path), tmp_path / "out", resume=False)
    told = [words.partition(";")[0] for words in heard if "trains on" in words]
    assert told == [f"p: {shared} of its 3 patients are called as patients that north trains on"][:shared]
