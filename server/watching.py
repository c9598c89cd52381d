"""A run of another process, shown as a simulation is: what the ServerApp says of it is said again."""

import time

from server.run_folder import RunFolder
from server.said import Said
from unimiss_core import progress


class Watching:
    """Tells `unimiss_core.progress` what a ServerApp says from now on of the run in this folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._said = Said(folder.path)

    def look(self) -> None:
        """Tell what is new; to be called now and then."""
        for event in self._said.new(time.time()):
            progress.report(event)
