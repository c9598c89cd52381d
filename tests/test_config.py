"""Configuration: every mistake in one message, nothing converted in silence."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from client.finetune_config import FinetuneConfig
from client.site_config import SiteConfig, load_site
from server.coordinator_config import CoordinatorConfig
from server.server_config import ServerConfig
from server.simulate import SimulationConfig
from unimiss_core.config import Config, dump_yaml, load, parse
from unimiss_core.errors import ConfigError
from unimiss_core.file_kinds import KEYS
from unimiss_core.study import StudyConfig
from unimiss_core.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
NAN, INFINITY = math.nan, math.inf


def problems(raw: object, kind: type = StudyConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(kind, raw, where="study.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_all_problems_stand_in_one_message_with_path_and_nearest_key() -> None:
    told = problems(
        {
            "name": "x",
            "objective": {"techer_temperature": 0.04, "student_temperature": -1.0},
            "schedule": {"rounds": "ten"},
            "optimiser": {"lr": "1e-4"},
        }
    )
    assert "4 problems" in told
    assert "unknown key 'objective.techer_temperature' (did you mean 'teacher_temperature'?)" in told
    assert "'objective.student_temperature': input should be greater than or equal to 0.0001, got -1.0" in told
    assert "'schedule.rounds': input should be a valid integer, got \"ten\"" in told
    assert "YAML reads 1e-4 as text; write 1.0e-04" in told


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (
            {"name": "unimiss_plus", "radiograf_weight": 1.0},
            r"unknown key 'objective\.radiograf_weight' \(did you mean 'radiograph_weight'\?\)",
        ),
        (
            {"name": "unimiss_plus", "slices_per_volume": 4},
            r"unknown key 'objective\.slices_per_volume' \(a setting of name: unimiss\)",
        ),
        (
            {"radiograph_weight": 0.5},
            r"unknown key 'objective\.radiograph_weight' \(a setting of name: unimiss_plus\)",
        ),
        ({"zzz": 1}, r"known keys here: centre_momentum, name, slices_per_volume, student_temperature"),
        ({"name": "unimis"}, r"'objective\.name': expected one of unimiss, unimiss_plus, got \"unimis\" \(did you"),
        ({"name": 3}, r"'objective\.name': input should be 'unimiss', got 3"),
        (7, r"'objective': input should be an object, got 7"),
        (
            {"name": "unimiss_plus", "slices_weight": 0.0, "slice_stride": "two"},
            r"(?s)2 problems.*'objective\.slices_weight': .* got 0\.0.*'objective\.slice_stride': .* got .two",
        ),
        (
            {"name": "unimiss_plus", "teacher_temperature": 0.2},
            r"'objective': teacher_temperature=0\.2 must not be above",
        ),
    ],
)
def test_mistakes_in_an_objective_are_told_as_they_stand_in_the_file(objective: object, told: str) -> None:
    assert re.search(told, problems({"name": "x", "objective": objective}))


def test_objective_and_reconstruction_go_together() -> None:
    plus = {"name": "unimiss_plus"}
    assert "unimiss_plus needs the model's reconstruction; write model.reconstruction: true" in problems(
        {"name": "x", "objective": plus}
    )
    assert "unimiss never trains the model's reconstruction; write model.reconstruction: false" in problems(
        {"name": "x", "model": {"reconstruction": True}}
    )
    study = parse(StudyConfig, {"name": "x", "objective": plus, "model": {"reconstruction": True}}, where="")
    assert parse(StudyConfig, yaml.safe_load(dump_yaml(study)), where="") == study


def test_studies_older_than_the_second_objective_keep_their_digests() -> None:
    plain = json.loads(parse(StudyConfig, {"name": "x"}, where="").canonical())
    assert plain["model"].keys() == {"size", "image_size", "volume_size", "prototypes"}
    assert plain["objective"] == {
        "name": "unimiss",
        "student_temperature": 0.1,
        "teacher_temperature": 0.04,
        "centre_momentum": 0.9,
        "teacher_momentum": [0.996, 1.0],
        "slices_per_volume": None,
    }


def test_missing_key_and_no_mapping_are_told() -> None:
    assert "missing key 'name'" in problems({})
    assert "expected a mapping of settings, got [1]" in problems([1])


def test_broken_relation_is_told() -> None:
    told = problems({"name": "x", "objective": {"teacher_temperature": 0.2, "student_temperature": 0.1}})
    assert "teacher_temperature=0.2 must not be above student_temperature=0.1" in told


@pytest.mark.parametrize(
    ("part", "settings", "told"),
    [
        ("views", {"image_size": [32, 40]}, r"'views\.image_size': \[32, 40\] is too small .* at least \[33, 33\]"),
        ("views", {"volume_size": [12, 64, 64]}, r"'views\.volume_size': .* at least \[13, 33, 33\]"),
        ("model", {"image_size": [64, 16]}, r"'model\.image_size': \[64, 16\] is too small"),
        ("model", {"volume_size": [8, 64, 64]}, r"'model\.volume_size': \[8, 64, 64\] is too small"),
        ("model", {"prototypes": 1}, r"'model\.prototypes': .* greater than or equal to 2, got 1"),
        ("model", {"prototypes": 2**20 + 1}, r"'model\.prototypes': .* less than or equal to 1048576"),
        ("views", {"image_size": [64, 4097]}, r"'views\.image_size\.1': .* less than or equal to 4096"),
        ("views", {"views": 33}, r"'views\.views': .* less than or equal to 32, got 33"),
        ("views", {"aspect": [NAN, 1.0]}, r"'views\.aspect\.0': .* finite number"),
        ("views", {"aspect": [2.0, 1.0]}, "aspect: the lower bound 2.0 must not be above the upper bound 1.0"),
        ("plan", {"volume_spacing_mm": [1.0, NAN, 1.0]}, r"'plan\.volume_spacing_mm\.1': .* finite number"),
        ("plan", {"ct_window_hu": [NAN, 1.0]}, r"'plan\.ct_window_hu\.0': .* finite number"),
        ("optimiser", {"lr": INFINITY}, r"'optimiser\.lr': .* finite number"),
        ("optimiser", {"lr": 1e-4, "final_lr": 2e-4}, "final_lr=0.0002 must not be above lr=0.0001"),
        ("optimiser", {"weight_decay": [NAN, INFINITY]}, r"(?s)weight_decay\.0.*weight_decay\.1"),
        ("optimiser", {"weight_decay": [0.1, -0.1]}, r"weight_decay\.1': .* greater than or equal to 0, got -0\.1"),
        ("optimiser", {"warmup_steps": 500}, r"warmup_steps=500 must be below .* = 10 x 50 = 500, or the rate never"),
        ("optimiser", {"freeze_prototypes_steps": 501}, "freeze_prototypes_steps=501 must not be above"),
        ("objective", {"volume_teacher_temperature": 0.2}, "volume_teacher_temperature=0.2 must not be above student_"),
        ("objective", {"volume_teacher_temperature": 0}, r"volume_teacher_temperature': .* greater than or equal"),
        (
            "objective",
            {"slices_per_volume": 17},
            r"slices_per_volume=17 must not be above views\.volume_size\[0\]=16",
        ),
        (
            "objective",
            {"name": "unimiss_plus", "reconstruction_weight": 1e30},
            r"'objective\.reconstruction_weight': .* less than or equal to 1000000, got 1e\+30",
        ),
        ("objective", {"name": "unimiss_plus", "slices_weight": 1e-30}, r"slices_weight': .* greater than or equal to"),
        ("objective", {"name": "unimiss_plus", "radiograph_weight": 1e7}, r"radiograph_weight': .* less than or equal"),
        ("objective", {"teacher_temperature": 1e-5}, r"teacher_temperature': .* greater than or equal to 0\.0001"),
        (
            "objective",
            {"teacher_temperature": 5e-324},
            r"objective\.teacher_temperature': expected numbers of at",
        ),
        ("batch", {"images": 10**400}, r"'batch\.images': expected numbers of at most 1e\+300"),
        ("batch", {"volumes": 10**9 + 1}, r"'batch\.volumes': .* less than or equal to 1000000000"),
        ("views", {"blur_sigma": [0.1, 5e7]}, "blur_sigma: the upper bound 5e\\+07 must be at most 1000"),
        ("views", {"contrast_factor": [1.0, 1e40]}, "contrast_factor: the upper bound 1e\\+40 must be at most 100"),
        ("views", {"volume_region": 1e40}, r"volume_region': .* less than or equal to 1000"),
        ("plan", {"volume_spacing_mm": [1.0, 1.0, 1e4]}, "must be above zero, 100 mm at most"),
        ("aggregation", {"server_optimiser": {"name": "fedadam", "tau": 1e40}}, r"tau': .* less than or equal to"),
        ("aggregation", {"server_optimiser": {"name": "fedavgm", "lr": 1e40}}, r"lr': .* less than or equal to"),
        ("schedule", {"rounds": 1}, r"warmup_steps=100 must be below rounds x local_steps = 1 x 50 = 50"),
    ],
)
def test_a_study_that_cannot_train_as_it_says_is_refused_before_it_starts(
    part: str, settings: dict[str, object], told: str
) -> None:
    assert re.search(told, problems({"name": "x", part: settings}))


def test_the_limits_themselves_are_allowed() -> None:
    raw = {
        "name": "x",
        "model": {"prototypes": 2, "image_size": [33, 33], "volume_size": [13, 33, 33]},
        "views": {"views": 32, "image_size": [33, 33], "volume_size": [13, 33, 33]},
        "optimiser": {"lr": 1e-6, "final_lr": 1e-6, "warmup_steps": 3, "freeze_prototypes_steps": 4},
        "schedule": {"rounds": 2, "local_steps": 2},
    }
    assert parse(StudyConfig, raw, where="").schedule.rounds == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "study").glob("*.yaml")), ids=lambda path: path.name)
def test_every_study_that_comes_with_the_project_is_valid(path: Path) -> None:
    assert load(StudyConfig, path).name == path.stem


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "simulation").glob("*.yaml")), ids=lambda path: path.name)
def test_every_simulation_that_comes_with_the_project_has_a_valid_study(path: Path) -> None:
    simulation = read_yaml(path)
    study = read_yaml(path.parent / simulation["study"])
    for key, change in simulation.get("overrides", {}).items():
        study[key] = study[key] | change if isinstance(change, dict) else change
    assert parse(StudyConfig, study, where=path.name).name != "nano"


def test_unknown_key_far_from_all_others_lists_what_is_known() -> None:
    assert "known keys here: alternate, local_steps, rounds" in problems({"name": "x", "schedule": {"zzzzz": 1}})


def test_a_number_is_not_taken_for_a_text_or_a_yes() -> None:
    told = problems({"name": 7, "seed": True, "schedule": {"rounds": 2.5}})
    assert "'name'" in told
    assert "'seed'" in told
    assert "'schedule.rounds'" in told


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
"""626 bytes that stand for 10^12 texts."""
UNPRINTABLE = '"\\e[2Jbeta: approved": 3\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nname: b\n", "key 'name' is written twice"),
        ("name: [", "is not valid YAML"),
        ("when: 2020-01-01\nname: x\n", "write dates"),
        ("when: 2020-13-45\nname: x\n", "cannot be read .month must be in 1..12.; write texts in quotes"),
        ("seed: " + "1" * 5000, "holds a value that cannot be read"),
        ("seed: 0x" + "f" * 5000, "'seed': expected numbers of at most"),
        ("seed: 1:30", "1:30 is a number to base 60"),
        ("[" * 3000, "too deep"),
        ("a: " + "[" * 400 + "]" * 400, "too deep"),
        ("? [a]\n: 3\n", "line 1.: a key is a list or a mapping"),
        ("{{ name }}: 3\n", "a key is a list or a mapping"),
        ("a: &a [*a]\n", "it refers to itself"),
        ("? &a [*a]\n: 3\n", "it refers to itself"),
        (LAUGHS, "more than 100,000 entries"),
        ("#" * (4 * 2**20 + 1), "larger than 4 MiB"),
        ('name: "\\ud800"\n', "half a character"),
        ("name: x\noptimiser: {lr: 1e999}\n", "'optimiser.lr': .*got \"1e999\""),
        (UNPRINTABLE, "unknown key '\ufffd.2Jbeta: approved'"),
        (f"{UNPRINTABLE}{UNPRINTABLE}", "key '\ufffd.2Jbeta: approved' is written twice"),
    ],
)
def test_bad_yaml_is_told_with_its_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as caught:
        load(StudyConfig, path)
    assert str(path) in str(caught.value)


def test_what_nests_too_deep_is_told_whoever_read_it() -> None:
    """A peer's study comes as JSON."""
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="nests lists or mappings too deep"):
        parse(StudyConfig, {"name": "x", "views": deep}, where="study")


