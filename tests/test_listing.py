"""Which files of a folder count: by pattern, by table, and what of either is told as a likely mistake."""

from pathlib import Path

import numpy as np
import pytest

from client.catalogue import state_of
from client.listing import files_of, oddities
from client.path_patterns import whether_of
from client.pictures import write_png
from client.site_command import main
from client.site_config import DataSource, SiteConfig, TableConfig
from unimiss_core.config import dump_yaml, parse
from unimiss_core.errors import ConfigError

BIDS = (
    "README",
    "derivatives/fs/sub-01/ses-1/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.json",
    "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
    "sub-01/ses-1/func/sub-01_ses-1_bold.nii.gz",
)


def folder(tmp_path: Path, *files: str) -> Path:
    for file in files:
        (tmp_path / "d" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / file).write_text(file)
    return tmp_path / "d"


def taken(tmp_path: Path, **settings: object) -> list[str]:
    raw = {"folder": str(folder(tmp_path, *BIDS)), **settings}
    return list(files_of(parse(DataSource, raw, where="test")))


@pytest.mark.parametrize(
    ("pattern", "path", "is_of"),
    [
        ("sub-*/**/anat/*_T1w.nii.gz", "sub-01/anat/a_T1w.nii.gz", True),
        ("sub-*/**/anat/*_T1w.nii.gz", "sub-01/ses-1/run-2/anat/a_T1w.nii.gz", True),
        ("sub-*/**/anat/*_T1w.nii.gz", "x/sub-01/anat/a_T1w.nii.gz", False),
        ("sub-*/**/anat/*_T1w.nii.gz", "sub-01/anat/b/a_T1w.nii.gz", False),
        ("**/*.png", "a.png", True),
        ("**/*.png", "a/b/c.png", True),
        ("*.png", "a/c.png", False),
        ("a/**", "a/b/c", True),
        ("a/**", "a", False),
        ("a/**/**/c", "a/c", True),
        ("**", "a/b", True),
        ("a?.[pj]ng", "ab.jng", True),
        ("a[!b-c]", "ab", False),
        ("a[!b-c]", "ad", True),
        ("a[!b]c", "a/c", False),
        ("[[]1]", "[1]", True),
        ("a+(b).png", "a+(b).png", True),
        ("A.png", "a.png", False),
        ("a*", "a\nb", True),
    ],
)
def test_a_pattern_is_of_whole_paths_below_the_folder(pattern: str, path: str, is_of: bool) -> None:
    assert bool(whether_of(pattern)(path)) == is_of


def test_a_bids_folders_scans_are_told_from_all_else_in_it(tmp_path: Path) -> None:
    scans = [BIDS[2], BIDS[4]]
    assert taken(tmp_path, include=["sub-*/**/anat/*_T1w.nii.gz"]) == scans
    assert taken(tmp_path, include=["**/*_T1w.nii.gz"], exclude=["derivatives/**"]) == scans
    assert taken(tmp_path, exclude=["derivatives/**", "**/*.json", "README", "**/func/*"]) == scans
    assert sorted(taken(tmp_path, include=[], exclude=[])) == sorted(BIDS)


