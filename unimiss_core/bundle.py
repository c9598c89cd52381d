"""The bundle that a coordinator submits and a site lets run: the code of the installed package itself.

Flower hands a run's code to sites as a Flower App Bundle, a zip whose SHA-256 names it. A site runs only the bundle
that its own installation makes: then what runs there is what its operator installed, and both ends have the same
version. The bytes follow from the code alone, not from machine, folder, time or system.
"""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from unimiss_core import durable

VERSION = "0.1.0"
"""Of the package, as in pyproject.toml: written here because an installation's own records of it may be stale."""

RUN_CONFIG: Mapping[str, str | bool] = {"coordinator": "", "resume": False}
"""What a run's submission may set, and what stands there otherwise. No site reads it: `server.app` does."""

_PACKAGES = ("client", "server", "unimiss_core")
_PROJECT = f"""\
[project]
name = "federated-unimiss"
version = "{VERSION}"
description = "Hospitals pretrain one encoder for 2D and 3D images together; no image leaves a hospital."
license = "Apache-2.0"
dependencies = [
    "flwr==1.41.0",
]

[tool.flwr.app]
publisher = "unimiss"
fab-include = [
    "client/**/*.py",
    "server/**/*.py",
    "unimiss_core/**/*.py",
]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
coordinator = ""
resume = false
"""
"""As Flower writes it into the bundle: reading and writing it again changes no byte."""
_DATE = (2024, 10, 1, 0, 0, 0)
"""The date that Flower gives to every file in a bundle."""
_UNIX = 3
"""The system that a zip says it was made on: always this, for its bytes must not depend on it."""


def write(folder: Path) -> Path:
    """Make `folder` (replacing an older one) the project that `flwr run` takes, and `flwr build` turns into `fab()`.

    Raises OSError.
    """
    with durable.new_folder(folder) as partial:
        for name, content in {"pyproject.toml": _PROJECT.encode(), **_code()}.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
    return folder


def fab() -> bytes:
    """The bundle, as Flower makes it of the folder that `write` makes. Raises OSError."""
    files = {"pyproject.toml": _PROJECT.encode(), **_code()}
    contents = "\n".join(f"{name},{hashlib.sha256(file).hexdigest()},{8 * len(file)}" for name, file in files.items())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, file in {**files, ".info/CONTENT": contents.encode()}.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system = _UNIX
            archive.writestr(entry, file)
    return packed.getvalue()


def fab_hash() -> str:
    """SHA-256 of `fab()` in hex: Flower's name for it, `Run.fab_hash`. Raises OSError."""
    return hashlib.sha256(fab()).hexdigest()


def _code() -> dict[str, bytes]:
    """Path within the bundle -> content, in the order of paths: every module of the installed packages."""
    root = Path(__file__).resolve().parents[1]
    modules = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    return {name: (root / name).read_bytes() for name in sorted(path.relative_to(root).as_posix() for path in modules)}