def test_merged_keys_may_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {rounds: 2, local_steps: 3}\nschedule: {<<: *base, rounds: 5}\n")
    assert read_yaml(tmp_path / "a.yaml")["schedule"] == {"rounds": 5, "local_steps": 3}


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(StudyConfig, tmp_path / "none.yaml")


def test_yaml_round_trip_keeps_the_digest(tmp_path: Path) -> None:
    study = parse(StudyConfig, {"name": "x", "optimiser": {"lr": 3e-4}, "views": {"image_size": [33, 47]}}, where="")
    (tmp_path / "study.yaml").write_text(dump_yaml(study))
    assert load(StudyConfig, tmp_path / "study.yaml").digest() == study.digest()


def test_digest_tells_studies_apart_but_not_their_spelling() -> None:
    plain = parse(StudyConfig, {"name": "x"}, where="")
    spelt_out = parse(StudyConfig, {"seed": 0, "name": "x"}, where="")
    other = parse(StudyConfig, {"name": "x", "seed": 1}, where="")
    assert plain.digest() == spelt_out.digest() != other.digest()


def test_site_paths_count_from_the_site_file(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    path = tmp_path / "site.yaml"
    path.write_text("name: a\ndata: [{folder: scans}]\nstate: state\n")
    site = load_site(path)
    assert site.data[0].folder == tmp_path / "scans"
    assert site.state == tmp_path / "state"


@pytest.mark.parametrize(
    ("written", "devices"),
    [("", ("auto",)), ("devices: cpu", ("cpu",)), ("devices: [cuda:0, cuda:1]", ("cuda:0", "cuda:1"))],
)
def test_devices_are_one_name_or_a_list(tmp_path: Path, written: str, devices: tuple[str, ...]) -> None:
    path = tmp_path / "site.yaml"
    (tmp_path / "scans").mkdir()
    path.write_text(f"name: a\ndata: [{{folder: scans}}]\nstate: state\n{written}\n")
    site = load_site(path)
    assert site.devices == devices
    path.write_text(dump_yaml(site))
    assert load_site(path) == site
    assert "'devices': " in problems({"name": "a", "state": "s", "data": [{"folder": "f"}], "devices": 3}, SiteConfig)


@pytest.mark.parametrize("settings", [{"threads": 100_000}, {"workers": 2000}, {"micro_batch": {"images": 10**40}}])
def test_what_would_end_a_sites_process_is_refused_in_its_file(settings: dict[str, object]) -> None:
    told = problems({"name": "x", "data": [{"folder": "."}], **settings}, SiteConfig)
    assert re.search("less than or equal to|above 0 and at most 1000000", told)


def test_every_missing_folder_of_a_site_is_told(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("name: a\ndata: [{folder: gone}, {folder: nowhere, table: {path: t.csv}}]\nstate: state\n")
    with pytest.raises(ConfigError, match=r"(?s)data\.0\.folder.*data\.1\.folder.*data\.1\.table\.path"):
        load_site(path)


def test_patient_pattern_needs_its_group() -> None:
    raw = {"name": "a", "state": "s", "data": [{"folder": "f", "patient_pattern": "([0-9]+)"}]}
    assert "needs a group named patient" in problems(raw, SiteConfig)


def test_a_list_is_not_called_too_short_because_its_entries_are_wrong() -> None:
    told = problems({"name": "a", "state": "s", "data": [{"foldr": "x"}]}, SiteConfig)
    assert "did you mean 'folder'?" in told
    assert "at least 1" not in told
    told = problems({"name": "a", "state": "s", "data": []}, SiteConfig)
    assert told == "study.yaml: 1 problem\n  - 'data': expected at least 1 entry, got []"


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        ({"late_weight": 0.5}, "unknown key 'late_weight' (did you mean 'aggregation.late_weight'?)"),
        ({"local_steps": 5}, "unknown key 'local_steps' (did you mean 'schedule.local_steps'?)"),
        ({"wire": {"late_weight": 0.5}}, "unknown key 'wire.late_weight' (did you mean 'aggregation.late_weight'?)"),
        ({"schedule": {"seed": 3}}, "unknown key 'schedule.seed' (did you mean 'seed' at the top level?)"),
        ({"share": 0.2}, "unknown key 'share' (did you mean 'aggregation.rule.share'?)"),
        ({"image_size": [64, 64]}, "(did you mean 'model.image_size' or 'views.image_size'?)"),
    ],
)
def test_a_key_at_the_wrong_level_is_answered_with_its_place(raw: dict[str, object], hint: str) -> None:
    assert hint in problems({"name": "x", **raw})