def test_patterns_count_for_what_a_table_lists_and_for_the_files_of_a_series_folder(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file\nsub-01/ses-1\nREADME\ngone_T1w.nii.gz\n")
    table = {"path": str(tmp_path / "t.csv")}
    found = taken(tmp_path, table=table, include=["**/*_T1w.nii.gz"], exclude=["gone*"])
    assert found == ["sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"]


def test_a_folder_that_cannot_be_looked_into_stays_in_the_account_unless_it_is_excluded(tmp_path: Path) -> None:
    (folder(tmp_path, *BIDS) / "linked").symlink_to(tmp_path)
    assert "linked" in taken(tmp_path, include=["sub-*/**"])
    assert "linked" not in taken(tmp_path, include=["sub-*/**"], exclude=["link*"])


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("/data/**", "'/data/\\*\\*' leaves the folder"),
        ("../x", "leaves the folder"),
        ("derivatives/", "'derivatives/' names a folder; write 'derivatives/\\*\\*' for all below it"),
        ("a//b", "a part without a name"),
        ("", "a part without a name"),
        ("./a", "a part without a name"),
        ("a\\b", "a backslash"),
        ("sub-**/a", "'\\*\\*' stands for whole folders"),
        ("a[b", "a '\\[' is not closed"),
        ("a[]", "a '\\[' is not closed"),
        ("a[c-b]", "no characters in their order"),
    ],
)
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_no_path_can_be_of_is_refused_with_the_file(key: str, pattern: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{key}\.0': .*{told}"):
        parse(DataSource, {"folder": "d", key: [pattern]}, where="site.yaml")


def test_a_source_without_patterns_is_told_by_what_it_always_was(tmp_path: Path) -> None:
    """What was read of its folders stays read."""
    bare = DataSource(folder=folder(tmp_path, "a"))
    assert bare.model_dump_json() == (
        f'{{"folder":"{bare.folder}","table":null,"patient_pattern":null,"file_is_patient":false,"modality":null,'
        '"patient_range":[0.0,1.0]}'
    )
    chosen = bare.model_copy(update={"exclude": ("b",)})
    assert state_of([bare], b"") != state_of([chosen], b"")
    site = SiteConfig(name="north", data=(bare, chosen), state=tmp_path)
    assert "include" not in dump_yaml(site)
    assert dump_yaml(site).count("exclude") == 1


def test_check_tells_of_a_pattern_that_matches_nothing_and_counts_remarks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    for number in range(2):
        picture = np.random.default_rng(number).integers(0, 255, (21, 17)).astype(np.uint8)
        write_png(tmp_path / "d" / f"{number}.png", picture)
    source = DataSource(folder=tmp_path / "d", include=("*.png", "d/*.png"), exclude=("old/**",))
    (tmp_path / "site.yaml").write_text(dump_yaml(SiteConfig(name="north", data=(source,), state=tmp_path / "state")))
    main(["check", str(tmp_path / "site.yaml")])
    said = " ".join(capsys.readouterr().out.split())
    assert "'data.0': no file is of the pattern 'd/*.png', which counts from the source's folder" in said
    assert "no file is of the pattern 'old/**'" in said
    assert "pattern '*.png'" not in said
    assert "2 does not say how large its pixels are spacing_unknown" in said
    assert "2 nothing says whose it is: it counts as a patient of its own patient_assumed" in said


def test_a_table_whose_paths_begin_with_the_folders_own_name_is_told_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = folder(tmp_path, "train/JANE.png")
    (tmp_path / "t.csv").write_text("file\nd/train/JANE.png\nd/train/JOHN.png\n")
    source = DataSource(folder=scans, table=TableConfig(path=tmp_path / "t.csv"))
    (tmp_path / "site.yaml").write_text(dump_yaml(SiteConfig(name="north", data=(source,), state=tmp_path / "state")))
    assert main(["check", str(tmp_path / "site.yaml")]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "2 - a table lists it, and there is no such file missing_file" in said
    assert "'data.0': of 2 of the 2 paths in column 'file' there is no file; they begin with 'd', the folder's" in said
    assert "JANE" not in said


@pytest.mark.parametrize(("present", "told"), [(1, True), (2, False)])
def test_paths_of_a_table_are_odd_where_most_are_of_nothing(tmp_path: Path, present: int, told: bool) -> None:
    scans = folder(tmp_path, *[f"{number}.png" for number in range(present)])
    (tmp_path / "t.csv").write_text("Path\n0.png\n1.png\n2.png\ngone\n")
    source = DataSource(folder=scans, table=TableConfig(path=tmp_path / "t.csv", file="Path"))
    assert [words.partition(";")[0] for words in oddities([source])] == [
        "'data.0': of 3 of the 4 paths in column 'Path' there is no file"
    ] * told


def test_patterns_without_a_mistake_are_nothing_odd(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file\nREADME\n")
    table = TableConfig(path=tmp_path / "t.csv")
    assert list(oddities([DataSource(folder=folder(tmp_path, *BIDS), table=table, include=("R*",))])) == []
