"""`unimiss verify`: whether a checkpoint is as it was written, and whether the right one wrote it."""

from pathlib import Path

from unimiss_core import checkpoint
from unimiss_core.keys import fingerprint, read_signing_public_key


def verify(folder: Path, key_file: Path | None) -> None:
    """Print what was checked, file by file. Raises CheckpointError, and ConfigError where the key cannot be read."""
    key = read_signing_public_key(key_file) if key_file else None
    found, absent = checkpoint.verify(folder, key=key)
    manifest = found.manifest
    study = f"study {manifest.study_digest}" if manifest.study_digest else "released weights"
    print(f"{folder}: round {manifest.round} of {study}")
    for name in sorted(manifest.sha256):
        print(f"  {name:{_WIDTH}}  {'not here: only resuming needs it' if name in absent else 'as it was written'}")
    if key is not None:
        print(f"signed by {fingerprint(key)}")
    elif checkpoint.is_signature_there(folder):
        print("signed, and not checked by whom: give --key, as its maker published it")
    else:
        print("not signed: whoever could write here could have made it")


_WIDTH = max(map(len, (checkpoint.STUDENT, checkpoint.TEACHER, *checkpoint.SERVERS_OWN)))