@pytest.mark.parametrize("name", ["Our Study", "über", "-a", "a" * 65, "1e4 "])
def test_what_a_name_may_be_is_told_in_words(name: str) -> None:
    words = "lower-case letters, digits, '-' and '_', first a letter or digit, 64 at most"
    told = f"'name': expected {words}, got {json.dumps(name)[:57]}"
    assert told in problems({"name": name})
    assert "pattern" not in problems({"name": name})


@pytest.mark.parametrize("wrong", [0, -3, "all", 1.5, True])
def test_a_value_that_may_be_of_several_kinds_is_one_mistake(wrong: object) -> None:
    raw = {"name": "a", "state": "s", "data": [{"folder": "f"}], "micro_batch": {"images": wrong}}
    told = (
        f"'micro_batch.images': expected auto, an integer above 0 and at most 1000000 or null, got {json.dumps(wrong)}"
    )
    assert problems(raw, SiteConfig) == f"study.yaml: 1 problem\n  - {told}"


PATIENT = {"mode": "patient", "max_epsilon": 8.0, "noise_multiplier": 1.0, "centre_noise": 5.0}
SITE = {"mode": "site", "max_epsilon": 8.0, "noise_multiplier": 4.0, "clip_norm": 1.0, "sites": 5}
LARGE = {"images": 128, "volumes": 128}


def test_a_centre_that_drowns_in_noise_is_refused_and_each_way_out_leads_out() -> None:
    """Batch 32, noise 5: momentum 0.99 trained as without noise and 0.9 not at all, where a logit's noise is 0.011 and
    0.036; the rule puts the line at 0.25 of the teacher temperature 0.04."""
    raw = {"name": "x", "privacy": PATIENT, "batch": {"images": 32, "volumes": 128}}
    told = problems(raw)
    assert "the centre of images drowns in noise" in told
    assert "stands in every target: 0.0358 of it, expected at most 0.01, 0.25 of the teacher's temperature" in told
    assert "= 5 / 32 * 0.229, m being the momentum" in told
    assert "volumes drowns" not in told
    ways = dict(re.findall(r"([\w.]+): ([0-9.]+) \(now (?:0\.9|32|5)\)", told))
    momentum, batch = float(ways["objective.centre_momentum"]), int(ways["batch.images"])
    noise = float(ways["privacy.centre_noise"])
    assert 0.99 < momentum < 0.993
    parse(StudyConfig, {**raw, "batch": {"images": batch, "volumes": 128}}, where="x")
    assert "drowns" in problems({**raw, "batch": {"images": batch - 1, "volumes": 128}})
    parse(StudyConfig, {**raw, "objective": {"centre_momentum": momentum}}, where="x")
    parse(StudyConfig, {**raw, "privacy": {**PATIENT, "centre_noise": noise}}, where="x")


def test_the_momentum_that_is_told_does_for_both_ranks() -> None:
    raw = {"name": "x", "privacy": PATIENT, "batch": {"images": 32, "volumes": 8}}
    told = set(re.findall(r"centre_momentum: ([0-9.]+) \(now", problems(raw)))
    assert len(told) == 1
    parse(StudyConfig, {**raw, "objective": {"centre_momentum": float(told.pop())}}, where="x")


def test_no_momentum_is_told_where_none_is_a_way_out() -> None:
    cold, alone = {"teacher_temperature": 1e-4}, {"images": 1, "volumes": 1}
    told = problems({"name": "x", "privacy": PATIENT, "batch": alone, "objective": cold})
    assert "the centre of images drowns" in told
    assert "centre_momentum:" not in told


def test_all_relations_that_do_not_hold_are_told_at_once_each_on_its_line() -> None:
    """configs/study/private.yaml, shrunk by hand to a hospital of thirty patients."""
    raw = read_yaml(ROOT / "configs" / "study" / "private.yaml")
    raw["schedule"] = {"rounds": 2, "local_steps": 5}
    raw["batch"] = {"images": 8, "volumes": 8}
    raw["aggregation"] = {"weighting": "scans"}
    first, *others = problems(raw).splitlines()
    assert first == "study.yaml: 4 problems"
    begins = ("optimiser.warmup_steps=50", "aggregation.weighting=", "the centre of images", "the centre of volumes")
    assert [line[4 : 4 + len(begin)] for line, begin in zip(others, begins, strict=True)] == list(begins)


def test_both_ranks_need_a_centre_that_stands_whatever_sites_hold() -> None:
    told = problems({"name": "x", "privacy": PATIENT, "batch": {"images": 128, "volumes": 2}})
    assert "the centre of volumes drowns" in told
    assert "images drowns" not in told
    softer = {"student_temperature": 4.0, "volume_teacher_temperature": 3.0}
    parse(
        StudyConfig,
        {"name": "x", "privacy": PATIENT, "batch": {"images": 128, "volumes": 2}, "objective": softer},
        where="x",
    )


@pytest.mark.parametrize(
    ("section", "changes", "told"),
    [
        ("aggregation", {"weighting": "sqrt"}, "weighs sites by counts of scans, which are not released in mode site"),
        ("aggregation", {"rule": "median"}, "aggregation.rule=median is moved by one site further"),
        ("aggregation", {"max_size_ratio": 10.0}, "write max_size_ratio: null"),
        ("aggregation", {"late_weight": 0.5}, "write late_weight: 0.0"),
        ("aggregation", {"max_update_norm": 0.5}, "refuses updates that privacy.clip_norm=1 lets through"),
        ("wire", {"dtype": "int8"}, "write dtype: bf16 or fp32"),
    ],
)
def test_what_lets_a_site_count_more_than_its_clip_is_refused(
    section: str, changes: dict[str, object], told: str
) -> None:
    raw: dict[str, dict[str, object]] = {"aggregation": {"max_size_ratio": None}, "wire": {}}
    parse(StudyConfig, {"name": "x", "privacy": SITE, **raw}, where="x")
    raw[section] = {**raw[section], **changes}
    assert told in problems({"name": "x", "privacy": SITE, **raw})
    parse(StudyConfig, {"name": "x", **raw}, where="x")


