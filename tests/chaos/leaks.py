"""Where the store's secret may not be: logs, artifacts, manifests, objects, checkpoints, what was printed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tasks.store.objects import open_store

from .services import BUCKET, SECRET

_SERVER_STATE = "data"
"""SeaweedFS keeps its own keys there; its objects are read through it."""


def leaks(folder: Path, texts: Iterable[str], *, secret: str = SECRET) -> list[str]:
    """Places that hold the secret: files below the folder, objects of the bucket, texts."""
    wanted = secret.encode()
    found = [f"text {number}" for number, text in enumerate(texts) if secret in text]
    for path in sorted(folder.rglob("*")):
        if _SERVER_STATE in path.relative_to(folder).parts or path.is_symlink() or not path.is_file():
            continue
        if wanted in path.read_bytes():
            found.append(str(path.relative_to(folder)))
    store = open_store(f"s3://{BUCKET}")
    for key in store.list():
        with store.open(key) as file:
            if wanted in file.read():
                found.append(f"object {key}")
    return found
