"""All that a site has against a study is told at once: to a person who asks before joining, and when it is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.site_command import main
from tests.federation import small_study
from tests.test_policy import asked
from tests.test_private_rounds import Hospital, private_study, quick_accountant  # noqa: F401
from unimiss_core.study import StudyConfig
from unimiss_core.wire import Refusal

pytestmark = pytest.mark.usefixtures("one_core")

PLAIN = small_study()


def checked(hospital: Hospital, study: StudyConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, screen and last message of `check --study`."""
    file = hospital.folder / "study.yaml"
    file.write_text(yaml.safe_dump(study.model_dump(mode="json")))
    code = main(["check", str(hospital.folder / "site.yaml"), "--study", str(file)])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_check_says_everything_for_which_a_study_would_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"studies": [], "most_steps": 1, "losses_may_leave": False}
    code, out, err = checked(Hospital(tmp_path, policy=policy, privacy={"max_epsilon": 8.0}), PLAIN, capsys)
    assert code == 2
    assert f"Study 'toy' ({PLAIN.digest()}) would be refused:" in out
    for why in (
        "- it is not in policy.studies",
        "- it asks for losses",
        "above policy.most_steps: 1",
        "- study 'toy' has the privacy mode none, which charges patients nothing",
    ):
        assert why in out
    assert "this study would be refused" in err


def test_check_says_where_a_study_would_be_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = checked(Hospital(tmp_path, policy={"studies": ["toy"]}), PLAIN, capsys)
    assert code == 0
    assert f"Study 'toy' ({PLAIN.digest()}) would be let in." in out


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"privacy": {"holds": None}}, "set privacy.holds"),
        ({"privacy": {"max_epsilon": 0.1, "delta": 1e-4}}, "above 0.1 that this site allows over all studies"),
        ({"data": [{"folder": "scans"}]}, "of 5 scans nothing says whose they are"),
    ],
)
def test_check_knows_what_a_private_study_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], why: str
) -> None:
    code, out, _ = checked(Hospital(tmp_path, **settings), private_study(), capsys)
    assert code == 2
    assert why in out[out.index("would be refused:") :]


def test_check_knows_which_groups_would_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hospital = Hospital(
        tmp_path, privacy={"holds": ["images", "volumes"]}, policy={"groups_may_leave": ["shared", "2d", "head"]}
    )
    study = private_study(schedule={"rounds": 2, "local_steps": 2, "alternate": [2, 2]})
    code, out, _ = checked(hospital, study, capsys)
    assert code == 2
    assert "updates of the parameter group 3d would leave" in out
    assert (
        checked(Hospital(tmp_path / "b", policy={"groups_may_leave": ["shared", "2d", "head"]}), PLAIN, capsys)[0] == 0
    )


def test_a_refused_request_is_told_all_of_it_too(tmp_path: Path) -> None:
    refused, said = asked(Hospital(tmp_path, policy={"studies": []}, privacy={"max_epsilon": 8.0}), PLAIN)
    assert refused == [Refusal("policy")] * 2
    assert "it is not in policy.studies" in said
    assert "set privacy.allow_unprotected: true" in said
