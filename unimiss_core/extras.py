"""How a part that is not always installed is got: from this program's own folder. It is on no package index, where
whoever asked for its name might be given a stranger's program."""


def way_to(extra: str) -> str:
    """What to type, for a message."""
    return f"pip install -e '.[{extra}]' in this program's folder"
