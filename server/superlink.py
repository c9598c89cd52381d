"""How a coordinator's processes are started: Flower's SuperLink and SuperExec, and the front.

SuperLink listens on 127.0.0.1 alone; SuperExec starts the ServerApp of each run, and proves to SuperLink by a shared
secret that it may (`--isolation process`): otherwise whoever opens the port could take a run's place. The front is what
the world sees. Nothing calls home, and no package is installed at run time.
"""

import os
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from server.children import Children, Recipe
from server.home import VARIABLE, Home
from server.server_config import ServerConfig
from unimiss_core import bundle, durable
from unimiss_core.errors import ConfigError

LOOPBACK = "127.0.0.1"
SUPERLINK = "superlink"
"""What it is called among the processes."""
SHRINK_BYTES = 1e8
"""A database below this is left as it is."""

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONSAFEPATH": "1",  # no code is taken from where a process happens to be started
    "PYTHONUNBUFFERED": "1",
}
"""For every process that imports Flower: it asks its makers for newer versions, tells them of its use, and installs
packages, unless told not to."""


def environment(home: Home) -> dict[str, str]:
    """Of all children. PATH: Flower starts its own commands by name."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, **QUIET, "FLWR_HOME": str(home.flower), VARIABLE: str(home.path), "PATH": path}


def family(home: Home, config: ServerConfig, knows_sites: Callable[[], bool] = lambda: True) -> Children:
    """The coordinator's processes, in the order in which they are started. knows_sites: whether SuperLink lets in those
    that are approved; it may be told in being asked. Before that the front does not open."""
    return Children(
        [
            Recipe(SUPERLINK, _superlink(home, config), lambda: listens(config.superlink_port) and knows_sites()),
            Recipe("superexec", _superexec(home, config)),
            Recipe("front", _front(home), home.front_status.exists),
        ],
        folder=home.flower,
        workplace=home.workplace,
        environment=environment(home),
        log_bytes=round(config.log_mb * 1e6),
    )


def prepare(home: Home, config: ServerConfig) -> None:
    """Make ready what the processes find on the disk. Raises ConfigError: a port is taken, the folder is not ours."""
    for host, port, key in (
        (LOOPBACK, config.superlink_port, "superlink_port"),
        (config.host, config.port, "address"),
    ):
        _require_free(home, host, port, key)
    try:
        home.workplace.mkdir(exist_ok=True)
        if any(home.workplace.iterdir()):
            raise ConfigError(f"{home.workplace}: must be empty, SuperLink would run what lies there; empty it")
        home.front_status.unlink(missing_ok=True)  # that it is written again says that the front has begun
        # Code that Flower unpacked, and answers to runs that are over. What a site was given it may still ask for.
        for left in (home.flower / "apps", *home.passage.glob("*/answer")):
            shutil.rmtree(left, ignore_errors=True)
        bundle.write(home.bundle)
        durable.write_text(home.flower / "config.toml", connection(home, config))
        shrink(home.database)
    except OSError as error:
        raise ConfigError(f"{home.flower}: cannot be written to ({error.strerror})") from None


def connection(home: Home, config: ServerConfig) -> str:
    """Flower's own configuration file: by it `flwr` commands find this SuperLink, as `unimiss`."""
    return (
        '[superlink]\ndefault = "unimiss"\n\n[superlink.unimiss]\n'
        f'address = "{LOOPBACK}:{config.superlink_port}"\nroot-certificates = "{home.authority_certificate}"\n'
    )


def shrink(database: Path) -> None:
    """Give back the room of updates that have long been delivered: SQLite keeps it. SuperLink must not be at work."""
    if not database.exists() or database.stat().st_size < SHRINK_BYTES:
        return
    link = sqlite3.connect(database)
    try:
        link.execute("VACUUM")
    except sqlite3.Error:  # no room for the copy that this takes: then it stays large
        pass
    finally:
        link.close()


def listens(port: int) -> bool:
    """Whether something takes connections there, on loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _require_free(home: Home, host: str, port: int, key: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{home.server}: '{key}': {host} port {port} cannot be opened ({error.strerror}); end what holds it, "
                "or choose another"
            ) from None


def _tethered(*command: str) -> Sequence[str]:
    return (sys.executable, "-m", "unimiss_core.tether", *command)


def _superlink(home: Home, config: ServerConfig) -> Sequence[str]:
    return _tethered(
        *("flower-superlink", "--host", LOOPBACK, "--port", str(config.superlink_port)),
        *("--ssl-ca-certfile", str(home.authority_certificate)),
        *("--ssl-certfile", str(home.server_certificate), "--ssl-keyfile", str(home.server_key)),
        *("--enable-supernode-auth", "--database", str(home.database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home.superexec_secret)),
        "--disable-runtime-dependency-installation",
    )


def _superexec(home: Home, config: ServerConfig) -> Sequence[str]:
    return _tethered(
        *("flower-superexec", "--runtime-api-address", f"{LOOPBACK}:{config.superlink_port}"),
        *("--root-certificates", str(home.authority_certificate)),
        *("--superexec-auth-secret-file", str(home.superexec_secret)),
    )


def _front(home: Home) -> Sequence[str]:
    return (sys.executable, "-m", "server.front", "--home", str(home.path))
