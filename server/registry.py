"""The sites that a coordinator has approved, one file for each in its folder."""

from typing import Literal

from server.coordinator_config import RegisteredSite


class ApprovedSite(RegisteredSite):
    """A site as `unimiss-server approve` wrote it down; after `revoke` the file stays, so that a name is not given
    twice."""

    status: Literal["approved", "revoked"] = "approved"
