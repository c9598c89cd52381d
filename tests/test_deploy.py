"""The units and the compose file say what docs/site.md promises: nothing inbound, one place to write to, no rights."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.deploy_files import COORDINATOR_UNIT, DEPLOY, GPU_UNIT, SITE_UNIT, directives

UNITS = (SITE_UNIT, COORDINATOR_UNIT)
SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze")


def test_a_site_writes_to_its_state_alone_and_hears_from_nobody() -> None:
    unit = directives(SITE_UNIT)
    assert unit["ProtectSystem"] == ["strict"]
    assert unit["StateDirectory"] == ["unimiss-site"]
    assert "ReadWritePaths" not in unit
    assert unit["BindReadOnlyPaths"] == ["/archive"]
    assert unit["IPAddressDeny"] == ["any"]
    assert "any" not in unit["IPAddressAllow"]
    assert unit["SocketBindDeny"] == ["any"]
    assert unit["CapabilityBoundingSet"] == [""]


@pytest.mark.parametrize("unit", UNITS)
def test_a_process_gains_no_rights(unit: str) -> None:
    found = directives(unit)
    assert found["User"] == ["unimiss"]
    assert found["ProtectSystem"] == ["strict"]
    for directive in (
        "NoNewPrivileges",
        "PrivateTmp",
        "RestrictSUIDSGID",
        "ProtectKernelModules",
        "RestrictNamespaces",
    ):
        assert found[directive] == ["yes"], directive


def test_a_site_begins_when_its_archive_is_mounted_and_outlives_its_loss(tmp_path: Path) -> None:
    """systemd.unit(5): what is required is not started again by Restart= when it failed, or went and came back. So the
    service asks for itself, and fails, upon which Restart= counts."""
    unit = directives(SITE_UNIT)
    assert "remote-fs.target" in unit["After"][0].split()
    assert not {"Requires", "RequiresMountsFor", "BindsTo"} & unit.keys()
    (before,) = unit["ExecStartPre"]
    command = [word.replace("/archive", str(tmp_path)) for word in shlex.split(before)]
    empty = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (empty.returncode, empty.stdout) == (1, f"{tmp_path} is empty: is it mounted?\n")
    (tmp_path / "scan").touch()
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_a_gpus_modules_are_loaded_before_a_sites_devices_are_looked_up() -> None:
    """systemd resolves `char-...` when a unit is started, before its ExecStartPre=; and no process of the site's may
    load a module, nor gain the rights to."""
    site, gpu = directives(SITE_UNIT), directives(GPU_UNIT)
    assert "char-nvidia-uvm rw" in site["DeviceAllow"]
    assert gpu["Before"] == gpu["WantedBy"] == [SITE_UNIT]
    assert gpu["Type"] == ["oneshot"]  # what comes after it waits for its end
    assert gpu["ExecStart"] == [
        "/usr/bin/nvidia-modprobe -c=0",
        "/usr/bin/nvidia-modprobe -u -c=0",
    ]  # two kinds of file
    assert "RemainAfterExit" not in gpu  # or it would not run before the site's next start
    assert gpu["ConditionPathExists"] == ["/usr/bin/nvidia-modprobe"]
    assert "nvidia" not in "".join(site.get("ExecStartPre", []))


def test_a_site_is_started_again_however_it_ended() -> None:
    """A SuperNode whose coordinator forgot it ends with code 0."""
    assert directives(SITE_UNIT)["Restart"] == ["always"]
    assert directives(SITE_UNIT)["StartLimitIntervalSec"] == ["0"]


@SYSTEMD
@pytest.mark.parametrize("unit", [*UNITS, GPU_UNIT])
def test_systemd_reads_the_units(unit: str, tmp_path: Path) -> None:
    copy = tmp_path / unit.replace("@", "@ward")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy.write_text(re.sub(r"/opt/unimiss/bin/\S+|/usr/bin/nvidia-modprobe", str(program), (DEPLOY / unit).read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "unimiss" in line]
    assert not ours


@SYSTEMD
def test_systemd_finds_little_exposed(tmp_path: Path) -> None:
    """Its own measure, of 0 (nothing) to 10 (all); from 2.5 on this fails."""
    shutil.copy(DEPLOY / SITE_UNIT, tmp_path)
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--threshold=25",
        str(tmp_path / SITE_UNIT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot look at a unit that is not installed")
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_container_has_no_port_no_rights_and_one_place_to_write_to() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"site", "check"}
    for service in services.values():
        assert not {"ports", "expose", "privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["user"].split(":")[0] not in ("0", "root")
        assert "no-new-privileges:true" in service["security_opt"]
        writable = [volume["target"] for volume in service["volumes"] if not volume.get("read_only")]
        assert writable == ["/state"]
    assert services["site"]["restart"] == "always"
