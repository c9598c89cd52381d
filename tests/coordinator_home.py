"""A coordinator's folder with approved sites, as tests need it."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import yaml

from server.approval import approve
from server.founding import found, make_server_certificate
from server.home import Home
from unimiss_core import certificates, keys
from unimiss_core.joining import read_welcome


def found_home(path: Path, *, port: int = 9443, superlink_port: int = 8000, **coordinator: object) -> Home:
    """coordinator: the settings of coordinator.yaml."""
    home = found(path, f"localhost:{port}", now=datetime.now(UTC))
    server = {"address": f"localhost:{port}", "listen": "127.0.0.1", "superlink_port": superlink_port}
    home.server.write_text(yaml.safe_dump(server))
    home.coordinator.write_text(yaml.safe_dump(coordinator))
    return home


def approved_site(home: Home, name: str) -> tuple[Path, Path]:
    """Its private key and its certificate, beside the coordinator's folder."""
    key = keys.new_site_key()
    folder = home.path.parent / name
    folder.mkdir()
    (folder / "site.pub").write_text(keys.public_line(key.public_key()) + "\n")
    keys.write_private(folder / "site.key", keys.in_pem_form(key))
    paper, _ = read_welcome(approve(home, name, folder / "site.pub", now=datetime.now(UTC)).welcome)
    (folder / "site.crt").write_text(paper.certificate)
    return folder / "site.key", folder / "site.crt"


def home_of_alpha(path: Path) -> Home:
    """A coordinator's folder with one approved site, which is enough."""
    home = found_home(path, min_sites=1)
    approved_site(home, "alpha")
    return home


def server_certificate_ends(home: Home, at: datetime) -> None:
    """Give the folder another certificate of the server, as one that was made long ago would be."""
    authority = certificates.Authority(
        certificates.read_certificate(home.authority_certificate), keys.read_site_key(home.authority_key)
    )
    make_server_certificate(home, authority, "localhost", at - certificates.LEAF_LASTS)


def write_study(path: Path, **changes: object) -> Path:
    study: Mapping[str, object] = {
        "name": "toy",
        "model": {"prototypes": 16},
        "views": {"image_size": [33, 40], "volume_size": [13, 33, 36]},
        "schedule": {"rounds": 2, "local_steps": 2},
        "optimiser": {"warmup_steps": 1},
    } | changes
    path.write_text(yaml.safe_dump(dict(study)))
    return path
