"""A coordinator's folder and the folder of a site that has joined it, for tests."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from client import joining
from client.home import Home
from server import home as coordinator
from server.approval import approve
from server.founding import found


@dataclass(frozen=True)
class Joined:
    coordinator: coordinator.Home
    site: Home


def joined(folder: Path, *, address: str = "127.0.0.1:443", name: str = "alpha") -> Joined:
    """A site of `name` that has joined the coordinator at `address`; its data folder is empty."""
    coordinators = found(folder / "coordinator", address, now=datetime.now(UTC))
    begun = joining.begin(folder / name, name)
    approve(coordinators, name, begun.join_request, now=datetime.now(UTC))
    joining.join(begun.home, coordinators.welcome(name))
    (folder / name / "scans").mkdir()
    begun.home.site.write_text(yaml.safe_dump({"name": name, "data": [{"folder": "scans"}], "state": "state"}))
    (folder / name / "state").mkdir()
    return Joined(coordinators, begun.home)
