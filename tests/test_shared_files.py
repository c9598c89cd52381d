import pytest

from tests.shared_files import DATA, needs

ABSENT = DATA / "no_such_folder"


def test_an_absent_folder_skips_its_tests_but_is_a_mistake_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    assert needs(ABSENT).args == (True,)
    monkeypatch.setenv("CI", "1")
    with pytest.raises(FileNotFoundError, match=r"no shared/data/no_such_folder beside the project"):
        needs(ABSENT)
