"""A process that ends with the one that started it, however that ends: killed, crashed, or by itself.

    python -m server.tethered COMMAND ARGUMENTS...

runs a command of this installation in this process. Standard input is the tether: a pipe whose other end the starter
holds and writes nothing to. When the starter is gone the system closes it; then this process and all of its group end.
Linux has a call for it (PR_SET_PDEATHSIG), which hangs on the thread that started the process; a pipe hangs on nothing.
"""

import os
import signal
import sys
import threading
import time
from importlib.metadata import entry_points

PATIENCE_S = 10.0
"""Between asking the group to end and ending it."""


def watch() -> None:
    """From here on, end when the tether is cut, with all of this process' group, which it leads from here on."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    threading.Thread(target=_wait, name="tether", daemon=True).start()


def _wait() -> None:
    while os.read(sys.stdin.fileno(), 1 << 10):
        pass
    os.killpg(os.getpgrp(), signal.SIGTERM)
    time.sleep(PATIENCE_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    command = sys.argv[1]
    (script,) = entry_points(group="console_scripts", name=command)
    watch()
    sys.argv = sys.argv[1:]
    sys.exit(script.load()())


if __name__ == "__main__":
    main()
