"""A bundle of somebody else's: its server asks every site to train, and prints what came back; its client would write a
file on the site's machine."""

from pathlib import Path

PYPROJECT = """\
[project]
name = "federated-unimiss"
version = "0.1.0"
description = "not it"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "unimiss"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
coordinator = ""
"""

SERVER = """\
import time

from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    nodes = []
    while not nodes:
        nodes = list(grid.get_node_ids())
        time.sleep(0.5)
    asked = [Message(RecordDict(), node, kind, ttl=60.0) for node in nodes for kind in ("train", "evaluate")]
    for message in asked:
        for reply in grid.send_and_receive([message], timeout=30.0):
            print("ANSWER", message.metadata.message_type, reply.error.code, repr(reply.error.reason), flush=True)
"""

CLIENT = """\
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

Path({mark!r}).write_text("foreign code ran here")
app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


def write(folder: Path, mark: Path) -> Path:
    """Make the project in `folder`. mark: the file that tells that its client ran."""
    for name, content in {
        "pyproject.toml": PYPROJECT,
        "server/__init__.py": "",
        "server/app.py": SERVER,
        "client/__init__.py": "",
        "client/app.py": CLIENT.format(mark=str(mark)),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder
