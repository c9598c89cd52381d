import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.finetune_config import FinetuneConfig, load_finetune
from client.label_tables import Case, LabelTable, label_table, labels_in
from client.splits import split_cases
from unimiss_core.config import parse
from unimiss_core.errors import ConfigError
from unimiss_core.progress import Note, listen


def configured(folder: Path, task: dict[str, Any], data: dict[str, Any], **more: Any) -> FinetuneConfig:
    raw = {"name": "x", "task": task, "init": {"name": "scratch"}, "data": data, **more}
    config = parse(FinetuneConfig, raw, where="x.yaml")
    paths = {name: folder / value for name, value in config.data if isinstance(value, Path)}
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


BINARY = {"name": "classification", "rank": 2, "classes": ["no", "yes"]}
MASKS = {"name": "segmentation", "rank": 3, "classes": ["front", "back"]}


def table(folder: Path, text: str, task: dict[str, Any] = BINARY, **data: Any) -> LabelTable:
    (folder / "t.csv").write_text(text)
    given = {"split": {"name": "given"}} if "split" in text else {}
    return label_table(configured(folder, task, {"table": "t.csv", **data}, **given))


def test_a_table_gives_each_scan_its_class_its_patient_and_its_part(tmp_path: Path) -> None:
    found = table(
        tmp_path, "scan,label,patient,split,extra\na.png,yes,1,train,x\nb.png,no,2,val,x\nc.png,no,3,Test,x\n"
    )
    assert found.cases == (
        Case(2, "a.png", "1", target=(1,), part="train"),
        Case(3, "b.png", "2", target=(0,), part="validation"),
        Case(4, "c.png", "3", target=(0,), part="test"),
    )


def test_several_labels_stand_in_columns_of_their_names_and_lines_may_be_chosen(tmp_path: Path) -> None:
    task = {"name": "classification", "kind": "multi_label", "rank": 2, "classes": ["Edema", "Mass"]}
    text = "image,patient,Edema,Mass,view\na.png,1,0,1,PA\nb.png,1,1,1,AP\n"
    found = table(tmp_path, text, task, scan="image", where={"view": ["AP"]})
    assert [(case.file, case.target) for case in found.cases] == [("b.png", (1, 1))]


def test_a_column_that_is_not_there_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'scan'; no column 'patient' \(did you mean 'patients'\?\)"):
        table(tmp_path, "file,label,patients\na.png,yes,1\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("scan;label;patient\na.png;yes;1\n", "a single column; separate columns by commas"),
        ("", "holds no rows"),
        ("scan,label,patient\na.png,yes\n", "line 2: 'patient' is empty"),
    ],
)
def test_what_is_no_table_is_told_by_what_it_is(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        table(tmp_path, text)


def test_a_column_that_stands_twice_is_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 columns 'label'"):
        table(tmp_path, "scan,label,patient,label\na.png,no,1,yes\n")
    assert len(table(tmp_path, "scan,label,patient,note,note\na.png,no,1,x,y\n").cases) == 1


def test_a_path_that_no_file_can_have_is_told_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: 'scan' must be a relative path"):
        table(tmp_path, "scan,label,patient\na\0.png,no,1\n")


def test_a_path_that_leads_nowhere_is_told_as_that_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("scan,label,patient\na.png,yes,1\n")
    wrong = {
        r"data\.table: there is no file .*u\.csv.* --data": (BINARY, {"table": "u.csv"}),
        r"data\.folder: there is no folder .*pictures": (BINARY, {"table": "t.csv", "folder": "pictures"}),
        r"data\.folder: there is no folder .*hippocampus": (MASKS, {"name": "msd", "folder": "hippocampus"}),
        r"data\.file: there is no file .*m\.npz": (BINARY, {"name": "medmnist", "file": "m.npz"}),
    }
    for told, (task, data) in wrong.items():
        with pytest.raises(ConfigError, match=told):
            label_table(configured(tmp_path, task, data))


def test_a_path_that_leads_nowhere_is_told_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    raw = {"name": "x", "task": BINARY, "init": {"name": "scratch"}, "data": {"table": "nih/labels.csv"}}
    for more, told in (
        ({"data_root": "archive"}, f"data.table: there is no file nih/labels.csv in {tmp_path / 'archive'};"),
        ({"data": {"table": "/nowhere/labels.csv"}}, "data.table: there is no file /nowhere/labels.csv;"),
    ):
        file.write_text(json.dumps(raw | more))
        with pytest.raises(ConfigError) as caught:
            label_table(load_finetune(file))
        assert str(caught.value).startswith(told)


def test_every_wrong_line_is_told_by_number_and_none_of_its_text(tmp_path: Path) -> None:
    text = (
        "scan,label,patient,split\n../Miller.png,no,1,train\na.png,Miller,1,train\nb.png,yes,,often\na.png,no,1,test\n"
    )
    with pytest.raises(ConfigError) as told:
        table(tmp_path, text)
    for piece in ("line 2: 'scan'", "line 3: column 'label'", "line 4: 'patient'", "line 4: 'split'", "line 5: lists"):
        assert piece in str(told.value)
    assert "Miller" not in str(told.value)


SHIFTED = "scan,label,patient\na.png,yes,small, left,P1\n\nb.png,no,P2,\n"
"""Of the mark of a text without quotation marks: its second half would be the patient."""


def test_a_line_with_more_cells_than_the_header_is_told_and_a_spreadsheets_last_comma_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 problem") as raised:
        table(tmp_path, SHIFTED)
    assert "line 2: has more cells than the header line; put quotation marks" in str(raised.value)
    (tmp_path / "t.csv").write_text(SHIFTED)
    config = configured(tmp_path, BINARY, {"table": "t.csv"})
    found = labels_in(config.data, config.task, one_by_one=True)
    assert [(case.number, case.patient) for case in found.cases] == [(4, "P2")]  # the line that an editor shows
    assert len(found.left_out) == 1


def test_a_cell_that_is_no_class_is_told_apart_from_one_that_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as told:
        table(tmp_path, "scan,label,patient\na.png,0,1\nb.png,,2\n")
    assert "line 2: column 'label' holds another class than no, yes" in str(told.value)
    assert "line 3: column 'label' is empty; expected one of no, yes" in str(told.value)


WRONG = (
    b"../Miller.png,no,1",
    b"a.png,Miller,1",
    b"b.png,yes,",
    b"M\xfcller.png,yes,2",
    b"c.png,yes,M\xfcller",
    b"d.png",
    b",yes,3",
    b"./fine.png,yes,4",  # listed before, of the same patient
)


@pytest.mark.parametrize("wrong", [*((line,) for line in WRONG), WRONG])
def test_where_lines_stand_by_themselves_a_wrong_one_costs_no_other(tmp_path: Path, wrong: tuple[bytes, ...]) -> None:
    """What is found is what the table without these lines has, though all of them alike are refused otherwise."""
    right = [b"fine.png,no,4", b"fine.png,yes,5", b"e.png,yes,4"]  # one scan of two patients is each one's own
    found = []
    for lines in (right, [right[0], *wrong, *right[1:]]):
        (tmp_path / "t.csv").write_bytes(b"\n".join([b"scan,label,patient", *lines, b""]))
        config = configured(tmp_path, BINARY, {"table": "t.csv"})
        found.append(labels_in(config.data, config.task, one_by_one=True))
    alone, among = ([(case.file, case.patient, case.target) for case in each.cases] for each in found)
    assert among == alone == [("fine.png", "4", (0,)), ("fine.png", "5", (1,)), ("e.png", "4", (1,))]
    assert found[0].left_out == ()
    assert [told.split(":")[0] for told in found[1].left_out] == [f"line {3 + place}" for place in range(len(wrong))]
    assert "ller" not in str(found[1].left_out)
    with pytest.raises(ConfigError):
        label_table(config)


def test_where_lines_stand_by_themselves_a_patient_more_or_less_changes_nobody_elses(tmp_path: Path) -> None:
    lines = [b"fine.png,no,4", *WRONG, b"fine.png,yes,5", b"a.png,no,5", b"a.png,yes,5", b"a.png,yes,1"]

    def found(kept: list[bytes]) -> dict[str, list[Any]]:
        (tmp_path / "t.csv").write_bytes(b"\n".join([b"scan,label,patient", *kept, b""]))
        config = configured(tmp_path, BINARY, {"table": "t.csv"})
        cases = labels_in(config.data, config.task, one_by_one=True).cases
        return {who: [(case.file, case.target) for case in cases if case.patient == who] for who in "145"}

    with_all = found(lines)
    assert with_all == {"1": [("a.png", (1,))], "4": [("fine.png", (0,))], "5": [("fine.png", (1,)), ("a.png", (0,))]}
    for left_out in with_all:
        others = found([line for line in lines if not line.endswith(b"," + left_out.encode())])
        assert others == with_all | {left_out: []}


@pytest.mark.parametrize("text", ["scan,label,patient\n", "scan,label,patient\na.png,Miller,1\n"])
def test_where_lines_stand_by_themselves_none_may_be_left(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    config = configured(tmp_path, BINARY, {"table": "t.csv", "where": {"label": ["Miller"]}})
    assert labels_in(config.data, config.task, one_by_one=True).cases == ()


def test_a_quotation_mark_that_nothing_closes_is_told_for_it_would_swallow_all_that_follows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('scan,label,patient\na.png,no,1\nb.png,yes,"2\nc.png,no,3\n')
    config = configured(tmp_path, BINARY, {"table": "t.csv"})
    for one_by_one in (False, True):
        with pytest.raises(ConfigError, match="line 4 is no CSV, or one before it: a quotation mark is open"):
            labels_in(config.data, config.task, one_by_one=one_by_one)


def test_where_cases_of_a_folder_stand_by_themselves_a_wrong_one_costs_no_other(tmp_path: Path) -> None:
    names = ["p1_a_0000.nii.gz", "p1_a_0001.nii.gz", "p2_b_0000.nii.gz", "who_0000.nii.gz", "who_0001.nii.gz"]
    msd(tmp_path, names, ["p1_a.nii.gz", "p2_b.nii.gz", "who.nii.gz"])
    data = {"name": "msd", "folder": ".", "channel": 1, "patient_pattern": "^(?P<patient>p[0-9])_"}
    config = configured(tmp_path, MASKS, data)
    found = labels_in(config.data, config.task, one_by_one=True)
    assert [(case.number, case.patient, case.file) for case in found.cases] == [(1, "p1", "imagesTr/p1_a_0001.nii.gz")]
    assert found.left_out == (
        "case 2: has no channel 1 (data.channel)",
        "case 3: data.patient_pattern does not match its name",
    )
    with pytest.raises(ConfigError, match=r"2 problem.*\n  - case 2.*\n  - case 3"):
        label_table(config)


def msd(folder: Path, images: list[str], masks: list[str], told: dict[str, Any] | None = None) -> None:
    for name, files in {"imagesTr": images, "labelsTr": masks}.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).touch()
    if told is not None:
        (folder / "dataset.json").write_text(json.dumps(told))


def test_a_decathlon_folder_pairs_images_with_masks_of_the_same_name(tmp_path: Path) -> None:
    msd(tmp_path, ["h_001.nii.gz", "h_002.nii.gz", "h_1003.nii.gz"], ["h_001.nii.gz", "h_1003.nii.gz"])
    notes: list[Any] = []
    with listen(notes.append):
        found = label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": "."}))
    assert [(case.file, case.mask) for case in found.cases] == [
        ("imagesTr/h_001.nii.gz", "labelsTr/h_001.nii.gz"),
        ("imagesTr/h_1003.nii.gz", "labelsTr/h_1003.nii.gz"),
    ]
    assert [note.text.split()[0] for note in notes if isinstance(note, Note)] == ["1"]


def test_a_channel_of_an_nnunet_folder_is_chosen_and_its_modality_known(tmp_path: Path) -> None:
    told = {"labels": {"background": 0, "front": 1, "back": 2}, "channel_names": {"0": "T2", "1": "CT"}}
    images = [f"c_{case}_{channel:04d}.nii.gz" for case in (1, 2) for channel in (0, 1)]
    msd(tmp_path, images, ["c_1.nii.gz", "c_2.nii.gz"], told)
    found = label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": ".", "channel": 1}))
    assert [case.file for case in found.cases] == ["imagesTr/c_1_0001.nii.gz", "imagesTr/c_2_0001.nii.gz"]
    assert found.modality == "CT"
    with pytest.raises(ConfigError, match=r"2 problem.*\n  - case 1: has no channel 7"):
        label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": ".", "channel": 7}))
    one_class = {**MASKS, "classes": ["all"]}
    with pytest.raises(ConfigError, match=r"task\.classes: 1 beside the background; dataset\.json has 2"):
        label_table(configured(tmp_path, one_class, {"name": "msd", "folder": "."}))


def test_cases_are_told_apart_by_all_of_a_name_that_holds_dots(tmp_path: Path) -> None:
    names = [f"1.2.840.{number}.nii.gz" for number in (1, 2, 3)]
    msd(tmp_path, names, names)
    found = label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": "."}))
    assert [(case.file, case.mask) for case in found.cases] == [(f"imagesTr/{n}", f"labelsTr/{n}") for n in names]


def test_one_scan_by_two_spellings_of_its_path_is_one_scan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 problem.*\n  - line 3: lists the scan of line 2 again"):
        table(tmp_path, "scan,label,patient\nd/a.png,no,1\n./d//a.png,yes,2\n")


@pytest.mark.parametrize(
    "labels", [{"0": "background", "1": "Back", "2": "Front"}, {"background": 0, "Back": 1, "Front": 2}]
)
def test_names_that_a_folder_gives_to_other_values_are_told(tmp_path: Path, labels: dict[str, Any]) -> None:
    msd(tmp_path, ["a.nii"], ["a.nii"], {"labels": labels})
    with pytest.raises(ConfigError, match=r"'front' is value 1, and dataset\.json says it is 2"):
        label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": "."}))
    in_order = {**MASKS, "classes": ["back", "front"]}
    assert len(label_table(configured(tmp_path, in_order, {"name": "msd", "folder": "."})).cases) == 1
    own_words = {**MASKS, "classes": ["posterior", "anterior"]}
    assert len(label_table(configured(tmp_path, own_words, {"name": "msd", "folder": "."})).cases) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"channel_names": {}}', "[" * 50_000], ids=["none", "list", "other", "deep"]
)
def test_a_folders_description_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    msd(tmp_path, ["a.nii"], ["a.nii"], {})
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ConfigError, match=r"dataset\.json is no JSON with 'labels'"):
        label_table(configured(tmp_path, MASKS, {"name": "msd", "folder": "."}))


def of_medmnist(folder: Path, **changed: np.ndarray[Any, Any]) -> LabelTable:
    arrays = {f"{n}_labels": np.array([[0], [1]]) for n in ("train", "val", "test")}
    np.savez(folder / "m.npz", **(arrays | changed))
    return label_table(configured(folder, BINARY, {"name": "medmnist", "file": "m.npz"}))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array(3), "val_labels holds no list of numbers"),
        (np.array([["0"], ["1"]]), "val_labels holds no list of numbers"),
        (np.array([[0.0], [0.9]]), "whole numbers from 0 to 1"),
        (np.array([[0.0], [np.nan]]), "whole numbers from 0 to 1"),
        (np.zeros((0, 2)), r"val_labels has 2 column\(s\); expected 1"),
    ],
)
def test_labels_of_a_medmnist_file_that_are_none(tmp_path: Path, labels: np.ndarray[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_medmnist(tmp_path, val_labels=labels)


def test_a_part_of_a_medmnist_file_may_be_empty(tmp_path: Path) -> None:
    found = of_medmnist(tmp_path, val_labels=np.zeros((0, 1), np.uint8))
    assert [case.part for case in found.cases] == ["train", "train", "test", "test"]


def encrypted(content: bytearray) -> None:
    content[content.index(b"PK\3\4") + 6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1


def packed_by_an_unknown_method(content: bytearray) -> None:
    content[content.index(b"PK\3\4") + 8] = 99
    content[content.index(b"PK\1\2") + 10] = 99


def wrong_in_a_header(content: bytearray) -> None:
    content[content.index(b"NUMPY") + 10] = ord("(")


@pytest.mark.parametrize("damage", [encrypted, packed_by_an_unknown_method, wrong_in_a_header])
def test_a_medmnist_file_that_is_damaged_within_is_one_message(
    tmp_path: Path, damage: Callable[[bytearray], None]
) -> None:
    of_medmnist(tmp_path)
    content = bytearray((tmp_path / "m.npz").read_bytes())
    damage(content)
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.file: is no MedMNIST \.npz"):
        label_table(configured(tmp_path, BINARY, {"name": "medmnist", "file": "m.npz"}))


@pytest.mark.parametrize("damage", ["cut", "one array", "objects"])
def test_a_medmnist_file_that_is_none_is_one_message(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "m.npz"
    labels = {f"{n}_labels": np.array([[0], [1]]) for n in ("train", "val", "test")}
    if damage == "objects":
        labels["val_labels"] = np.array([[None], [1]], dtype=object)
    np.savez(file, **labels)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    if damage == "one array":
        with file.open("wb") as opened:
            np.save(opened, np.zeros(3))
    with pytest.raises(ConfigError, match=r"data\.file: is no MedMNIST \.npz"):
        label_table(configured(tmp_path, BINARY, {"name": "medmnist", "file": "m.npz"}))


def test_a_medmnist_file_brings_its_split(tmp_path: Path) -> None:
    arrays = {f"{n}_images": np.zeros((2, 4, 4), np.uint8) for n in ("train", "val", "test")}
    labels = {f"{n}_labels": np.array([[0], [1]]) for n in ("train", "val", "test")}
    np.savez(tmp_path / "m.npz", **arrays, **labels)
    data = {"name": "medmnist", "file": "m.npz"}
    found = label_table(configured(tmp_path, BINARY, data))
    assert [(case.part, case.target) for case in found.cases[2:4]] == [("validation", (0,)), ("validation", (1,))]
    assert found.cases[5].place == ("test_images", 1)
    with pytest.raises(ConfigError, match=r"data\.file: there is no file .*gone\.npz"):
        label_table(configured(tmp_path, BINARY, {"name": "medmnist", "file": "gone.npz"}))
    with pytest.raises(ConfigError, match=r"train_labels has 1 column\(s\).* expected 2"):
        label_table(configured(tmp_path, {**BINARY, "kind": "multi_label"}, data))


# ------------------------------------------------------------------------------------------------------------- splits


def patients(count: int, *, scans: int = 2, rare: int = 4) -> list[Case]:
    """Each of `count` patients has `scans` scans; every rare-th patient is of class 1."""
    return [
        Case(p * scans + s, f"{p}-{s}", f"p{p}", target=(int(p % rare == 0),))
        for p in range(count)
        for s in range(scans)
    ]


def folds(fold: int, *, drawn_by: int | None = None, **more: Any) -> FinetuneConfig:
    split = {"name": "folds", "folds": 4, "fold": fold, "validation": 0.25, "seed": drawn_by}
    return configured(Path(), BINARY, {"table": "t.csv"}, split=split, **more)


def test_each_patient_tests_once_and_stands_in_one_part_of_each_fold() -> None:
    cases, tested = patients(40), []
    for fold in range(4):
        parts = split_cases(cases, folds(fold))
        owners = [{case.patient for case in parts[part]} for part in ("train", "validation", "test")]
        assert sum(len(each) for each in owners) == len(set().union(*owners)) == 40
        assert [len(each) for each in owners] in ([22, 8, 10], [23, 7, 10])
        assert all(0.1 < np.mean([case.target[0] for case in parts[p]]) < 0.45 for p in parts)
        tested += sorted(owners[2])
    assert sorted(tested) == sorted({case.patient for case in cases})


def test_the_seed_alone_says_who_tests() -> None:
    cases = patients(40)
    first, again, other = (
        split_cases(list(order), folds(0, seed=seed))["test"]
        for order, seed in ((cases, 1), (cases[::-1], 1), (cases, 2))
    )
    assert {case.file for case in first} == {case.file for case in again}
    assert {case.file for case in first} != {case.file for case in other}


def test_several_seeds_may_train_on_the_patients_of_one_split() -> None:
    cases = patients(40)
    one, other = (split_cases(cases, folds(0, seed=seed, drawn_by=1)) for seed in (2, 3))
    assert one == other == split_cases(cases, folds(0, seed=1))
    assert one != split_cases(cases, folds(0, seed=2))


@pytest.mark.parametrize(("share", "count"), [(s / 100, 100) for s in range(1, 96, 3)] + [(0.3, 7), (0.07, 300)])
def test_as_many_patients_validate_as_the_share_says(share: float, count: int) -> None:
    """Rounded up; and of a class of a quarter of them as large a share, to one patient."""
    cases = [replace(case, part="train") for case in patients(count)]
    config = configured(Path(), MASKS, {"table": "t.csv"}, split={"name": "given", "validation": share})
    owners = {case.patient: case.target for case in split_cases(cases, config)["validation"]}
    whole = round(share * 100) * count
    assert len(owners) == -(-whole // 100)
    assert sum(target == (1,) for target in owners.values()) == pytest.approx(whole / 400, abs=1)


@pytest.mark.parametrize("every", [2, 3, 4, 5, 10])
def test_a_share_of_one_in_n_is_every_nth_patient_as_it_was_dealt_before(every: int) -> None:
    """So that results with these shares stay those of their seeds; a third is not written so, and rounds."""
    cases = [replace(case, part="train") for case in patients(90)]
    config = configured(Path(), BINARY, {"table": "t.csv"}, split={"name": "given", "validation": 1 / every})
    found = {case.patient for case in split_cases(cases, config)["validation"]}
    owners = {case.patient: case.target for case in cases}
    order = sorted(owners, key=lambda p: (owners[p] == (0,), hashlib.sha256(f"0/{p}".encode()).digest()))  # rare first
    assert found == set(order[::every])


def test_a_share_that_leaves_nobody_to_train_is_refused() -> None:
    cases = [replace(case, part="train") for case in patients(5, rare=2)]
    config = configured(Path(), BINARY, {"table": "t.csv"}, split={"name": "given", "validation": 0.9})
    with pytest.raises(ConfigError, match="split: nobody is left for train; give more patients, or other shares"):
        split_cases(cases, config)


def test_a_class_that_a_part_lacks_is_told_with_the_fold() -> None:
    with pytest.raises(ConfigError, match=r"split \(fold 3\): no 'yes' among the \d+ scans for test"):
        split_cases(patients(12, rare=6), folds(3))


def test_a_patient_in_two_given_parts_is_refused_without_a_name() -> None:
    cases = [Case(1, "a", "Miller", (0,), part="train"), Case(2, "b", "Miller", (1,), part="test")]
    cases += [
        Case(3 + i, f"c{i}", f"p{i}", (i % 2,), part=p) for i, p in enumerate(["train", "train", "validation"] * 4)
    ]
    config = configured(Path(), BINARY, {"table": "t.csv"}, split={"name": "given"})
    with pytest.raises(ConfigError, match=r"1 patient\(s\) stand in several parts, as in lines 1 and 2") as told:
        split_cases(cases, config)
    assert "Miller" not in str(told.value)
