"""The house's rules of import, read from the source; the failure message is the rule."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("unimiss_core", "client", "server")

MAY_NOT_IMPORT = {
    "unimiss_core": {"client", "server", "pydicom", "nibabel", "PIL", "opacus", "flwr", "ray", "rich"},
    "client": {"server"},
    "server": {"client", "pydicom", "nibabel", "PIL", "opacus"},
}
EXEMPT = {
    "server/simulate.py": {"client"},  # simulation is the one place that may run a site
    "server/simulated_data.py": {"client"},
    "server/simulated_overlap.py": {"client"},
    "server/simulated_probe.py": {"client"},
    "server/simulated_setup.py": {"client"},
    "unimiss_core/wire.py": {"flwr"},  # the one place that knows Flower's records
    "unimiss_core/unfolding.py": {"flwr"},  # and the one that knows how they are cut
}
ONLY_IN = {
    "pydicom": {"client/dicom.py"},
    "gdcm": {"client/dicom.py"},
    "nibabel": {"client/nifti.py"},
    "PIL": {"client/pictures.py"},
    "cryptography": {"unimiss_core/keys.py", "unimiss_core/certificates.py", "unimiss_core/sealing.py"},
    "httpx": {
        "client/fleet.py",
        "client/reachability.py",
        "server/control.py",
        "server/exchange.py",
        "server/front.py",
        "server/front_conversation.py",
        "server/front_replies.py",
    },
    "h11": {"server/front_conversation.py"},
    "onnx": {"client/onnx_export.py"},
    "onnxruntime": {"client/onnx_export.py"},
    "opacus": {"client/accounting.py"},
    "highdicom": {"client/dicom_seg.py"},
    "monai": {"client/segmenting.py"},
    "numba": {"server/loops.py"},
    "pyarrow": {"client/feature_files.py"},
    "scipy": {"client/segmenting.py"},
    "sklearn": {"unimiss_core/probe.py"},
    "flwr": {
        "unimiss_core/unfolding.py",
        "unimiss_core/wire.py",
        "client/app.py",
        "client/fleet.py",
        "client/gate.py",
        "client/message_facts.py",
        "client/site.py",
        "server/app.py",
        "server/control.py",
        "server/front_answers.py",
        "server/front_given.py",
        "server/front_replies.py",
        "server/rounds.py",
        "server/exchange.py",
        "server/one_round.py",
        "server/registration.py",
        "server/requests.py",
        "server/roster.py",
        "server/local_grid.py",
        "server/simulate.py",
        "server/uploads.py",
    },
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported, at the top of the file or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param("client.gate, client.daemon", id="a site's daemon and gate"),
        pytest.param("server.run_command, server.display, server.control, server.superlink", id="unimiss-server run"),
        pytest.param("server.front", id="the front"),
        pytest.param("client.hold", id="letting a held site go on"),
    ],
)
def test_what_computes_nothing_does_not_load_torch(modules: str) -> None:
    """It takes 2 s of processor time and much memory; the first three stay for weeks. Asked of Python itself, which
    sees what stands in `try` and in others' packages."""
    asked = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", asked], check=True)


def violations(name: str, source: str) -> Iterator[str]:
    package = name.split("/")[0]
    for imported in sorted(set(imports(ast.parse(source)))):
        if imported in MAY_NOT_IMPORT[package] - EXEMPT.get(name, set()):
            yield f"{name}: {package} may not import {imported}"
        if imported in ONLY_IN and name not in ONLY_IN[imported]:
            yield f"{name}: {imported} is imported only in {', '.join(sorted(ONLY_IN[imported]))}"


def test_imports_point_inward() -> None:
    found = [v for path in sources() for v in violations(str(path.relative_to(ROOT)), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("unimiss_core/x.py", "import client.app"),
        ("server/rounds.py", "def f():\n    from client.site import Site"),
        ("client/x.py", "from server import rounds"),
        ("server/x.py", "import pydicom.uid"),
        ("client/x.py", "import nibabel as nib"),
        ("unimiss_core/model.py", "import flwr"),
    ],
)
def test_the_rule_sees_a_violation(name: str, source: str) -> None:
    assert list(violations(name, source))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), f"{path.name} has no docstring"
    assert len(source.splitlines()) <= 450, f"{path.name} cannot be read in one sitting; split it"
    assert path.stem not in {"utils", "helper", "helpers", "manager", "info", "data", "common", "misc"}


def test_json_is_read_in_one_place_which_knows_all_that_can_be_wrong_with_it() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if "json.load" in path.read_text()}
    assert found == {"unimiss_core/json_text.py"}, "use unimiss_core.json_text: json.loads raises more than ValueError"


def test_preparing_a_simulation_does_not_import_the_client_app() -> None:
    """Flower's engine imports it in another thread at that time, and would find it half-imported."""
    code = "import sys, server.simulate; sys.exit('client.app' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
