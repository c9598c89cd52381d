"""Files that lie beside the project at its workplace: where they are absent, tests that need them are skipped.

Not so where the variable CI is set: there a folder that is missing is a mistake, and a test that never ran no success.
"""

import os
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
DATA = Path(__file__).parents[2] / "shared" / "data"


def needs(folder: Path) -> pytest.MarkDecorator:
    """Skip the test where `folder` is absent. Raises FileNotFoundError, at import, where it is absent under CI."""
    name = folder.relative_to(DATA.parents[1]).as_posix()
    if os.environ.get("CI") and not folder.is_dir():
        raise FileNotFoundError(f"CI is set and there is no {name} beside the project; put it there or unset CI")
    return pytest.mark.skipif(not folder.is_dir(), reason=f"no {name} beside the project")
