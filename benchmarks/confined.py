"""Leaves a program what deploy/ leaves it, as far as a kernel does that without systemd and Docker, and becomes it.

    unshare --mount python -m benchmarks.confined JSON        (by `command_of`, not by hand)

In a mount namespace of its own every file system is read-only but the service's folders; /tmp is empty and its own.
The program has no capability and can gain none, its environment is the service's, and it begins in /. Left out: which
system calls, addresses and devices it may use, and the other users' folders, of which one may hold this interpreter.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.deploy_files import Service

API = ("/dev", "/proc", "/sys")
"""The kernel's own file systems, which ProtectSystem=strict leaves as they are."""


def apart() -> Sequence[str]:
    """The command by which a program gets a mount namespace of its own; as root in one of users, where it is not."""
    users = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *users, "--mount", "--propagation", "private"]


def is_possible() -> bool:
    """Whether this machine lets this user do it."""
    if not all(map(shutil.which, ("unshare", "mount", "setpriv"))):
        return False
    return subprocess.run([*apart(), "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True).returncode == 0


def command_of(service: Service, shown: Path, more: Mapping[str, str] | None = None) -> Sequence[str]:
    """What starts the service; the process is the one that becomes it. shown: a folder that is there for the service
    though it may lie in /tmp. more: of the environment, for the measure's own ends."""
    said = asdict(service) | {"shown": shown, "environment": {**service.environment, **(more or {})}}
    return [*apart(), sys.executable, "-m", "benchmarks.confined", json.dumps(said, default=str)]


def main(said: str) -> None:
    facts = json.loads(said)
    _show_alone(facts["temporary"], Path(facts["shown"]))
    for folder in facts["writable"]:
        _mount("--bind", folder, folder)
    _make_read_only_but({*facts["temporary"], *facts["writable"]})
    os.umask(facts["umask"])
    os.chdir("/")
    rights = ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    os.execvpe("setpriv", ["setpriv", *rights, "--", *facts["command"]], facts["environment"])


def _show_alone(temporary: Mapping[str, str], shown: Path) -> None:
    """Empty folders in memory, and in them nothing but `shown`, where it lay there."""
    os.chdir(shown)  # by this it is still reached when something else lies over it
    for folder, options in temporary.items():
        _mount("-t", "tmpfs", "-o", options, "tmpfs", folder)
        if shown.is_relative_to(folder):
            shown.mkdir(parents=True)
            _mount("--no-canonicalize", "--rbind", ".", str(shown))


def _make_read_only_but(kept: Collection[str]) -> None:
    """Each file system that is mounted, with the options that it has."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        written, options = line.split()[4:6]
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), written)  # of a space, say: proc(5)
        if point not in kept and not point.startswith(API):
            _mount("-o", f"remount,bind,{options},ro", point)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
