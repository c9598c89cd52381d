"""What a coordinator asks of its own SuperLink, on loopback: nodes and runs.

The calls are those of the `flwr` commands (`flwr run`, `ls`, `stop`, `supernode register`) without a process that
imports Flower for seconds at each. Flower's client for them is no public interface: the version is pinned, and
tests/test_superlink.py holds it to what is used here.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from unimiss_core import bundle
from unimiss_core.errors import UnimissError

GONE = "unregistered"
"""Status of a node that SuperLink only remembers."""


class ControlError(UnimissError):
    """SuperLink does not answer, or says no."""

    resumes = True


@dataclass(frozen=True)
class RunState:
    """As Flower tells it. how: completed, failed or stopped, once it is finished."""

    is_finished: bool
    how: str
    details: str


class Control:
    """A client of SuperLink's Control API. All methods raise ControlError."""

    def __init__(self, port: int, authority: Path) -> None:
        """authority: the certificate that signed SuperLink's, PEM."""
        self._silent_since: float | None = None
        self._client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def submit(self, run_config: Mapping[str, str | bool]) -> int:
        """Start a run of the installed package's own code; its id."""
        fab = Fab(bundle.fab_hash(), bundle.fab(), {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config)))
        with self._told("the run was not taken"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise ControlError("SuperLink did not take the run; flower/superlink.log says why")
        return int(answer.run_id)

    def state(self, run: int) -> RunState | None:
        """None where SuperLink knows no such run: it has lost its database."""
        with self._told("runs are not told"):
            runs = self._client.ListRuns(ListRunsRequest()).run_dict
        if run not in runs:
            return None
        status = runs[run].status
        return RunState(status.status == "finished", status.sub_status, status.details)

    def stop_all(self) -> None:
        """End every run that is not finished."""
        with self._told("runs are not stopped"):
            for run, told in self._client.ListRuns(ListRunsRequest()).run_dict.items():
                if told.status.status != "finished":
                    self._client.StopRun(StopRunRequest(run_id=run))

    def agree_on_nodes(self, approved: Mapping[bytes, str]) -> None:
        """Let SuperLink know the approved sites and no others. approved: public key (PEM) -> name."""
        known = self.nodes()
        with self._told("sites are not registered"):
            for key in known.keys() - approved.keys():
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=known[key]))
            for key in approved.keys() - known.keys():
                self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=approved[key]))

    def nodes(self) -> dict[bytes, int]:
        """Public key (PEM) -> the node's id, of those that SuperLink lets in."""
        with self._told("sites are not told"):
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.node_id for node in nodes if node.status != GONE}

    def silent_s(self) -> float:
        """How long SuperLink has answered nothing, though it was asked; 0 where it answered last."""
        return 0.0 if self._silent_since is None else time.monotonic() - self._silent_since

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            self._silent_since = None
            raise ControlError(f"{what}: SuperLink says {error.response.status_code}; its log says why") from None
        except (httpx.HTTPError, OSError) as error:
            if self._silent_since is None:
                self._silent_since = time.monotonic()
            raise ControlError(f"{what}: SuperLink does not answer ({type(error).__name__})") from None
        self._silent_since = None
