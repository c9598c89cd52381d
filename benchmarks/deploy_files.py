"""How deploy/ starts a program: read from the units of systemd, and from compose.yaml with its Dockerfile.

A measure starts programs so, with folders of its own in the place of the files' (`Places`), and is bound to what
is shipped. What of it needs neither systemd nor Docker is put up by benchmarks/confined.py.
"""

import json
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SITE_UNIT, COORDINATOR_UNIT = "unimiss-site.service", "unimiss-server@.service"
GPU_UNIT = "unimiss-gpu.service"

Places = Mapping[str, Path]
"""A path that deploy/'s files name -> what a measure has in its place."""

PROGRAMS = "/opt/unimiss/bin/"
STATE_DIRECTORIES = Path("/var/lib")
"""Where systemd makes a system's StateDirectory."""
SYSTEMD = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "SHELL": "/usr/sbin/nologin"}
"""What a service's environment has without its unit: systemd.exec(5), 'Environment variables'. No locale, which only
some machines set."""
PYTHON_IMAGE = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
"""What the image has that the Dockerfile builds on."""
DOCKER_TMPFS = "noexec,nosuid,nodev"
"""How Docker mounts a tmpfs, whatever else is said of it."""
DOCKER_UMASK = 0o022


@dataclass(frozen=True)
class Service:
    """A program and what it is left. environment: all of it. writable: folders of the machine that it may write to.

    temporary: folders of its own, empty and in memory -> mount options. umask: of what it makes.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    writable: Sequence[Path]
    temporary: Mapping[str, str]
    umask: int


def directives(unit: str) -> dict[str, list[str]]:
    """What a unit says, by key; nothing for keys that it lacks."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in (DEPLOY / unit).read_text().splitlines():
        if match := re.match(r"([A-Za-z]+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


def of_unit(unit: str, places: Places, instance: str = "") -> Service:
    """A unit's service. instance: what stands behind the @ of its name.

    Raises ValueError: it leaves more than this measure knows of, or names a path that `places` lacks.
    """
    says = directives(unit)
    if says["ProtectSystem"] != ["strict"] or says["PrivateTmp"] != ["yes"]:
        raise ValueError(f"{unit}: leaves the program more than its state folder and a /tmp of its own")
    (command,), (user,) = says["ExecStart"], says["User"]
    folders = [str(STATE_DIRECTORIES / name) for line in says["StateDirectory"] for name in line.split()]
    folders += [path for line in says["ReadWritePaths"] for path in line.split()]
    own = dict(pair.split("=", 1) for line in says["Environment"] for pair in line.split())
    return Service(
        _command(command.replace("%i", instance).split(), places),
        {**SYSTEMD, "USER": user, "LOGNAME": user, **_environment(own | {"STATE_DIRECTORY": folders[0]}, places)},
        [placed(folder, places) for folder in folders],
        dict.fromkeys(("/tmp", "/var/tmp"), "mode=1777"),
        int(*says["UMask"], base=8),
    )


def of_container(service: str, places: Places) -> Service:
    """A service of compose.yaml. Raises ValueError, as above."""
    says = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]
    if says.get("read_only") is not True:
        raise ValueError(f"compose.yaml: {service}: the image itself may be written to")
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    memory = dict(mount.split(":", 1) for mount in says["tmpfs"])
    return Service(
        _command([*json.loads(entry), *says["command"]], places),
        {**PYTHON_IMAGE, **_environment(says["environment"], places)},
        [placed(volume["target"], places) for volume in says["volumes"] if not volume.get("read_only")],
        {
            **{folder: f"{options},{DOCKER_TMPFS}" for folder, options in memory.items()},
            "/dev/shm": f"mode=1777,size={says['shm_size'].removesuffix('b')},{DOCKER_TMPFS}",
        },
        DOCKER_UMASK,
    )


def placed(path: str, places: Places) -> Path:
    """A measure's own in the place of a path of deploy/'s. Raises ValueError: it has nothing there."""
    for known in sorted(places, key=len, reverse=True):
        if Path(path).is_relative_to(known):
            return places[known] / Path(path).relative_to(known)
    raise ValueError(f"deploy/ names {path}, and this measure has nothing in its place")


def _environment(own: Mapping[str, str], places: Places) -> dict[str, str]:
    return {name: str(placed(value, places)) if value.startswith("/") else value for name, value in own.items()}


def _command(words: Sequence[str], places: Places) -> Sequence[str]:
    """This copy's own program in the place of an installed one."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, _ = scripts[words[0].removeprefix(PROGRAMS)].partition(":")
    own = [str(placed(word, places)) if word.startswith("/") else word for word in words[1:]]
    return [sys.executable, "-m", module, *own]