@pytest.mark.parametrize(
    ("aggregation", "told"),
    [
        ({"max_update_norm": 1e30}, "max_update_norm=1e+30 must be at most 1e+12: "),
        ({"max_update_norm": 1.01e12}, "be switched off; write a norm that no honest update comes near"),
        ({"max_update_norm": 1e30, "rule": "median"}, "max_update_norm=1e+30 must be at most 1e+12"),
        ({"max_update_norm": 1.01e6, "weighting": "scans"}, "max_update_norm=1.01e+06 times max_scans must be at most"),
        ({"max_update_norm": 1.01e9, "weighting": "sqrt"}, "max_update_norm=1.01e+09 times the root of max_scans must"),
        ({"max_scans": 1_000_000_001, "weighting": "scans"}, ", or a lower max_scans"),
        ({"max_scans": 10**299, "weighting": "scans"}, "must be at most"),
        ({"max_scans": 10**300, "weighting": "sqrt", "max_update_norm": 1e-300}, "must be at most"),
    ],
)
def test_a_bound_that_the_sum_of_updates_cannot_bear_is_refused(aggregation: dict[str, object], told: str) -> None:
    assert told in problems({"name": "x", "aggregation": aggregation})


@pytest.mark.parametrize(
    "aggregation",
    [
        {"max_update_norm": 1e12, "max_scans": 10**299},
        {"max_update_norm": 1e6, "weighting": "scans"},
        {"max_update_norm": 1e9, "weighting": "sqrt"},
        {"max_scans": 10**9, "weighting": "scans"},
    ],
)
def test_a_bound_up_to_what_the_sum_of_updates_bears_is_taken(aggregation: dict[str, object]) -> None:
    parse(StudyConfig, {"name": "x", "aggregation": aggregation}, where="x")


def test_what_is_made_of_noised_updates_is_free_at_patient_level_but_counts_are_not() -> None:
    raw = {"name": "x", "privacy": PATIENT, "batch": LARGE, "wire": {"dtype": "int8"}}
    free = {"rule": "median", "late_weight": 0.5, "server_optimiser": {"name": "fedadam"}}
    parse(StudyConfig, {**raw, "aggregation": free}, where="x")
    told = problems({**raw, "aggregation": {"weighting": "scans"}})
    assert "aggregation.weighting=scans weighs sites by counts of scans, which are not released in mode patient" in told


# -- a file of another kind -------------------------------------------------------------------------------------------

KINDS: dict[str, type[Config]] = {
    "a study file": StudyConfig,
    "a simulation file": SimulationConfig,
    "a site file": SiteConfig,
    "a coordinator file": CoordinatorConfig,
    "a fine-tuning file": FinetuneConfig,
    "a coordinator's server.yaml": ServerConfig,
}


def test_the_keys_by_which_kinds_of_files_are_told_are_those_of_their_classes() -> None:
    assert {kind: set(keys) for kind, keys in KEYS.items()} == {
        name: set(kind.model_fields) for name, kind in KINDS.items()
    }


@pytest.mark.parametrize(
    ("file", "kind", "told"),
    [
        ("study/nano.yaml", SimulationConfig, "this is a study file, by its keys; expected a simulation file"),
        ("coordinator/example.yaml", StudyConfig, "this is a coordinator file, by its keys; expected a study file"),
        ("simulation/private_demo.yaml", StudyConfig, "this is a simulation file, by its keys; expected a study file"),
        ("study/nano.yaml", FinetuneConfig, "this is a study file, by its keys; expected a fine-tuning file"),
        ("finetune/hippocampus.yaml", SiteConfig, "this is a fine-tuning file, by its keys; expected a site file"),
        ("site/example.yaml", StudyConfig, "this is a site file, by its keys; expected a study file"),
    ],
)
def test_a_file_of_another_kind_is_told_as_one(file: str, kind: type[Config], told: str) -> None:
    path = ROOT / "configs" / file
    with pytest.raises(ConfigError) as caught:
        load(kind, path)
    assert str(caught.value) == f"{path}: {told}"


def test_a_file_with_a_mistake_in_it_is_no_file_of_another_kind() -> None:
    assert "unknown key 'out'" in problems({"name": "x", "seed": 1, "out": "there"})
    assert "unknown key 'modle'" in problems({"name": "x", "modle": {}, "data": []})
