"""What the programs of several commands say of themselves."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from client import research_command, site_command
from server import server_command, simulate_command
from server.simulate import SimulationConfig
from unimiss_core.commands import OF_EVERY_COMMAND, Command, Program
from unimiss_core.config import parse
from unimiss_core.errors import AuditError, RoundError

ROOT = Path(__file__).parents[1]
MAINS = {"unimiss-site": site_command.main, "unimiss-server": server_command.main}
COMMANDS = [
    *(("unimiss-site", command) for command in site_command.COMMANDS),
    *(("unimiss-server", command) for command in server_command.COMMANDS),
]


@pytest.mark.parametrize(("program", "command"), COMMANDS)
def test_each_commands_help_says_what_it_does_and_lists_its_exit_codes_as_the_documentation_does(
    program: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        MAINS[program]([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    table = site_command.COMMANDS if program == "unimiss-site" else server_command.COMMANDS
    assert table[command].does in said
    (told,) = re.findall(r"Exit codes: (.*)\.", said)
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs" / "artefacts.md").read_text(), re.MULTILINE)
    documented = [code for code, whose in rows if whose == "every command" or f"`{program} {command}`" in whose]
    assert [part.split(" ", 1)[0] for part in told.split(", ")] == documented


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (AuditError("line 3 is damaged"), 8, "x: line 3 is damaged\n"),
        (RoundError("too few"), 5, "x: too few\nThe same command goes on from there.\n"),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
        (
            PermissionError(13, "Permission denied", "/secret/of/a/patient"),
            2,
            "x: what it needs is not this user's (Permission denied); type the command as the user whom the program "
            "runs as, which owns its folders\n",
        ),
        (
            IsADirectoryError(21, "Is a directory", "/secret/of/a/patient"),
            1,
            "x: the system refuses what was asked of it (Is a directory); mend its disk, or the folder or file that is "
            "not as it should be, and type the command again\n",
        ),
        (MemoryError(), 2, "x: the memory of this machine ran out; free it of other work\n"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "x: the memory of the GPU ran out; free it of other work\n"),
    ],
)
def test_an_error_is_one_message_and_its_exit_code(
    raised: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(_options: object) -> None:
        if raised is not None:
            raised.resumes = isinstance(raised, RoundError)  # type: ignore[attr-defined]
            raise raised

    program = Program("x", "", {"do": Command("do it", lambda parser: parser.set_defaults(act=act))})
    assert program.run(["do"]) == code
    assert capsys.readouterr().err == said


def test_another_mistake_of_ours_stays_one() -> None:
    def act(_options: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    program = Program("x", "", {"do": Command("do it", lambda parser: parser.set_defaults(act=act))})
    with pytest.raises(RuntimeError, match="illegal"):
        program.run(["do"])


def test_what_every_command_may_end_with_has_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server_command.main(["no such command"])
    assert ended.value.code in OF_EVERY_COMMAND
    assert "invalid choice" in capsys.readouterr().err


def test_what_a_simulation_may_end_with_is_what_its_help_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulate_command.main(["--help"])
    (told,) = re.findall(r"Exit codes: (.*)\.", " ".join(capsys.readouterr().out.split()))
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", (ROOT / "docs" / "artefacts.md").read_text(), re.MULTILINE)
    documented = [code for code, whose in rows if whose == "every command" or "`unimiss-simulate`" in whose]
    assert re.findall(r"(?:^|, )(\d+) ", told) == documented


RESEARCH = "import|embed|verify|export|finetune|predict|probe|plan-privacy|audit-privacy"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_a_command_with_arguments_that_a_page_names_is_one(page: Path) -> None:
    """Brackets stand about what may be left out, and a kind of export is called FORM, or one of several."""
    for told in re.findall(rf"`unimiss ((?:{RESEARCH}) [^`]*)`", page.read_text(encoding="utf-8")):
        if re.search(r" --\S+$", told):  # names the option, and no value
            continue
        typed = re.sub(r"--to \S+", "--to onnx", told.replace("[", "").replace("]", ""))
        research_command._parser().parse_args(shlex.split(typed))


def test_nothing_tells_to_install_a_name_that_is_on_no_index() -> None:
    """Whoever took the name there would be given to everybody who types it."""
    told = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    told += [path for package in ("unimiss_core", "client", "server") for path in (ROOT / package).glob("*.py")]
    wrong = [
        path.name
        for path in told
        if re.search(r"install[^\n]*\s['\"]?federated-unimiss|federated-unimiss\[", path.read_text())
    ]
    assert not wrong


def test_the_readme_says_what_each_extra_is_for() -> None:
    section = (ROOT / "README.md").read_text().partition("## Install\n")[2].partition("\n## ")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(project["optional-dependencies"])
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in section


def test_make_help_lists_how_to_install() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^make (\S+) ", told, re.MULTILINE)
    assert targets == ["demo", "test", "install", "help"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_the_example_of_several_gpus_is_a_simulation() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    (example,) = re.findall(r"```\n(workers: .*?)```", page, re.DOTALL)
    found = parse(SimulationConfig, {"study": "study.yaml", **yaml.safe_load(example)}, where="docs/training.md")
    assert found.workers == len(found.sites) == len({site.devices for site in found.sites}) == 2
